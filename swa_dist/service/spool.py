"""The spool: on disk, what a run has to tell MLflow, in order, until it is sent."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from swa_dist.errors import ServiceError
from swa_dist.storage.files import read_json, write_atomic, writing

Event = dict[str, Any]

SPOOL_FILES = ("spool.jsonl", "spool.sent.json", "spool.target.json")
_LOCK_SECONDS = 30.0  # longer than a request
_TAIL_BYTES = 65_536  # longer than an event


@dataclass(frozen=True)
class Target:
    """The MLflow run that a spool belongs to. The tags name it: it is found by them or made with them."""

    uri: str
    experiment: str
    run_name: str
    run_key: str
    first_attempt: int
    """The attempt that began this state: a run that was started over is another MLflow run."""


class Spool:
    """A file of events, one JSON object a line, only ever appended to, and beside it the number sent.

    Of a run on S3, `mirror` puts there the file of a name, which has changed, and `fetch` gets one from there.
    """

    def __init__(
        self,
        folder: Path,
        mirror: Callable[[str], None] = lambda name: None,
        fetch: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.folder = folder
        self.fetch = fetch
        self._mirror = mirror
        self.events, self._sent, self._target = (folder / name for name in SPOOL_FILES)
        self._lock = folder / "spool.lock"

    def open(self, target: Target) -> None:
        write_atomic(self._target, json.dumps(asdict(target), indent=1))
        self._mirror(self._target.name)

    @property
    def target(self) -> Target:
        facts = read_json(self._target)
        if facts is None:
            raise ServiceError(f"`RUN` must be the folder of a run, but {self.events.parent} has no spool.")
        return Target(**facts)

    def append(self, *events: Event) -> None:
        with writing(self.events), self.events.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # or another writer's line could be cut before it is whole
            with _unlocking(file):
                _cut_half_line(file)
                file.writelines((json.dumps(event) + "\n").encode() for event in events)
                file.flush()
                os.fsync(file.fileno())
        self._mirror(self.events.name)

    def read(self) -> list[Event]:
        if not self.events.is_file():
            return []
        lines = self.events.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one short

    @property
    def num_sent(self) -> int:
        return (read_json(self._sent) or {"num_sent": 0})["num_sent"]  # type: ignore[no-any-return]

    def mark_sent(self, num_sent: int) -> None:
        """So many were sent. It never goes back."""
        if num_sent > self.num_sent:
            write_atomic(self._sent, json.dumps({"num_sent": num_sent}))
            self._mirror(self._sent.name)

    def waiting(self) -> list[Event]:
        return self.read()[self.num_sent :]

    @contextlib.contextmanager
    def one_sender(self) -> Iterator[None]:
        """Keep other senders out, of this process and others: an older status must not arrive after a newer one, nor
        a model twice. Raises ServiceError where another sends for long."""
        with writing(self._lock):
            file = self._lock.open("a")
        deadline = time.monotonic() + _LOCK_SECONDS
        with file:
            while not _is_locked(file):
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"{self.events} must be sent by one process at a time, but another has been at it for"
                        f" {_LOCK_SECONDS:.0f} s. Wait for it, or find it (`lslocks`) and end it."
                    )
                time.sleep(0.05)
            with _unlocking(file):
                yield


@contextlib.contextmanager
def _unlocking(file: IO[Any]) -> Iterator[None]:
    """Unlock it at the end: closing alone leaves it locked for as long as a child lives that was forked meanwhile."""
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _is_locked(file: IO[Any]) -> bool:
    """Whether the file is this one's now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _cut_half_line(file: BinaryIO) -> None:
    """Cut off what a kill left of a last line: the next event must not be glued to it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read()
    whole = tail.rfind(b"\n") + 1
    if whole or size <= _TAIL_BYTES:
        file.truncate(size - len(tail) + whole)
