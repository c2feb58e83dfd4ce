"""Files on disk that are wholly there or not there: digests, atomic writes, JSON."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swa_dist.errors import CheckpointError, OutputError

STAGING = ".staging-"


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` so that a reader, or a crash, meets the old file or the new one and nothing between."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.parent / f"{STAGING}{path.name}-{uuid.uuid4().hex}"
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
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends, replacing one of that name; or nothing does."""
    staged = target.parent / f"{STAGING}{target.name}-{uuid.uuid4().hex}"
    with writing(target):
        staged.mkdir(parents=True)
        try:
            yield staged
            _sync_folder(staged)
            old = target.parent / f"{STAGING}{target.name}-old-{uuid.uuid4().hex}"
            if target.exists():
                target.rename(old)
            staged.rename(target)
            _sync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
