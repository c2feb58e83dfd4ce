"""The folders of runs under an address, and their removal so that a kill leaves none that looks like a run."""

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from swa_dist.service.layout import ATTEMPT, SUMMARY
from swa_dist.service.spool import SPOOL_FILES
from swa_dist.storage.files import writing
from swa_dist.storage.folder import is_s3
from swa_dist.storage.lease import Seen
from swa_dist.storage.store import MANIFEST

_RUN = re.compile(r"swa-[0-9a-f]{12}(\.attempt-\d+(-\d+)?)?")
_REMOVING = ".removing-"
_FLAG = "removing"


class Runs(Protocol):
    """The folders of runs under an address. What a kill leaves of a removal is no run, and is found by `remains`."""

    url: str

    def names(self) -> list[str]: ...

    def look(self, name: str, file: str) -> Seen | None: ...

    def size(self, name: str) -> int: ...

    def begin(self, name: str) -> None:
        """Make a finished run no run, and no state that one could go on from: all at once."""

    def remains(self) -> list[str]:
        """The runs whose removal was begun."""

    def is_remains(self, name: str) -> bool: ...

    def clear(self, name: str) -> None:
        """Remove what is left after `begin`. Can be killed and called again."""


def open_runs(url: str) -> Runs:
    return _S3Runs(url) if is_s3(url) else _DiskRuns(url)


class _DiskRuns:
    """Renamed, which is one act, and then removed; attempt.json goes last, as the mark that it is ours to remove."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = Path(url)

    @functools.cached_property
    def _now(self) -> float:
        """By the file server's clock."""
        with tempfile.TemporaryFile(dir=self._root) as probe:
            return os.fstat(probe.fileno()).st_mtime

    def names(self) -> list[str]:
        return self._folders("")

    def _folders(self, before: str) -> list[str]:
        with os.scandir(self._root) as entries:
            real = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return sorted(n[len(before) :] for n in real if n.startswith(before) and _RUN.fullmatch(n[len(before) :]))

    def look(self, name: str, file: str) -> Seen | None:
        path = self._root / name / file
        try:
            content, written = path.read_bytes(), path.stat()
        except FileNotFoundError:
            return None
        return Seen(content, str(written.st_mtime_ns), self._now - written.st_mtime)

    def size(self, name: str) -> int:
        return sum(
            os.lstat(os.path.join(folder, file)).st_size
            for folder, _, files in os.walk(self._root / name)
            for file in files
        )

    def begin(self, name: str) -> None:
        with writing(self._root / name):
            (self._root / name).rename(self._root / f"{_REMOVING}{name}")

    def remains(self) -> list[str]:
        return [name for name in self._folders(_REMOVING) if self.is_remains(name)]

    def is_remains(self, name: str) -> bool:
        folder = self._root / f"{_REMOVING}{name}"
        return folder.is_dir() and ((folder / ATTEMPT).is_file() or not any(folder.iterdir()))

    def clear(self, name: str) -> None:
        folder = self._root / f"{_REMOVING}{name}"
        with writing(folder):
            for path in sorted(folder.iterdir(), key=lambda path: path.name == ATTEMPT):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            folder.rmdir()


class _S3Runs:
    """There is no renaming on S3. attempt.json is flagged, and from the request on that takes the summary, the spool
    and all manifests away, the folder is neither a finished run nor a state to go on from; attempt.json goes last.

    A run that is begun in what a kill left writes attempt.json anew: without the flag, it is nobody's to remove. The
    flagged one tells it to be another MLflow run than the one whose events are gone.
    """

    def __init__(self, url: str) -> None:
        from swa_dist.storage.s3 import Prefix  # boto3 is for those who use it

        self.url = url
        self._prefix = Prefix(url)

    def names(self) -> list[str]:
        found = {name.partition("/")[0] for name in self._prefix.names("swa-") if "/" in name}
        return sorted(name for name in found if _RUN.fullmatch(name))

    def look(self, name: str, file: str) -> Seen | None:
        return self._prefix.look(f"{name}/{file}")

    def size(self, name: str) -> int:
        """Of the committed entries alone, which is nearly all."""
        manifests = [one for one in self._prefix.names(f"{name}/") if one.endswith(f"/{MANIFEST}")]
        return sum(listed_bytes(_json(self._prefix.read(one))) for one in manifests)

    def begin(self, name: str) -> None:
        found = self._prefix.names(f"{name}/")
        attempt = (_json(self._prefix.read(f"{name}/{ATTEMPT}")) or {}).get("attempt", 0)
        flagged = {"attempt": attempt, "first_attempt": attempt + 1, _FLAG: True}
        self._prefix.write(f"{name}/{ATTEMPT}", json.dumps(flagged).encode())
        marks = [f"{name}/{one}" for one in (SUMMARY, *SPOOL_FILES)]
        self._prefix.remove(*marks, *(one for one in found if one.endswith(f"/{MANIFEST}")))

    def remains(self) -> list[str]:
        found = set(self._prefix.names("swa-"))
        return [name for name in self.names() if f"{name}/{SUMMARY}" not in found and self.is_remains(name)]

    def is_remains(self, name: str) -> bool:
        attempt = _json(self._prefix.read(f"{name}/{ATTEMPT}"))
        return bool((attempt or {}).get(_FLAG)) and not self._prefix.has(f"{name}/{SUMMARY}")

    def clear(self, name: str) -> None:
        self._prefix.abort_uploads(f"{name}/")
        attempt = f"{name}/{ATTEMPT}"
        self._prefix.remove(*(one for one in self._prefix.names(f"{name}/") if one != attempt))
        self._prefix.remove(attempt)


def _json(content: bytes | None) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        value = json.loads(content or b"")
        return value if isinstance(value, dict) else None
    return None


def listed_bytes(manifest: dict[str, Any] | None) -> int:
    """Of the files of an entry; 0 where its manifest doesn't say."""
    try:
        return sum(int(facts["bytes"]) for facts in (manifest or {})["files"].values())
    except (KeyError, TypeError, ValueError, AttributeError):
        return 0
