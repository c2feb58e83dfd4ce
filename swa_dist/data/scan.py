"""Make the index of a data set: class folders, a flat folder with a file of labels, or tar shards; on disk or on S3."""

import concurrent.futures
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from swa_dist.data import labels as label_files
from swa_dist.data import shards
from swa_dist.data.files import EXTENSIONS, File, Files, files_at, is_image, printable
from swa_dist.data.headers import Memory, Row, read_beginning, read_whole
from swa_dist.data.index import ETAG, NO_SHARD, SCHEMA, Index, Progress, Shard, make, with_column
from swa_dist.errors import DataError
from swa_dist.storage.folder import absolute, is_s3

_SHOWN = 10
_IMAGES_AT_ONCE = 4096
_SHARDS_AT_ONCE = 16
_BEGINNING = 1 << 16  # bytes of an object that say how large most images are
_THREADS_ON_S3 = 64


def scan(
    root: str,
    named: str,
    progress: Progress = lambda done, total: None,
    *,
    labels: str | None = None,
    quarantine: bool = False,
) -> Index:
    """Read a data set's headers and file ends, in parallel, not pixels; files that have not changed since the last time
    are not read. `named` ("data.train") is what errors call it. `labels`: for a flat folder, as `labels_of` has it, or
    None where there must be class folders or shards.

    `quarantine`: leave files that are no whole images out. Else raises DataError naming them; in any case for a folder
    that is missing or empty, and a class without images. Raises ServiceError where S3 doesn't answer.
    """
    root = absolute(root)
    files = files_at(root)
    if not files.exists():
        raise DataError(f"`{named}` must be a folder of class folders of images, but {root} does not exist.")
    layout = _layout(files, named, labels)
    rows = _Rows()
    read = functools.partial(_read_image, files)
    if layout.sharded:
        read = functools.partial(shards.read_rows, files, shards.made_with(files))
    threads = _THREADS_ON_S3 if is_s3(root) else min(32, 4 * (os.cpu_count() or 1))
    # Around the threads, not in them: the filters are the process's. Sizes are checked here, by a limit of our own.
    with warnings.catch_warnings(), Memory(root) as memory, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        done = 0
        # In parts: map by itself would hold a future for each of a million files.
        while some := list(itertools.islice(layout.files, _SHARDS_AT_ONCE if layout.sharded else _IMAGES_AT_ONCE)):
            known = memory.recall([file for file, _ in some])
            new = [file for file, _ in some if file.name not in known]
            fresh = zip(new, pool.map(read, new), strict=True)
            kept = []
            for file, label in some:
                if file.name not in known:
                    known[file.name] = next(fresh)[1]
                    # What could not be read at all may be another time, though the file will not have changed.
                    if all(row.version for row in known[file.name]):
                        kept.append((file, known[file.name]))
                rows.add(known.pop(file.name), file if layout.sharded else None, label)
                done += 1
                progress(done, max(done, layout.num_files()))
            memory.keep(kept)
    if rows.bad and not quarantine:
        raise _not_whole(files, named, rows)
    if not rows.num_good:
        raise DataError(f"`{named}` must hold images, but {root} holds none.")
    classes, numbers = layout.classes, {name: number for number, name in enumerate(layout.classes)}
    if layout.sharded:
        classes, numbers = shards.classes_of(files, sorted(rows.codes), named)
    return make(root, classes, tuple(rows.shards), rows.table(numbers))


@dataclass(frozen=True)
class _Layout:
    """The files of a data set in the order of its index."""

    files: Iterator[tuple[File, str]]
    """With the class of each; "" of a shard."""
    num_files: Callable[[], int]
    """As far as can be told while `files` is read."""
    classes: tuple[str, ...]
    """(): those that the shards' images name."""
    sharded: bool = False


def _layout(files: Files, named: str, labels: str | None) -> _Layout:
    folders, directly = files.folders(), files.directly()
    tars = [file for file in directly if shards.is_shard(file.name)]
    images = [file for file in directly if is_image(file.name)]
    if tars:
        return _Layout(((file, "") for file in tars), lambda: len(tars), (), sharded=True)
    if images and labels is not None and (not folders or labels != label_files.AUTO):
        of = label_files.labels_of(files.root, [file.name for file in images], labels, named)
        images.sort(key=lambda file: (of[file.name], file.name))
        pairs = ((file, of[file.name]) for file in images)
        return _Layout(pairs, lambda: len(images), tuple(sorted(set(of.values()))))
    if not folders:
        raise DataError(
            f"`{named}` must hold one folder per class, or tar shards, but {files.root} holds none"
            f" ({', '.join(sorted(EXTENSIONS))}, .tar)."
        )
    return _class_folders(files, folders, named)


def _class_folders(files: Files, folders: list[str], named: str) -> _Layout:
    num_listed, num_folders = 0, 0

    def listed() -> Iterator[tuple[File, str]]:
        nonlocal num_listed, num_folders
        for name in folders:
            found = [file for file in files.under(name) if is_image(file.name)]
            if not found:
                raise DataError(
                    f"each class of `{named}` must have an image, but {files.place(name)} has none"
                    f" ({', '.join(sorted(EXTENSIONS))}). Add some, or remove the folder from train and val."
                )
            num_listed, num_folders = num_listed + len(found), num_folders + 1
            yield from ((file, name) for file in found)

    def num_files() -> int:
        return num_listed * len(folders) // max(1, num_folders)

    return _Layout(listed(), num_files, tuple(folders))


class _Rows:
    """The rows so far, in columns."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        """Of the classes' names, in the order they were met."""
        self.shards: list[Shard] = []
        self.bad: list[Row] = []
        self.num_good = 0
        self._batches: list[pa.RecordBatch] = []
        self._waiting: list[tuple[object, ...]] = []

    def add(self, rows: list[Row], shard: File | None, label: str) -> None:
        if shard is not None:
            self.shards.append(Shard(shard.name, shard.num_bytes, "" if " " in shard.stamp else shard.stamp))
        number = NO_SHARD if shard is None else len(self.shards) - 1
        for row in rows:
            code = self.codes.setdefault(label or row.label, len(self.codes))
            if row.bad is None:
                self.num_good += 1
            else:
                self.bad.append(row)
            sizes = (row.height, row.width, row.version)
            self._waiting.append((row.path, number, row.offset, row.num_bytes, code, *sizes, row.bad, None))
        if len(self._waiting) >= _IMAGES_AT_ONCE:
            self._flush()

    def table(self, numbers: Mapping[str, int]) -> pa.Table:
        """All rows, with the classes' numbers."""
        self._flush()
        table = pa.Table.from_batches(self._batches, SCHEMA)
        of_code = np.array([numbers[name] for name in self.codes], dtype=np.int32)
        return with_column(table, "label", of_code[table["label"].to_numpy()])

    def _flush(self) -> None:
        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
            self._waiting = []


def _read_image(files: Files, file: File) -> list[Row]:
    """What the index needs of a file that is an image; its class is known from where it lies."""
    if printable(file.name) != file.name:
        return [Row(printable(file.name), "", file.num_bytes, 0, 0, "", 0, "its name is not UTF-8")]
    try:
        if is_s3(files.root):
            header = read_beginning(files.read(file, 0, _BEGINNING) if file.num_bytes else b"")
            if header is None:  # a photograph with a large preview before it
                header = read_beginning(files.read(file)) or "not a JPEG or PNG image"
            version = ETAG + file.stamp
        else:
            with files.open(file) as opened:
                header, version = read_whole(opened, file.num_bytes)
    except OSError as error:
        header, version = str(error.strerror), ""
    if isinstance(header, str):
        return [Row(file.name, "", file.num_bytes, 0, 0, version, 0, header)]
    return [Row(file.name, "", file.num_bytes, header.height, header.width, version, 0, None)]


def _not_whole(files: Files, named: str, rows: _Rows) -> DataError:
    shown = "".join(f"\n  {files.place(row.path)}: {row.bad}" for row in rows.bad[:_SHOWN])
    more = f"\n  and {len(rows.bad) - _SHOWN} more" if len(rows.bad) > _SHOWN else ""
    return DataError(
        f"every file of `{named}` must be a whole image, but {len(rows.bad)} of {rows.num_good + len(rows.bad)} are"
        f" not:{shown}{more}\n  Replace or remove them, or write an index that leaves them out:"
        " `swa-dist data index --quarantine`."
    )
