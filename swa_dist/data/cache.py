"""A bounded folder of what came from S3, shared by the processes of a machine."""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from swa_dist.storage.files import STAGING

_CHECK_BYTES = 4  # CRC-32 of what follows, big-endian
_KEPT_WHEN_FULL = 0.9
_USED = ".used"


class Cache:
    """Content by name.

    Every epoch needs each image once, in another order, so that evicting this run's images for others of this run gains
    nothing (Mohan et al. 2021, "Analyzing and Mitigating Data Stalls in DNN Training"): what was not used since the run
    began is evicted, the longest unused first, and when there is none of that left, nothing new is taken in.

    Files are written aside and renamed, and have a checksum: one that is damaged is not there. A folder that is full or
    can't be written costs the cache, not the run. Threads and processes may use it at once.
    """

    def __init__(self, folder: Path, max_bytes: int, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._warn = warn
        self._began = time.time()
        self._closed = max_bytes <= 0
        self._thread_lock = threading.Lock()  # flock is between processes

    def get(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        check, body = content[:_CHECK_BYTES], content[_CHECK_BYTES:]
        # A file that a power cut left empty has the checksum of nothing.
        if not body or int.from_bytes(check, "big") != zlib.crc32(body):
            with contextlib.suppress(OSError):  # not this user's
                path.unlink()
            return None
        return body

    def put(self, name: str, content: bytes) -> None:
        if self._closed:
            return
        try:
            self._put(self._path(name), zlib.crc32(content).to_bytes(_CHECK_BYTES, "big") + content)
        except OSError as error:
            with self._thread_lock:
                first, self._closed = not self._closed, True
            if first:
                self._warn(
                    f"{self._folder} takes no more images ({error.strerror}); they are read from S3 from here on."
                )

    def _put(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written under the lock: an eviction that counts sees each file either not at all or in the account too.
        with self._accounts() as used:
            if used[0] + len(content) > self._max_bytes:
                used[0] = self._evict()
            if used[0] + len(content) > self._max_bytes:
                self._closed = True
                return
            staged = path.with_name(f"{STAGING}{path.name}-{os.getpid()}-{threading.get_ident()}")
            try:
                staged.write_bytes(content)
                staged.replace(path)
            except OSError:
                staged.unlink(missing_ok=True)
                raise
            used[0] += len(content)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:40]
        return self._folder / digest[:2] / digest[2:]

    @contextlib.contextmanager
    def _accounts(self) -> Iterator[list[int]]:
        """The bytes in the folder, for one thread of one process at a time; what it is set to is kept.

        A crash can leave it a little wrong, which the next eviction, that counts, puts right.
        """
        with self._thread_lock, (self._folder / _USED).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            kept = file.read()
            used = [int(kept) if kept.isdigit() else sum(size for _, size, _ in self._files())]
            yield used
            file.truncate(0)
            file.write(str(used[0]).encode())

    def _evict(self) -> int:
        """Remove what this run has not used until there is some room; the bytes that are left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for last_used, size, path in files:
            if used <= _KEPT_WHEN_FULL * self._max_bytes or last_used >= self._began:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each was used last, its bytes, and where it is. Also what a crash left half-written."""
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = Path(folder) / name
                if name != _USED:
                    with contextlib.suppress(FileNotFoundError):  # renamed or removed by another meanwhile
                        found = path.stat()
                        yield found.st_mtime, found.st_size, path
