"""Who may write: a lease with a generation number, on disk or on S3, kept by a heartbeat.

A lease is a small JSON object that is only ever replaced on condition that it is still the one that was read. Each
holder has a generation of its own, one more than the holder before it: one that was paused while another took over
sees a higher number at its next write, and is refused. Whether a holder is alive is told by the storage's own clock,
never by comparing the clocks of two machines; of one on this very machine, by its process alone.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

from swa_dist.errors import BusyError, CheckpointError, SwaDistError
from swa_dist.storage.files import write_atomic, writing
from swa_dist.storage.folder import is_s3

TTL_SECONDS = 60.0
"""A holder elsewhere that shows no sign of life for so long has lost its lease to whoever asks."""
_BEATS_PER_TTL = 4
_POLL_SECONDS = 1.0
_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Seen:
    """A register's object as it was read."""

    content: bytes
    version: str
    """Changes with the content."""
    age_seconds: float
    """Since it was written, by the storage's own clock alone."""


class Register(Protocol):
    """A place for one small object that is replaced on condition. As a string, its path or address."""

    def look(self) -> Seen | None: ...

    def swap(self, content: bytes, version: str | None) -> str | None:
        """Write if the object is still of this version (None: if there is none); the new version, or None if not."""


@dataclass(frozen=True)
class DiskRegister:
    """A file. A lock beside it, held for a moment, makes looking and writing one act, also over NFS."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def look(self) -> Seen | None:
        content = self._read()
        if content is None:
            return None
        with writing(self.path):
            written = self.path.stat().st_mtime
            self._lock_path.touch()  # tells the time of the file server, not of this machine
            now = self._lock_path.stat().st_mtime
        return Seen(content, _version(content), now - written)

    def swap(self, content: bytes, version: str | None) -> str | None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._lock_path.open("a")
        with lock:
            self._lock(lock)
            try:
                found = self._read()
                if (None if found is None else _version(found)) != version:
                    return None
                write_atomic(self.path, content)
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # by itself it would last as long as a child forked meanwhile
        return _version(content)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.lock")

    def _read(self) -> bytes | None:
        with writing(self.path):
            try:
                return self.path.read_bytes()
            except FileNotFoundError:
                return None

    def _lock(self, lock: IO[str]) -> None:
        """Raises BusyError rather than wait for good for a process that was paused while it had the lock."""
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"{self._lock_path} must be free within {_LOCK_SECONDS:.0f} s, but a process has it locked."
                        " Find out which (`lslocks`), and end it if it is paused."
                    ) from None
                time.sleep(0.01)
            else:
                return


class Lease:
    """A lease that is held. Its heartbeat runs in a thread until `release`."""

    def __init__(self, register: Register, what: str, generation: int, version: str, ttl_seconds: float) -> None:
        self.generation = generation
        self._holder = _Holder.this_process()
        self._register = register
        self._what = what
        self._version = version
        self._ttl_seconds = ttl_seconds
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether a heartbeat found that another process has taken over."""
        return self._lost.is_set()

    def release(self) -> None:
        """Let another process have it, at once."""
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(SwaDistError, OSError):  # it then runs out by itself
                self._write(None)

    def _beat(self) -> None:
        while not self.lost and not self._ended.wait(self._ttl_seconds / _BEATS_PER_TTL):
            # Storage that is away for a moment; if it is for long, the next write says so. Whatever else goes wrong,
            # a heart that stopped unnoticed would be worse.
            with contextlib.suppress(Exception):
                self._write(self._holder)

    def _write(self, holder: "_Holder | None") -> None:
        """Replace the record by one of this generation, or find that the lease is lost."""
        content = _Record(self.generation, holder).to_json(self._what)
        while (version := self._register.swap(content, self._version)) is None:
            # Perhaps it is still this one's: a write whose answer was lost did happen.
            seen = self._register.look()
            if seen is None or (seen.content != content and not self._is_mine(seen)):
                self._lost.set()
                return
            self._version = seen.version
            if seen.content == content:
                return
        self._version = version

    def _is_mine(self, seen: Seen) -> bool:
        record = _read(self._register, seen)
        return (record.generation, record.holder) == (self.generation, self._holder)


@contextlib.contextmanager
def hold(
    register: Register, what: str, say: Callable[[str], None], *, ttl_seconds: float = TTL_SECONDS
) -> Iterator[Lease]:
    """Within the block this process alone may do `what` ("the run with key 0123"). Raises BusyError, naming the holder,
    where another process that shows signs of life holds it; waits up to `ttl_seconds` for one where that isn't clear.
    """
    lease = _acquire(register, what, say, ttl_seconds)
    try:
        yield lease
    finally:
        lease.release()


def register(url: str) -> Register:
    """The lease at a path, or an address on S3."""
    if is_s3(url):
        from swa_dist.storage.s3 import S3Register  # boto3 is for those who use it

        return S3Register.at(url)
    return DiskRegister(Path(url))


def guard(register: Register, what: str, generation: int) -> Callable[[], None]:
    """A check to make before a write: raises BusyError where the lease is of a later generation than this one."""

    def check() -> None:
        seen = register.look()
        if seen is None:
            raise BusyError(f"{what} must be leased to be written, but its lease is gone. Start it again.")
        record = _read(register, seen)
        if record.generation != generation:
            raise BusyError(
                f"{what} must be written by the holder of its lease, but {record.holder or 'another'} has taken it over"
                f" (generation {record.generation} after {generation}). Nothing was written; let that one go on."
            )

    return check


def _acquire(register: Register, what: str, say: Callable[[str], None], ttl_seconds: float) -> Lease:
    watched: str | None = None  # the version that was first seen of a holder that may be dead
    deadline = 0.0
    while True:
        now, seen = time.monotonic(), register.look()
        record = _Record(generation=0, holder=None) if seen is None else _read(register, seen)
        holder = record.holder
        if seen is None or holder is None or _is_gone(holder, seen, ttl_seconds, watched, now > deadline):
            taken = _take(register, what, seen, record.generation + 1, ttl_seconds)
            if taken is not None:
                return taken
            watched = None  # another was faster; who it is, the next look tells
            continue
        if holder.is_alive() or (watched is not None and seen.version != watched):
            raise BusyError(f"{what} must not be running already, but is: {holder}. Wait for it, or stop it.")
        if watched is None:
            watched, deadline = seen.version, time.monotonic() + ttl_seconds
            say(f"{what} is held by {holder}; waiting up to {ttl_seconds:.0f} s for a sign of life")
        time.sleep(min(_POLL_SECONDS, ttl_seconds / _BEATS_PER_TTL))


def _is_gone(holder: "_Holder", seen: Seen, ttl_seconds: float, watched: str | None, waited: bool) -> bool:
    """Whether a holder has ended or, where that can't be known, has shown no sign of life for its time. Watching it is
    for storage whose clock stands still."""
    alive = holder.is_alive()
    if alive is not None:
        return not alive
    return seen.age_seconds > ttl_seconds or (waited and seen.version == watched)


def _take(register: Register, what: str, seen: Seen | None, generation: int, ttl_seconds: float) -> Lease | None:
    """The lease, or None where the record is another than was seen."""
    content = _Record(generation, _Holder.this_process()).to_json(what)
    version = register.swap(content, None if seen is None else seen.version)
    if version is None:
        found = register.look()
        if found is None or found.content != content:
            return None
        version = found.version  # a write whose answer was lost did happen
    return Lease(register, what, generation, version, ttl_seconds)


@dataclass(frozen=True)
class _Holder:
    """A process, told apart so that others on its machine can see whether it is alive."""

    host: str
    boot: str
    processes: str
    """The namespace of process numbers: containers of one machine number their processes apart."""
    pid: int
    started: int
    """In ticks since the machine's start: a clock that is set doesn't change it."""

    @classmethod
    def this_process(cls) -> "_Holder":
        return cls(
            host=socket.gethostname(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            processes=os.readlink("/proc/self/ns/pid"),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
        )

    def is_alive(self) -> bool | None:
        """None of a process elsewhere, or of another user's that is hidden: that isn't known."""
        mine = _Holder.this_process()
        if (self.host, self.boot, self.processes) != (mine.host, mine.boot, mine.processes):
            return None
        try:
            return _started(self.pid) == self.started
        except PermissionError:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class _Record:
    generation: int
    holder: _Holder | None

    def to_json(self, what: str) -> bytes:
        beat = uuid.uuid4().hex  # makes each beat another version
        return json.dumps(asdict(self) | {"what": what, "beat": beat}, indent=1).encode()


def _read(register: Register, seen: Seen) -> _Record:
    try:
        found = json.loads(seen.content)
        who = found["holder"]
        if who is not None:
            who = _Holder(who["host"], who["boot"], who["processes"], int(who["pid"]), int(who["started"]))
        return _Record(int(found["generation"]), who)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise CheckpointError(
            f"a lease must hold JSON with a generation, but {register} does not. Remove it."
        ) from None


def _started(pid: int) -> int | None:
    """When a process started, or None if it has ended. Raises PermissionError where it is hidden (`hidepid`)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
        return None
    state, *numbers = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(numbers[18])


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
