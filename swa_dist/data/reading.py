"""The encoded images of an index, by their places in it: from disk, from tar shards, from S3 through a cache."""

import concurrent.futures
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from swa_dist.data.cache import Cache
from swa_dist.data.files import changed, files_at
from swa_dist.data.headers import ends_digest
from swa_dist.data.index import ETAG, Index
from swa_dist.data.order import Ints
from swa_dist.storage.folder import is_s3

Bytes = npt.NDArray[np.uint8]


class Reader:
    """Threads may read at once."""

    def __init__(self, index: Index, cache: Cache | None) -> None:
        """`cache`: for images on S3."""
        self.index = index
        self._files = files_at(index.root)
        self._cache = cache if is_s3(index.root) else None

    def read(self, i: int) -> Bytes:
        """The encoded image, uint8 [bytes]. Raises DataError where it is not what was indexed, and ServiceError where
        S3 doesn't answer."""
        name = f"{self.index.root} {self.index.name(i)} {self.index.version(i)}"
        content = None if self._cache is None else self._cache.get(name)
        if content is None:
            content = self._fetch(i)
            if self._cache is not None:
                self._cache.put(name, content)
        return np.frombuffer(content, dtype=np.uint8)

    def _fetch(self, i: int) -> bytes:
        file, num_bytes, version = self.index.file(i), self.index.num_bytes(i), self.index.version(i)
        in_shard = self.index.shard_numbers[i] >= 0
        content = self._files.read(file, self.index.offset(i), num_bytes) if in_shard else self._files.read(file)
        if len(content) != num_bytes or (not version.startswith(ETAG) and ends_digest(content) != version):
            place = self._files.place(self.index.name(i))
            raise changed(place, f"has other content ({len(content):,} bytes, {num_bytes:,} then)")
        return content


class Ahead:
    """Reads ahead, with the same threads in all passes."""

    def __init__(self, num_threads: int, num_groups: int) -> None:
        """`num_groups`: how many are read before they are asked for."""
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="read-images")
        self._num_threads = num_threads
        self._num_groups = num_groups

    def read(self, reader: Reader, groups: Iterable[Ints]) -> Iterator[list[Bytes]]:
        """The encoded images of each group, in order."""
        waiting: deque[list[concurrent.futures.Future[list[Bytes]]]] = deque()
        try:
            for group in groups:
                shares = np.array_split(group, max(1, min(len(group), self._num_threads)))
                waiting.append([self._pool.submit(_read, reader, share) for share in shares])
                if len(waiting) > self._num_groups:
                    yield _gathered(waiting.popleft())
            while waiting:
                yield _gathered(waiting.popleft())
        finally:
            # This may run in the garbage collector, which finds what DALI forgot, in the midst of a thread's start,
            # which holds locks: nothing here may wait for a thread.
            for tasks in waiting:
                for task in tasks:
                    task.cancel()


def _read(reader: Reader, ids: Ints) -> list[Bytes]:
    return [reader.read(i) for i in ids.tolist()]


def _gathered(shares: list[concurrent.futures.Future[list[Bytes]]]) -> list[Bytes]:
    return [content for share in shares for content in share.result()]
