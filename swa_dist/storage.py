"""Files that are wholly there or not there: digests, atomic writes and committed entries."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from swa_dist.errors import BusyError, CheckpointError, OutputError

_MANIFEST = "manifest.json"
_STAGING = ".staging-"
_CORRUPT = ".corrupt-"


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` so that a reader, or a crash, meets the old file or the new one and nothing between."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.parent / f"{_STAGING}{path.name}-{uuid.uuid4().hex}"
        try:
            with staged.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`, or None where there is none. Raises CheckpointError where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} must hold JSON, but does not: {error}. Remove it.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds {type(value).__name__}. Remove it.")
    return value


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that can't be written into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path} must fit on its disk, but that is full. Free some space and run again."
            ) from None
        raise OutputError(f"{path} must be writable, but is not: {error.strerror}. Choose another place.") from None


def check_writable(folder: Path) -> None:
    """Make the folder if need be. Raises OutputError where no file can be made in it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Within the block this process alone holds the lock file `path`; it is let go even if the process is killed.

    Raises BusyError, at once, naming `what` and the holder, where another process holds it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{what} must not be running already, but is: {holder}. Wait for it, or stop it.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends, replacing one of that name; or nothing does."""
    staged = target.parent / f"{_STAGING}{target.name}-{uuid.uuid4().hex}"
    with writing(target):
        staged.mkdir(parents=True)
        try:
            yield staged
            _sync_folder(staged)
            old = target.parent / f"{_STAGING}{target.name}-old-{uuid.uuid4().hex}"
            if target.exists():
                target.rename(old)
            staged.rename(target)
            _sync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise


class Store:
    """A folder of committed entries: named folders of files with a manifest, each all there or not there.

    An entry is written aside, hashed and renamed; what a kill leaves half-written is never an entry. Entries are
    verified against their hashes when opened, since neither torch.load nor safetensors notices a flipped bit.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def commit(self, name: str, fill: Callable[[Path], None]) -> None:
        """Make the entry `name` ("checkpoints/000000000512") of the files that `fill` writes into a folder.

        An entry of that name that is there already is replaced. Raises OutputError; then nothing has changed.
        """
        with new_folder(self.root / name) as folder:
            fill(folder)
            files = {}
            for path in sorted(folder.iterdir()):
                _sync_file(path)
                files[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            manifest = folder / _MANIFEST
            manifest.write_text(json.dumps({"schema": 1, "files": files}, indent=1), encoding="utf-8")
            _sync_file(manifest)

    def open(self, name: str) -> Path:
        """The folder of the entry `name`, verified. Raises CheckpointError naming the file that is not whole."""
        folder = self.root / name
        manifest = read_json(folder / _MANIFEST)
        if manifest is None:
            raise CheckpointError(f"{folder} must be a committed entry, but has no {_MANIFEST}.")
        try:
            expected = {folder / file: (facts["bytes"], facts["sha256"]) for file, facts in manifest["files"].items()}
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{folder / _MANIFEST} must list files, but does not: it is damaged.") from None
        for path, (size, digest) in expected.items():
            if not path.is_file():
                raise CheckpointError(f"{path} must be there, but is not.")
            if path.stat().st_size != size or sha256_file(path) != digest:
                raise CheckpointError(f"{path} must have SHA-256 {digest}, but has not: it is damaged.")
        return folder

    def names(self, kind: str) -> list[str]:
        """The entries of one kind ("checkpoints"), in the order of their names, unverified."""
        folder = self.root / kind
        if not folder.is_dir():
            return []
        return [f"{kind}/{path.name}" for path in sorted(folder.iterdir()) if not path.name.startswith(".")]

    def newest(self, kind: str, warn: Callable[[str], None]) -> str | None:
        """The last valid entry of a kind. Damaged ones are named to `warn` and set aside, not deleted."""
        for name in reversed(self.names(kind)):
            try:
                self.open(name)
            except CheckpointError as error:
                aside = self.root / kind / f"{_CORRUPT}{Path(name).name}-{uuid.uuid4().hex[:8]}"
                warn(f"{error} Set aside as {aside.name}; going on with the one before it.")
                (self.root / name).rename(aside)
            else:
                return name
        return None

    def has(self, name: str) -> bool:
        return (self.root / name / _MANIFEST).is_file()

    def remove(self, name: str) -> None:
        """Remove an entry. A kill half-way leaves nothing that looks like one."""
        folder = self.root / name
        (folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, kind: str) -> None:
        """Remove what kills left half-written. Only for the one writer of this store."""
        folder = self.root / kind
        for leftover in folder.glob(f"{_STAGING}*") if folder.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
