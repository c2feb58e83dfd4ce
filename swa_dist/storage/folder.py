"""A run's folder, on disk or on S3, and single files at any address."""

import os
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_dist.errors import CheckpointError
from swa_dist.storage import files
from swa_dist.storage.store import MANIFEST, DiskStore, Store

if TYPE_CHECKING:
    from swa_dist.storage.s3 import Prefix


def _prefix(url: str) -> "Prefix":
    from swa_dist.storage.s3 import Prefix  # boto3 is for those who use it

    return Prefix(url)


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def absolute(url: str) -> str:
    """A path made absolute, since workers run elsewhere; an address as it is."""
    return url.rstrip("/") if is_s3(url) else os.path.abspath(Path(url).expanduser())


def as_uri(url: str) -> str:
    return url if is_s3(url) else Path(url).as_uri()


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _split(url: str) -> tuple[str, str]:
    parent, _, name = url.rstrip("/").rpartition("/")
    return parent, name


def read(url: str) -> bytes | None:
    """The file at a path or address, or None where there is none. Raises OSError or ServiceError."""
    if is_s3(url):
        parent, name = _split(url)
        return _prefix(parent).read(name)
    try:
        return Path(url).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write(url: str, content: bytes) -> None:
    """Write the file at a path or address, at once. Raises OutputError or ServiceError."""
    if is_s3(url):
        parent, name = _split(url)
        _prefix(parent).write(name, content)
    else:
        files.write_atomic(Path(url), content)


def put(path: Path, url: str) -> None:
    """Make a file of this machine the one at a path on the same disk, which takes it away, or at an address on S3.

    Raises OutputError or ServiceError.
    """
    if is_s3(url):
        parent, name = _split(url)
        _prefix(parent).upload(path, name)
    else:
        with files.writing(Path(url)):
            path.replace(url)


def remove(url: str) -> None:
    """Remove the file at a path or address, if it is there. Raises OutputError or ServiceError."""
    if is_s3(url):
        parent, name = _split(url)
        _prefix(parent).remove(name)
    else:
        with files.writing(Path(url)):
            Path(url).unlink(missing_ok=True)


def check_writable(url: str) -> None:
    """Raises OutputError or ServiceError where no file can be made under the path or address."""
    if not is_s3(url):
        files.check_writable(Path(url))
        return
    prefix, probe = _prefix(url), f".probe-{uuid.uuid4().hex}"
    prefix.write(probe, b"")
    prefix.remove(probe)


@dataclass(frozen=True)
class Folder:
    """A run's folder as this process works on it. On disk it is the folder itself; of one on S3 this process has a
    folder of its own, `local`, into which files are pulled before they are read and from which they are pushed."""

    url: str
    local: Path
    store: Store
    remote: "Prefix | None"
    scratch: tempfile.TemporaryDirectory[str] | None
    """What `local` is in, of a folder on S3; it goes with this object and its store."""

    def pull(self, *names: str) -> None:
        """Get these files, where they are there."""
        if self.remote is None:
            return
        for name in names:
            if self.remote.has(name):
                with files.writing(self.local / name):
                    (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                self.remote.download(name, self.local / name)

    def push(self, *names: str) -> None:
        """Put these files where others see them, where they are there."""
        if self.remote is None:
            return
        for name in names:
            if (self.local / name).is_file():
                self.remote.upload(self.local / name, name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Raises CheckpointError where it is damaged."""
        if self.remote is None:
            return files.read_json(self.local / name)
        content = self.remote.read(name)
        if content is None:
            return None
        files.write_atomic(self.local / name, content)
        try:
            return files.read_json(self.local / name)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(self.local), self.remote.url)) from None

    def write(self, name: str, content: str) -> None:
        files.write_atomic(self.local / name, content)
        self.push(name)

    def has(self, name: str) -> bool:
        return self.remote.has(name) if self.remote is not None else (self.local / name).exists()

    def age_seconds(self, name: str) -> float:
        """Since the file was written, by the storage's own clock; 0 where there is none. Of S3 to a second or so."""
        if self.remote is not None:
            seen = self.remote.look(name)
            return 0.0 if seen is None else seen.age_seconds
        try:
            written = (self.local / name).stat().st_mtime
        except FileNotFoundError:
            return 0.0
        with files.writing(self.local), tempfile.TemporaryFile(dir=self.local) as now:
            return os.fstat(now.fileno()).st_mtime - written

    def remove(self, name: str) -> None:
        with files.writing(self.local / name):
            (self.local / name).unlink(missing_ok=True)
        if self.remote is not None:
            self.remote.remove(name)


def open_folder(url: str, guard: Callable[[], None] = lambda: None) -> Folder:
    """The folder at a path or address, which need not be there yet. `guard` is asked before each commit of an entry."""
    if not is_s3(url):
        return Folder(url, Path(url), DiskStore(Path(url), guard), None, None)
    from swa_dist.storage.s3 import S3Store

    remote = _prefix(url)
    with files.writing(Path(tempfile.gettempdir())):
        scratch = tempfile.TemporaryDirectory(prefix="swa-run-", ignore_cleanup_errors=True)
        local = Path(scratch.name) / "run"
        local.mkdir()
    return Folder(url, local, S3Store(remote, DiskStore(local), guard, scratch), remote, scratch)


def set_aside(url: str, suffix: str) -> None:
    """Give a run's folder another name: `url` with `suffix`, and a number where that is taken."""
    if not is_s3(url):
        old = Path(url)
        target = old.with_name(old.name + suffix)
        number = 0
        while target.exists():
            number += 1
            target = old.with_name(f"{old.name}{suffix}-{number}")
        with files.writing(old):
            old.rename(target)
        return
    parent, name = _split(url)
    prefix = _prefix(parent)
    number, target_name = 0, name + suffix
    while prefix.names(f"{target_name}/"):
        number += 1
        target_name = f"{name}{suffix}-{number}"
    # All of it is there twice before any of it goes, and the manifests go first: what a kill leaves under the old name
    # has no entry that lacks a file, nor a summary without its run, and what it takes from there is whole elsewhere.
    found = sorted(prefix.names(f"{name}/"), key=_is_mark)
    for one in found:
        prefix.copy(one, target_name + one.removeprefix(name))
    prefix.remove(*filter(_is_mark, found))
    prefix.remove(*found)


def _is_mark(name: str) -> bool:
    """Whether this file says that others are there."""
    return name.endswith((f"/{MANIFEST}", "/summary.json"))


def exists(url: str) -> bool:
    """Whether there is a folder with anything in it."""
    if is_s3(url):
        return bool(_prefix(url).names())
    return Path(url).is_dir() and any(Path(url).iterdir())
