"""Writing tar shards: the images of an index in a fixed random order, so many to a shard."""

import concurrent.futures
import io
import json
import os
import tarfile
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa

from swa_dist.data import index
from swa_dist.data.headers import ends_digest
from swa_dist.data.index import SCHEMA, Index, Progress, Shard
from swa_dist.data.order import Ints, Span, groups_of
from swa_dist.data.reading import Reader
from swa_dist.data.shards import CLASSES, INDEX
from swa_dist.errors import DataError, OutputError
from swa_dist.storage import folder
from swa_dist.storage.files import STAGING, writing
from swa_dist.storage.folder import is_s3, join

IMAGES_PER_SHARD = 1024
_SEED = 1234
_PLAN = ".plan.json"
_ROWS = ".rows-"
_AT_ONCE = 4


def write(
    source: Index, target: str, images_per_shard: int = IMAGES_PER_SHARD, progress: Progress = lambda done, total: None
) -> Index:
    """Write the images of `source` as tar shards, with their index and the classes' names, into a folder on disk or on
    S3. Returns the index.

    The same images give the same bytes. A shard is there wholly or not at all; those that are there already are not
    written again. Raises DataError where an image is not what was indexed, or a class's name has several lines, and
    OutputError where `target` can't be written or holds other shards.
    """
    if unfit := next((name for name in source.classes if "\n" in name), None):
        raise DataError(f"the classes' names must be of one line, to be written into {CLASSES}, but {unfit!r} is not.")
    _take_place(source, target, images_per_shard)
    if folder.read(join(target, INDEX)) is not None:
        _tidy(target)
        progress(len(source), len(source))
        return index.load(join(target, INDEX), target)
    images = np.random.Philox(key=_SEED).random_raw(len(source)).argsort(kind="stable")
    spans = groups_of(Span(0, len(images)), images_per_shard)
    reader = Reader(source, None)
    parts: list[Index] = []
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [
            pool.submit(_shard, reader, images[span.start : span.stop], span, target, f"{number:06d}.tar")
            for number, span in enumerate(spans)
        ]
        try:
            for task, span in zip(tasks, spans, strict=True):
                parts.append(task.result())
                progress(span.stop, len(images))
        finally:
            pool.shutdown(cancel_futures=True)
    folder.write(join(target, CLASSES), "".join(f"{name}\n" for name in source.classes).encode())
    numbered = [index.with_column(part.rows, "shard", [number] * len(part.rows)) for number, part in enumerate(parts)]
    whole = index.make(target, source.classes, tuple(p.shards[0] for p in parts), pa.concat_tables(numbered))
    index.save(whole, join(target, INDEX))
    _tidy(target)
    return whole


def _take_place(source: Index, target: str, images_per_shard: int) -> None:
    plan = json.dumps({"schema": 1, "images": source.digest, "images_per_shard": images_per_shard}).encode()
    if not is_s3(target):
        with writing(Path(target)):
            Path(target).mkdir(parents=True, exist_ok=True)
    kept = folder.read(join(target, _PLAN))
    if kept is None and not _is_empty(target):
        raise OutputError(f"{target} must be empty for shards to be written there, but is not. Choose another folder.")
    if kept not in (None, plan):
        raise OutputError(
            f"{target} must be empty, or hold a part of these shards, but holds those of other images or of another"
            " size. Choose another folder."
        )
    folder.write(join(target, _PLAN), plan)


def _is_empty(target: str) -> bool:
    """But for a plan that a kill left half-written."""
    if is_s3(target):
        return not folder.exists(target)
    return all(path.name.startswith(f"{STAGING}{_PLAN}") for path in Path(target).iterdir())


def _tidy(target: str) -> None:
    """Remove what is needed only until all shards are there, and what a kill left half-written."""
    if is_s3(target):
        from swa_dist.storage.s3 import Prefix  # boto3 is for those who use it

        prefix = Prefix(target)
        prefix.remove(*prefix.names(_ROWS))
        return
    with writing(Path(target)):
        for path in Path(target).iterdir():
            if path.name.startswith((_ROWS, STAGING)):
                path.unlink(missing_ok=True)


def _shard(reader: Reader, images: Ints, span: Span, target: str, name: str) -> Index:
    """One shard, written, and its own index; the index is kept too, after it, and says that the shard is whole."""
    url = join(target, _rows_name(name))
    if folder.read(url) is not None:
        return index.load(url, target)
    place = Path(tempfile.gettempdir()) if is_s3(target) else Path(target)
    staged = place / f"{STAGING}{uuid.uuid4().hex}-{name}"
    with writing(Path(target)):
        try:
            rows = _write_tar(staged, reader, images, span)
            shard = Shard(name, staged.stat().st_size, "")
            folder.put(staged, join(target, name))
        finally:
            staged.unlink(missing_ok=True)
    found = index.make(target, reader.index.classes, (shard,), pa.Table.from_pylist(rows, SCHEMA))
    index.save(found, url)
    return found


def _write_tar(path: Path, reader: Reader, images: Ints, span: Span) -> list[dict[str, object]]:
    rows = []
    source = reader.index
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position, i in zip(range(span.start, span.stop), images.tolist(), strict=True):
            content = reader.read(i).tobytes()
            key, label = f"{position:09d}", int(source.labels[i])
            name = key + os.path.splitext(source.path(i))[1].lower()
            offset = _add(tar, name, content)
            _add(tar, f"{key}.cls", str(label).encode())
            _add(tar, f"{key}.json", json.dumps({"path": source.name(i)}).encode())
            rows.append(
                {
                    "path": name,
                    "shard": 0,
                    "offset": offset,
                    "num_bytes": len(content),
                    "label": label,
                    "height": int(source.heights[i]),
                    "width": int(source.widths[i]),
                    "version": ends_digest(content),
                }
            )
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    return rows


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Where its content begins. Times and owners are left at zero: the same images give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return offset


def _rows_name(shard: str) -> str:
    return f"{_ROWS}{shard.removesuffix('.tar')}.parquet"
