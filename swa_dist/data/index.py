"""What a data set is: every image's place, class and size, and a digest that names it all."""

import concurrent.futures
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from swa_dist.data.order import Ints
from swa_dist.errors import DataError, OutputError, ServiceError
from swa_dist.storage import folder

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})
_MAX_PIXELS = 50_000_000  # above it a file is taken for a decompression bomb
_TAIL_BYTES = 4096
_TRANSPOSED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width
_SHOWN = 10
_READ_AHEAD = 4096
_ORIENTATION = 0x0112  # of EXIF

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Index:
    """The images of one split, sorted by path."""

    root: Path
    classes: tuple[str, ...]
    """Names in the order of the labels: sorted, as torchvision's ImageFolder has them."""
    paths: tuple[str, ...]
    """Relative to `root`, with forward slashes."""
    labels: Ints
    heights: Ints
    """Pixels, upright: after the EXIF orientation."""
    widths: Ints
    digest: str
    """SHA-256 over each image's relative path, size, class and header, not over where `root` is or when it was made."""

    def __len__(self) -> int:
        return len(self.paths)

    def path_bytes(self, ids: Ints) -> list[npt.NDArray[np.uint8]]:
        """Absolute paths as DALI takes them."""
        root = os.fsencode(self.root) + b"/"
        return [np.frombuffer(root + os.fsencode(self.paths[i]), dtype=np.uint8) for i in ids]


def scan(root: Path, split: str, progress: Progress | None = None) -> Index:
    """Read a folder of class folders of images. `split` ("train", "val" or a name of the caller's) names it in errors.

    Headers and file ends are read, in parallel, not pixels. Raises DataError for a folder that is missing or empty, a
    class without images, and naming the files that are empty, cut short or no images.
    """
    named = f"data.{split}" if split in ("train", "val") else split
    if not root.is_dir():
        raise DataError(f"`{named}` must be a folder of class folders, but {root} does not exist.")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"`{named}` must hold one folder per class, but {root} holds none.")
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        found = sorted(f"{name}/{path}" for path in _images_under(root / name))
        if not found:
            raise DataError(
                f"each class of `{named}` must have an image, but {root / name} has none"
                f" ({', '.join(sorted(EXTENSIONS))}). Add some, or remove the folder from train and val."
            )
        files += [(path, label) for path in found]
    headers, bad = _read_headers(root, [path for path, _ in files], progress)
    if bad:
        shown = "".join(f"\n  {_printable(root / path)}: {why}" for path, why in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(
            f"every file of `{named}` must be a whole image, but {len(bad)} of {len(files)} are not:{shown}{more}"
            "\n  Replace or remove them."
        )
    digest = hashlib.sha256(json.dumps([split, classes]).encode())
    for (path, label), header in zip(files, headers, strict=True):
        digest.update(json.dumps([path, label, header.num_bytes, header.sha256]).encode())
    return Index(
        root=root,
        classes=tuple(classes),
        paths=tuple(path for path, _ in files),
        labels=np.array([label for _, label in files], dtype=np.int64),
        heights=np.array([h.height for h in headers], dtype=np.int64),
        widths=np.array([h.width for h in headers], dtype=np.int64),
        digest=digest.hexdigest(),
    )


def save(index: Index, url: str) -> None:
    """Write the index at a path or an address on S3. Raises OutputError or ServiceError."""
    table = pa.table(
        {"path": index.paths, "label": index.labels, "height": index.heights, "width": index.widths}
    ).replace_schema_metadata({"swa_dist": json.dumps({"schema": 1, "classes": index.classes, "digest": index.digest})})
    written = io.BytesIO()
    pq.write_table(table, written)
    folder.write(url, written.getvalue())


def load(url: str, root: Path) -> Index:
    """The index saved at a path or an address on S3, of the images under `root`. Raises DataError where it can't be
    read, and ServiceError where S3 doesn't answer."""
    try:
        content = folder.read(url)
        if content is None:
            raise FileNotFoundError("it is not there")
        table = pq.read_table(pa.BufferReader(content))
        facts = json.loads(table.schema.metadata[b"swa_dist"])
        return Index(
            root=root,
            classes=tuple(facts["classes"]),
            paths=tuple(table["path"].to_pylist()),
            labels=table["label"].to_numpy(),
            heights=table["height"].to_numpy(),
            widths=table["width"].to_numpy(),
            digest=facts["digest"],
        )
    except (OutputError, ServiceError) as error:
        raise type(error)(f"{error} It is the images' index, as `swa-dist data index` writes it.") from None
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{url} must be an index of images, but can't be read: {error}. Write it with `swa-dist data index`."
        ) from None


def check_pair(train: Index, val: Index, num_classes: int) -> None:
    """Raise DataError unless both splits have the same `num_classes` classes."""
    if train.classes != val.classes:
        missing = sorted(set(train.classes) - set(val.classes))
        extra = sorted(set(val.classes) - set(train.classes))
        parts = [f"{word} {', '.join(names[:5])}" for word, names in (("lacks", missing), ("adds", extra)) if names]
        raise DataError(f"`data.val` must have the classes of `data.train`, but {' and '.join(parts)}.")
    if len(train.classes) != num_classes:
        raise DataError(
            f"`model.num_classes` must be the number of class folders ({len(train.classes)}), but is {num_classes}."
            " Set it, and `model.head=replace` if the weights are for other classes."
        )


def data_digest(train: Index, val: Index) -> str:
    """Names the data set: SHA-256 over both splits' digests."""
    return hashlib.sha256(f"{train.digest} {val.digest}".encode()).hexdigest()


@dataclass(frozen=True)
class _Header:
    num_bytes: int
    height: int
    width: int
    sha256: str
    """Of the file's first and last bytes, which are read anyway."""


def _printable(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


def _images_under(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in names:
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")


def _read_headers(
    root: Path, paths: list[str], progress: Progress | None
) -> tuple[list[_Header], list[tuple[str, str]]]:
    headers: list[_Header] = []
    bad: list[tuple[str, str]] = []
    # Around the threads, not in them: the filters are the process's. Sizes are checked here, by a limit of our own.
    with (
        warnings.catch_warnings(),
        concurrent.futures.ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool,
    ):
        warnings.simplefilter("ignore")
        for first in range(0, len(paths), _READ_AHEAD):  # map by itself would hold a future for each of a million files
            some = paths[first : first + _READ_AHEAD]
            results = pool.map(lambda path: _read_header(root / path), some)
            for done, (path, header) in enumerate(zip(some, results, strict=True), start=first + 1):
                if isinstance(header, _Header):
                    headers.append(header)
                else:
                    bad.append((path, header))
                if progress is not None:
                    progress(done, len(paths))
    return headers, bad


def _read_header(path: Path) -> _Header | str:
    """What the index needs of a file, or why it is no whole image."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    try:
        num_bytes = path.stat().st_size
        if num_bytes == 0:
            return "empty"
        with path.open("rb") as file:
            head = file.read(_TAIL_BYTES)
            file.seek(max(0, num_bytes - _TAIL_BYTES))
            tail = file.read()
            file.seek(0)
            image = Image.open(file, formats=["JPEG", "PNG"])
            width, height = image.size
            if width * height > _MAX_PIXELS:
                return f"{width} x {height} pixels, more than {_MAX_PIXELS:,}"
            # The end-of-image marker can't occur in the compressed data, so without one the file was cut short. Pillow
            # has read up to that data; a thumbnail's marker comes before it.
            end = b"IEND" if image.format == "PNG" else b"\xff\xd9"
            data_start = file.tell()
            if end not in tail[max(0, data_start - (num_bytes - len(tail))) :]:
                file.seek(data_start)
                if end not in file.read():  # phones put a film or a depth map after it
                    return "cut short"
            orientation = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "not a JPEG or PNG image" if isinstance(error, UnidentifiedImageError) else str(error)
    if orientation in _TRANSPOSED:
        width, height = height, width
    return _Header(num_bytes, height, width, hashlib.sha256(head + tail).hexdigest())
