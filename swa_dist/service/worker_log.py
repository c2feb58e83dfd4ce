"""One worker's log: a file in the run's folder that says what the worker did, however it ended."""

import contextlib
import faulthandler
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from types import TracebackType

from swa_dist.errors import SwaDistError
from swa_dist.storage.folder import Folder

_LINE_EVERY_SECONDS = 10.0
_REARM_SECONDS = 1.0
_PUSH_EVERY_SECONDS = 30.0
_END_BYTES = 2**18

# What faulthandler writes begins at the left, as nothing that is said does.
_SAID = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z |  ")
_STACKS_BEGIN = re.compile(r"Timeout \(|Fatal Python error: ")
_STACKS = re.compile(r"(Current t|T)hread 0x|Extension modules: ")


def log_folder(attempt: int) -> str:
    return f"logs/a{attempt}"


def log_name(attempt: int, rank: int) -> str:
    """Of the file, in the run's folder."""
    return f"{log_folder(attempt)}/rank-{rank}.log"


@dataclass(frozen=True)
class Ending:
    """What the end of a worker's log says."""

    said: list[str]
    """Lines, without those of stacks."""
    stacks: list[str]
    """Lines of the last dump, of a hang or of a crash; empty where there is none."""
    said_more: bool
    """Whether the worker said more after that dump: that it went on, or what ended it."""


def ending(text: str) -> Ending:
    """Of the end of a worker's log, which may begin anywhere in a line."""
    said: list[str] = []
    stacks: list[str] = []
    in_stacks = said_more = False
    for line in text.splitlines():
        if _STACKS_BEGIN.match(line):
            stacks, in_stacks, said_more = [], True, False
        elif _STACKS.match(line):  # goes on after what another thread said
            in_stacks = True
        elif _SAID.match(line) and not (in_stacks and line.startswith("  File ")):
            in_stacks = False
            said_more = said_more or bool(stacks)
        if not in_stacks:
            said.append(line)
        elif not line.startswith("Extension modules: "):
            stacks.append(line)
    return Ending(said, stacks, said_more)


def endings(folder: Folder, attempt: int) -> dict[int, Ending]:
    """Of all workers' logs, by rank; in those of S3 and in those of this process, which may be newer. Raises OSError or
    ServiceError."""
    under = log_folder(attempt)
    remote, texts = folder.remote, {}
    if remote is not None:
        texts = {_rank(name): remote.read(name) or b"" for name in remote.names(f"{under}/")}
    for path in (folder.local / under).glob("rank-*.log"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _END_BYTES))
            texts[_rank(path.name)] = file.read()
    return {rank: ending(_whole_lines(texts[rank][-_END_BYTES:])) for rank in sorted(texts) if rank >= 0}


def _rank(name: str) -> int:
    found = re.search(r"rank-(\d+)\.log$", name)
    return int(found[1]) if found else -1


def _whole_lines(tail: bytes) -> str:
    """Without half a line at its beginning: half a secret would not be known for one."""
    text = tail.decode(errors="replace")
    return text if len(tail) < _END_BYTES else text.partition("\n")[2]


class WorkerLog:
    """A context manager; within it, what a worker must leave behind is written as it happens.

    These are: what is said to it, warnings and errors of the root logger, Python's warnings, the stacks of a crash, and
    those of a hang (`alive`). Each line is one write, so that a kill loses none; all threads may say some. Of a run on
    S3 the file is put there each 30 seconds and at the end: what came after that, a kill loses.

    Nothing here raises, whatever becomes of the disk or of S3: a log never gets in the way of a run. One per process.
    """

    def __init__(self, folder: Folder, attempt: int, rank: int, world_size: int, device: object) -> None:
        self.name = log_name(attempt, rank)
        self.path = folder.local / self.name
        self._folder = folder
        self._who = f"rank {rank} of {world_size} on {device}"
        self._file: FileIO | None = None
        self._phase, self._progress, self._said = "", "", ""
        self._next_line = 0.0
        self._timeout_seconds: float | None = None
        self._next_arm = 0.0
        self._pushed_bytes = 0
        self._pushing = threading.Lock()
        self._closing = threading.Event()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "WorkerLog":
        with contextlib.suppress(SwaDistError, OSError):
            self._folder.pull(self.name)  # of a worker that was here before, in the same attempt
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(str(self.path), "ab")
        except OSError:
            return self
        self.say(f"{self._who}, host {socket.gethostname()}, process {os.getpid()}")
        self._watch_logging()
        self._watch_faults(self._file)
        if self._folder.remote is not None:
            with contextlib.suppress(RuntimeError):  # too many threads
                threading.Thread(target=self._push_now_and_then, name="worker-log", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say_progress()
        if error is None:
            self.say("ended well")
        else:
            with contextlib.suppress(Exception):  # of an error whose text raises
                self.say("ended by an error\n" + "".join(traceback.format_exception(error)))
        self.close()

    def say(self, line: str) -> None:
        """A line with the time. The further lines of one that has several are indented."""
        if self._file is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        text = line.rstrip().replace("\n", "\n  ")
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed by another thread
            self._file.write(f"{now}Z {text}\n".encode(errors="backslashreplace"))

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        """A phase has come so far. Says so at its beginning, at its end and each ten seconds. Is also `alive`."""
        self._arm()
        now = time.monotonic()
        line = f"  {phase}: {done:,} of {total:,}{', ' + note if note else ''}"
        if phase != self._phase:
            self._say_progress()  # how far the one before came
        elif done < total and now < self._next_line:
            self._progress = line
            return
        self._phase, self._progress, self._next_line = phase, line, now + _LINE_EVERY_SECONDS
        self._say_progress()

    def alive(self, timeout_seconds: float) -> None:
        """This worker goes on. Unless it says so again, or reports progress, within this time and a second, the stacks
        of all its threads are written to its log; it is not ended. Costs a microsecond, and 50 once a second."""
        if timeout_seconds != self._timeout_seconds:
            self._timeout_seconds, self._next_arm = timeout_seconds, 0.0
        self._arm()

    def flush_remote(self) -> None:
        """Put the file of a run on S3 there as it is now."""
        if self._folder.remote is None:
            return
        with self._pushing, contextlib.suppress(SwaDistError, OSError):
            size = self.path.stat().st_size
            if size != self._pushed_bytes:
                self._folder.push(self.name)
                self._pushed_bytes = size

    def close(self) -> None:
        """Leave the process as it was, and the file where others see it. May be called twice."""
        file, self._file = self._file, None
        if file is None:
            return
        if self._timeout_seconds is not None:
            faulthandler.cancel_dump_traceback_later()
        self._undo.close()
        with contextlib.suppress(OSError):
            file.close()
        self._closing.set()
        self.flush_remote()

    def _watch_logging(self) -> None:
        handler, root = _Handler(self), logging.getLogger()
        root.addHandler(handler)
        self._undo.callback(root.removeHandler, handler)
        shown_by = warnings.showwarning
        logging.captureWarnings(True)
        if warnings.showwarning is not shown_by:  # else another does so already, who goes on
            self._undo.callback(logging.captureWarnings, False)

    def _watch_faults(self, file: FileIO) -> None:
        if faulthandler.is_enabled():
            self._undo.callback(_show_faults)
        self._undo.callback(faulthandler.disable)
        faulthandler.enable(file=file.fileno())

    def _say_progress(self) -> None:
        if self._progress not in ("", self._said):
            self._said = self._progress
            self.say(self._progress)

    def _arm(self) -> None:
        now = time.monotonic()
        if self._file is None or self._timeout_seconds is None or now < self._next_arm:
            return
        self._next_arm = now + _REARM_SECONDS
        with contextlib.suppress(OverflowError, RuntimeError, ValueError):  # a time too long; too many threads
            # So much longer because what comes before the next time doesn't count.
            later = self._timeout_seconds + _REARM_SECONDS
            faulthandler.dump_traceback_later(later, file=self._file.fileno(), exit=False)

    def _push_now_and_then(self) -> None:
        while not self._closing.wait(_PUSH_EVERY_SECONDS):
            self.flush_remote()


def _show_faults() -> None:
    """On standard error, as is usual."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(ValueError, OSError):  # it may be closed
            faulthandler.enable(file=sys.__stderr__)


class _Handler(logging.Handler):
    """Writes warnings and errors to a worker's log, and leaves those that only standard error would show to it too."""

    def __init__(self, log: WorkerLog) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.say(self.format(record))
        except Exception:  # a message that doesn't fit its arguments
            self.handleError(record)
        if logging.lastResort is not None and not self._others_of(record):
            logging.lastResort.handle(record)

    def _others_of(self, record: logging.LogRecord) -> bool:
        """Whether there is a handler besides this one for the record. logging gives the logger of Python's warnings
        one that does nothing."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        found: list[logging.Handler] = []
        while logger is not None:
            found += logger.handlers
            logger = logger.parent if logger.propagate else None
        if record.name == "py.warnings":
            found = [handler for handler in found if not isinstance(handler, logging.NullHandler)]
        return any(handler is not self for handler in found)
