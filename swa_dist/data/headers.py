"""What the index needs of an image, read from the file's ends; and a memory of it, for files that did not change."""

import hashlib
import io
import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import platformdirs
from PIL import Image, UnidentifiedImageError

from swa_dist.data.files import File, printable

MAX_PIXELS = 50_000_000
"""A file with more is taken for a decompression bomb."""
END_BYTES = 4096
"""How much of a file's beginning, and of its end, its version is a digest of."""
_TRANSPOSED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width
_ORIENTATION = 0x0112  # of EXIF
_MEMORY_SCHEMA = 1


class Row(NamedTuple):
    """One image of the index."""

    path: str
    """Relative to the root, or to its shard."""
    label: str
    """The class's name; of shards that give numbers, the number."""
    num_bytes: int
    height: int
    """Pixels, upright: after the EXIF orientation. 0 where it could not be read."""
    width: int
    version: str
    """SHA-256 of the file's ends, 32 digits of it, or "etag " and the object's ETag."""
    offset: int
    """Of the file in its shard, bytes; 0 without shards."""
    bad: str | None
    """Why it is no whole image."""


@dataclass(frozen=True)
class Header:
    height: int
    width: int


class BadImageError(Exception):
    """Why a file is no whole image."""


def ends_digest(content: bytes) -> str:
    """The version of a file with this content."""
    return _digest(content[:END_BYTES], content[-END_BYTES:])


def read_whole(file: IO[bytes], num_bytes: int) -> tuple[Header | str, str]:
    """Size, or why the file is no whole image, and version. `file` can be sought in. Pixels are not decoded."""
    if num_bytes == 0:
        return "empty", ends_digest(b"")
    head = file.read(END_BYTES)
    file.seek(max(0, num_bytes - END_BYTES))
    tail = file.read(END_BYTES)
    file.seek(0)
    try:
        with Image.open(file, formats=["JPEG", "PNG"]) as image:
            header = _header(image)
            # The end-of-image marker can't occur in the compressed data, so without one the file was cut short. Pillow
            # has read up to that data; a thumbnail's marker comes before it.
            end = b"IEND" if image.format == "PNG" else b"\xff\xd9"
            data_start = file.tell()
            if end not in tail[max(0, data_start - (num_bytes - len(tail))) :]:
                file.seek(data_start)
                if end not in file.read(num_bytes - data_start):  # phones put a film or a depth map after it
                    return "cut short", _digest(head, tail)
    except BadImageError as why:
        return str(why), _digest(head, tail)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _why(error), _digest(head, tail)
    return header, _digest(head, tail)


def read_beginning(head: bytes) -> Header | str | None:
    """Size by the beginning of a file, or why it is no image; None where more of it is needed to tell."""
    if not head:
        return "empty"
    try:
        with Image.open(io.BytesIO(head), formats=["JPEG", "PNG"]) as image:
            return _header(image)
    except BadImageError as why:
        return str(why)
    except UnidentifiedImageError:
        return "not a JPEG or PNG image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _header(image: Image.Image) -> Header:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    orientation = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
    return Header(width, height) if orientation in _TRANSPOSED else Header(height, width)


def _why(error: Exception) -> str:
    return "not a JPEG or PNG image" if isinstance(error, UnidentifiedImageError) else str(error)


def _digest(head: bytes, tail: bytes) -> str:
    digest = hashlib.sha256(head)
    digest.update(tail)
    return digest.hexdigest()[:32]


class Memory:
    """What was read of a root's files before: a SQLite file in the user's cache folder, that may be lost.

    So a scan that was interrupted goes on, and one of unchanged files reads none of them.
    """

    def __init__(self, root: str) -> None:
        folder = Path(platformdirs.user_cache_path("swa_dist")) / "headers"
        name = f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}-{_MEMORY_SCHEMA}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base: sqlite3.Connection | None = sqlite3.connect(folder / name, timeout=5)
            self._base.execute("PRAGMA synchronous = OFF")  # to lose it is to read again
            self._base.execute("CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, stamp TEXT, rows TEXT)")
        except (OSError, sqlite3.Error):
            self._base = None

    def recall(self, files: Sequence[File]) -> dict[str, list[Row]]:
        """Of those that are as they were: their rows, by name."""
        if self._base is None:
            return {}
        found = {}
        try:
            for file in files:
                got = self._base.execute("SELECT stamp, rows FROM files WHERE name = ?", (file.name,)).fetchone()
                if got is not None and got[0] == file.stamp:
                    found[file.name] = [Row(*row) for row in json.loads(got[1])]
        except (sqlite3.Error, UnicodeEncodeError):
            return found
        return found

    def keep(self, read: Iterable[tuple[File, list[Row]]]) -> None:
        if self._base is None:
            return
        try:
            with self._base:
                self._base.executemany(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                    [
                        (file.name, file.stamp, json.dumps(rows))
                        for file, rows in read
                        if printable(file.name) == file.name
                    ],
                )
        except sqlite3.Error:  # a full disk
            self._base = None

    def close(self) -> None:
        if self._base is not None:
            self._base.close()

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
