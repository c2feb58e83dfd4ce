"""A run's folder, on disk or on S3, and single files at any address."""

import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_dist.storage import files
from swa_dist.storage.store import DiskStore, Store

if TYPE_CHECKING:
    from swa_dist.storage.s3 import Prefix


def _prefix(url: str) -> "Prefix":
    from swa_dist.storage.s3 import Prefix  # boto3 is for those who use it

    return Prefix(url)


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def absolute(url: str) -> str:
    """A path made absolute, since workers run elsewhere; an address as it is."""
    return url.rstrip("/") if is_s3(url) else str(Path(url).expanduser().resolve())


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def read(url: str) -> bytes | None:
    """The file at a path or address, or None where there is none. Raises OSError or ServiceError."""
    if is_s3(url):
        parent, _, name = url.rpartition("/")
        return _prefix(parent).read(name)
    path = Path(url)
    return path.read_bytes() if path.exists() else None


def write(url: str, content: bytes) -> None:
    """Write the file at a path or address, at once. Raises OutputError or ServiceError."""
    if is_s3(url):
        parent, _, name = url.rpartition("/")
        _prefix(parent).write(name, content)
    else:
        files.write_atomic(Path(url), content)


def remove(url: str) -> None:
    """Remove the file at a path or address, if it is there."""
    if is_s3(url):
        parent, _, name = url.rpartition("/")
        _prefix(parent).remove(name)
    else:
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
    """What `local` is in, of a folder on S3; it goes with this object."""

    def pull(self, *names: str) -> None:
        """Get these files, where they are there."""
        if self.remote is None:
            return
        for name in names:
            if self.remote.has(name):
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
        self.pull(name)
        return files.read_json(self.local / name)

    def write(self, name: str, content: str) -> None:
        files.write_atomic(self.local / name, content)
        self.push(name)

    def has(self, name: str) -> bool:
        return self.remote.has(name) if self.remote is not None else (self.local / name).exists()

    def remove(self, name: str) -> None:
        (self.local / name).unlink(missing_ok=True)
        if self.remote is not None:
            self.remote.remove(name)


def open_folder(url: str, guard: Callable[[], None] = lambda: None) -> Folder:
    """The folder at a path or address, which need not be there yet. `guard` is asked before each commit of an entry."""
    if not is_s3(url):
        return Folder(url, Path(url), DiskStore(Path(url), guard), None, None)
    scratch = tempfile.TemporaryDirectory(prefix="swa-run-", ignore_cleanup_errors=True)
    from swa_dist.storage.s3 import S3Store

    local, remote = Path(scratch.name) / "run", _prefix(url)
    with files.writing(local):
        local.mkdir()
    return Folder(url, local, S3Store(remote, DiskStore(local), guard), remote, scratch)


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
    parent, _, name = url.rpartition("/")
    prefix = _prefix(parent)
    number, target_name = 0, name + suffix
    while prefix.names(f"{target_name}/"):
        number += 1
        target_name = f"{name}{suffix}-{number}"
    # The manifests first: what is half moved has no entry that lacks a file, nor a summary without its run.
    for one in sorted(prefix.names(f"{name}/"), key=lambda n: not n.endswith(("manifest.json", "summary.json"))):
        prefix.rename(one, target_name + one.removeprefix(name))


def exists(url: str) -> bool:
    """Whether there is a folder with anything in it."""
    if is_s3(url):
        parent, _, name = url.rpartition("/")
        return bool(_prefix(parent).names(f"{name}/"))
    return Path(url).exists()
