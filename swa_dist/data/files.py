"""Where the files of a data set lie, on disk or on S3: listed in order, and read in parts."""

import contextlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol

from swa_dist.errors import DataError, OutputError
from swa_dist.storage.folder import is_s3

if TYPE_CHECKING:
    from swa_dist.storage.s3 import Prefix

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})
_OPEN_FILES = 64
_READ_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class File:
    name: str
    """Relative to the root, with forward slashes."""
    num_bytes: int
    stamp: str
    """Another one once the file has changed. On S3 the ETag; on disk its times, which a copy does not share."""


class Files(Protocol):
    """A tree of files. Names that begin with a dot are not seen. Every method may raise DataError, or ServiceError
    where S3 doesn't answer."""

    root: str

    def exists(self) -> bool: ...

    def folders(self) -> list[str]:
        """The folders directly in the root, sorted."""

    def directly(self) -> list[File]:
        """The files directly in the root, sorted."""

    def under(self, folder: str) -> list[File]:
        """All files in a folder and in those within it, sorted."""

    def read(self, file: File, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of a file, or all from `start` on; fewer where it ends before.

        Raises DataError where it is not there, or, on S3, is not of this stamp.
        """

    def open(self, file: File) -> BinaryIO:
        """The file to read from front to back. On disk it can be sought in."""

    def place(self, name: str) -> str:
        """A file's full path or address, printable."""


def files_at(root: str) -> Files:
    if not is_s3(root):
        return DiskFiles(root)
    from swa_dist.storage.s3 import READ_SETTINGS, Prefix  # boto3 is for those who use it

    return S3Files(root, Prefix(root, READ_SETTINGS))


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def printable(name: str) -> str:
    """The same name where it is UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def changed(place: str, why: str) -> DataError:
    return DataError(
        f"{place} must be as it was when it was indexed, but {why}. Bring it back, or write the index again with"
        " `swa-dist data index` (another digest, and so another run)."
    )


class DiskFiles:
    def __init__(self, root: str) -> None:
        self.root = root
        self._handles = _Handles()

    def exists(self) -> bool:
        return os.path.isdir(self.root)

    def folders(self) -> list[str]:
        with os.scandir(self.root) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and os.path.isdir(e.path))

    def directly(self) -> list[File]:
        with os.scandir(self.root) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and _is_file(e))
        return [self._file(name) for name in names]

    def under(self, folder: str) -> list[File]:
        return [self._file(name) for name in sorted(self._walk(folder, frozenset()))]

    def read(self, file: File, start: int = 0, length: int | None = None) -> bytes:
        """Of a whole file, or of one that stays open for the next parts of it."""
        try:
            if length is None:
                with open(os.path.join(self.root, file.name), "rb", buffering=0) as whole:
                    whole.seek(start)
                    return whole.readall()
            opened = self._handles.of(os.path.join(self.root, file.name))
            return os.pread(opened.fileno(), length, start)
        except OSError as error:
            raise changed(self.place(file.name), f"can't be read: {error.strerror}") from None

    def open(self, file: File) -> BinaryIO:
        return open(os.path.join(self.root, file.name), "rb")

    def place(self, name: str) -> str:
        return printable(os.path.join(self.root, name))

    def _file(self, name: str) -> File:
        try:
            found = os.stat(os.path.join(self.root, name))
        except OSError:  # a link to nowhere, which reading it will name
            return File(name, 0, "")
        return File(name, found.st_size, f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}")

    def _walk(self, folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        """Names of all files. Links to folders are followed, but not into one that this is already in."""
        found = os.stat(os.path.join(self.root, folder))
        here = (found.st_dev, found.st_ino)
        if here in above:
            return
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}"
                if os.path.isdir(entry.path):
                    yield from self._walk(name, above | {here})
                elif _is_file(entry):
                    yield name


def _is_file(entry: "os.DirEntry[str]") -> bool:
    """Or a link to nowhere, which reading it will name; not a pipe, on which reading it would wait."""
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


class S3Files:
    def __init__(self, root: str, prefix: "Prefix") -> None:
        self.root = root
        self._prefix = prefix

    def exists(self) -> bool:
        with _refusals():
            return next(self._prefix.objects(), None) is not None

    def folders(self) -> list[str]:
        with _refusals():
            return [name for name in self._prefix.folders() if not name.startswith(".")]

    def directly(self) -> list[File]:
        return list(self._listed("", directly=True))

    def under(self, folder: str) -> list[File]:
        return list(self._listed(f"{folder}/"))

    def read(self, file: File, start: int = 0, length: int | None = None) -> bytes:
        with _refusals():
            found = self._prefix.read_part(file.name, file.stamp, start, length)
        if found is None:
            raise changed(self.place(file.name), "is not there, or is another object")
        return found

    def open(self, file: File) -> BinaryIO:
        return io.BufferedReader(_Ranges(self, file), _READ_AT_ONCE)  # type: ignore[type-var]

    def place(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _listed(self, under: str, *, directly: bool = False) -> Iterator[File]:
        with _refusals():
            for one in self._prefix.objects(under, directly=directly):
                if not any(part.startswith(".") for part in one.name.split("/")) and not one.name.endswith("/"):
                    yield File(one.name, one.num_bytes, one.version)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What S3 refuses is the data's fault here, not the output's."""
    try:
        yield
    except OutputError as error:
        raise DataError(str(error)) from None


class _Ranges(io.RawIOBase):
    """An object from front to back, a range at a time: what is read of it survives a cut connection."""

    def __init__(self, files: S3Files, file: File) -> None:
        self._files = files
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        length = min(len(buffer), self._file.num_bytes - self._at)
        if length <= 0:
            return 0
        found = self._files.read(self._file, self._at, length)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class _Handles:
    """Files that stay open: the last ones used."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: str) -> BinaryIO:
        """One that is pushed out closes itself once no thread reads from it any more."""
        with self._lock:
            file = self._open.pop(path) if path in self._open else open(path, "rb")  # noqa: SIM115 - it stays open
            self._open[path] = file
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file
