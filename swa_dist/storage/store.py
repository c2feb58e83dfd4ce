"""Committed entries: named folders of files with a manifest, each wholly there or not there."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from swa_dist.errors import CheckpointError
from swa_dist.storage.files import STAGING, new_folder, read_json, sha256_file, sync_file

MANIFEST = "manifest.json"

_CORRUPT = ".corrupt-"


class Store(Protocol):
    """Committed entries. One process writes to a store at a time; entries are named like "checkpoints/000000000512"."""

    def commit(self, name: str, fill: Callable[[Path], None]) -> None:
        """Make the entry `name` of the files that `fill` writes into a folder.

        An entry of that name that is there already is replaced. Raises OutputError or ServiceError, and BusyError where
        another process has taken the run over; then nothing has changed.
        """

    def open(self, name: str) -> Path:
        """The folder of the entry `name`, verified. Raises CheckpointError naming the file that is not whole."""

    def names(self, kind: str) -> list[str]:
        """The entries of one kind ("checkpoints"), in the order of their names, unverified."""

    def set_aside(self, name: str) -> str:
        """Make a damaged entry no entry, without deleting it; what it is called now."""

    def has(self, name: str) -> bool: ...

    def remove(self, name: str) -> None:
        """Remove an entry. A kill half-way leaves nothing that looks like one."""

    def sweep(self, kind: str) -> None:
        """Remove what kills left half-written. Only for the one writer of this store."""


def newest(store: Store, kind: str, warn: Callable[[str], None]) -> str | None:
    """The last valid entry of a kind. Damaged ones are named to `warn` and set aside, not deleted."""
    for name in reversed(store.names(kind)):
        try:
            store.open(name)
        except CheckpointError as error:
            warn(f"{error} Set aside as {store.set_aside(name)}; going on with the one before it, if there is one.")
        else:
            return name
    return None


class DiskStore:
    """Entries in a folder on disk. `guard` is asked before each change, and raises where it must not be made.

    An entry is written aside, hashed and renamed; what a kill leaves half-written is never an entry. Entries are
    verified against their hashes when opened, since neither torch.load nor safetensors notices a flipped bit.
    """

    def __init__(self, root: Path, guard: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self._guard = guard

    def commit(self, name: str, fill: Callable[[Path], None]) -> None:
        with new_folder(self.root / name) as folder:
            fill(folder)
            files = {}
            for path in sorted(folder.iterdir()):
                sync_file(path)
                files[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            manifest = folder / MANIFEST
            manifest.write_text(json.dumps({"schema": 1, "files": files}, indent=1), encoding="utf-8")
            sync_file(manifest)
            self._guard()

    def open(self, name: str) -> Path:
        folder = self.root / name
        manifest = read_json(folder / MANIFEST)
        if manifest is None:
            raise CheckpointError(f"{folder} must be a committed entry, but has no {MANIFEST}.")
        try:
            expected = {folder / file: (facts["bytes"], facts["sha256"]) for file, facts in manifest["files"].items()}
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{folder / MANIFEST} must list files, but does not: it is damaged.") from None
        for path, (size, digest) in expected.items():
            if not path.is_file():
                raise CheckpointError(f"{path} must be there, but is not.")
            if path.stat().st_size != size or _hash(path) != digest:
                raise CheckpointError(f"{path} must have SHA-256 {digest}, but has not: it is damaged.")
        return folder

    def names(self, kind: str) -> list[str]:
        folder = self.root / kind
        if not folder.is_dir():
            return []
        return [f"{kind}/{path.name}" for path in sorted(folder.iterdir()) if not path.name.startswith(".")]

    def set_aside(self, name: str) -> str:
        self._guard()
        aside = f"{_CORRUPT}{Path(name).name}-{uuid.uuid4().hex[:8]}"
        (self.root / name).rename(self.root / Path(name).parent / aside)
        return aside

    def has(self, name: str) -> bool:
        return (self.root / name / MANIFEST).is_file()

    def remove(self, name: str) -> None:
        self._guard()
        folder = self.root / name
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, kind: str) -> None:
        self._guard()
        folder = self.root / kind
        for leftover in folder.glob(f"{STAGING}*") if folder.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} must be readable, but is not: {error.strerror}.") from None
