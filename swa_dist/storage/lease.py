"""Who may write: a lease with a generation number, on disk or on S3, kept by a heartbeat.

A lease is a small JSON object that is only ever replaced on condition that it is still the one that was read. Each
holder has a generation of its own, one more than the holder before it: one that was paused while another took over
sees a higher number at its next write, and is refused. Whether a holder is alive is told by the storage's own clock,
never by comparing the clocks of two machines; one on this very machine, by its process.
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
from typing import Protocol

import psutil

from swa_dist.errors import BusyError, CheckpointError, SwaDistError
from swa_dist.storage.files import write_atomic, writing

TTL_SECONDS = 60.0
"""A holder that shows no sign of life for so long has lost its lease to whoever asks."""
_BEATS_PER_TTL = 4
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Seen:
    """A register's object as it was read."""

    content: bytes
    version: str
    """Changes with the content."""
    age_seconds: float
    """Since it was written, by the storage's own clock alone."""


class Register(Protocol):
    """A place for one small object that is replaced on condition."""

    def look(self) -> Seen | None: ...

    def swap(self, content: bytes, version: str | None) -> str | None:
        """Write if the object is still of this version (None: if there is none); the new version, or None if not."""


@dataclass(frozen=True)
class DiskRegister:
    """A file. A lock beside it, held for a moment, makes looking and writing one act, also over NFS."""

    path: Path

    def look(self) -> Seen | None:
        try:
            content, written = self.path.read_bytes(), self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        probe = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        with writing(self.path):
            probe.touch()  # tells the time of the file server, not of this machine
            now = probe.stat().st_mtime
            probe.unlink()
        return Seen(content, hashlib.sha256(content).hexdigest(), now - written)

    def swap(self, content: bytes, version: str | None) -> str | None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f"{self.path.name}.lock").open("a")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.look()
            if (None if found is None else found.version) != version:
                return None
            write_atomic(self.path, content)
        return hashlib.sha256(content).hexdigest()


class Lease:
    """A lease that is held. Its heartbeat runs in a thread until `release`."""

    def __init__(self, register: Register, what: str, generation: int, version: str, ttl_seconds: float) -> None:
        self.generation = generation
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
                self._register.swap(_Record(self.generation, None).to_json(self._what), self._version)

    def _beat(self) -> None:
        while not self._ended.wait(self._ttl_seconds / _BEATS_PER_TTL):
            try:
                mine = _Record(self.generation, _Holder.this_process())
                version = self._register.swap(mine.to_json(self._what), self._version)
                if version is None and not self._is_mine():
                    self._lost.set()
                    return
                self._version = version or self._version
            except (SwaDistError, OSError):
                continue  # storage that is away for a moment; if it is for long, the next write says so

    def _is_mine(self) -> bool:
        """Whether the object is of this generation after all: a write whose answer was lost did happen."""
        seen = self._register.look()
        if seen is None or _read(seen).generation != self.generation:
            return False
        self._version = seen.version
        return True


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
    if url.startswith("s3://"):
        from swa_dist.storage.s3 import Prefix, S3Register  # boto3 is for those who use it

        parent, _, name = url.rpartition("/")
        return S3Register(Prefix(parent), name)
    return DiskRegister(Path(url))


def guard(register: Register, what: str, generation: int) -> Callable[[], None]:
    """A check to make before a write: raises BusyError where the lease is of a later generation than this one."""

    def check() -> None:
        seen = register.look()
        if seen is None:
            raise BusyError(f"{what} must be leased to be written, but its lease is gone. Start it again.")
        record = _read(seen)
        if record.generation != generation:
            raise BusyError(
                f"{what} must be written by the holder of its lease, but {record.holder} has taken it over (generation"
                f" {record.generation} after {generation}). Nothing was written; let that one go on."
            )

    return check


def _acquire(register: Register, what: str, say: Callable[[str], None], ttl_seconds: float) -> Lease:
    watched: str | None = None  # the version that was first seen of a holder that may be dead
    deadline = 0.0
    while True:
        seen = register.look()
        record = _Record(generation=0, holder=None) if seen is None else _read(seen)
        now, holder = time.monotonic(), record.holder
        free = seen is None or holder is None or holder.is_dead() or seen.age_seconds > ttl_seconds
        if free or (watched is not None and now > deadline):  # also where the storage's clock stands still
            mine = _Record(record.generation + 1, _Holder.this_process())
            version = register.swap(mine.to_json(what), None if seen is None else seen.version)
            if version is not None:
                return Lease(register, what, mine.generation, version, ttl_seconds)
            watched = None  # another was faster; who it is, the next look tells
            continue
        assert seen is not None
        assert holder is not None
        if holder.is_here() or (watched is not None and seen.version != watched):
            raise BusyError(f"{what} must not be running already, but is: {holder}. Wait for it, or stop it.")
        if watched is None:
            watched, deadline = seen.version, now + ttl_seconds
            say(f"{what} is held by {holder}; waiting up to {ttl_seconds:.0f} s for a sign of life")
        time.sleep(min(_POLL_SECONDS, ttl_seconds / _BEATS_PER_TTL))


@dataclass(frozen=True)
class _Holder:
    """A process, told apart so that others on its machine can see whether it is alive."""

    host: str
    boot: str
    processes: str
    """The namespace of process numbers: containers of one machine number their processes apart."""
    pid: int
    started: float

    @classmethod
    def this_process(cls) -> "_Holder":
        return cls(
            host=socket.gethostname(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            processes=os.readlink("/proc/self/ns/pid"),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
        )

    def is_here(self) -> bool:
        """Whether its process number means something on this machine."""
        mine = _Holder.this_process()
        return (self.host, self.boot, self.processes) == (mine.host, mine.boot, mine.processes)

    def is_dead(self) -> bool:
        """Whether it is known to be; of a process elsewhere that isn't known."""
        if not self.is_here():
            return False
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class _Record:
    generation: int
    holder: _Holder | None

    def to_json(self, what: str) -> bytes:
        beat = uuid.uuid4().hex  # makes each beat another version
        return json.dumps(asdict(self) | {"what": what, "beat": beat}, indent=1).encode()


def _read(seen: Seen) -> _Record:
    try:
        found = json.loads(seen.content)
        holder = None if found["holder"] is None else _Holder(**found["holder"])
        return _Record(int(found["generation"]), holder)
    except (ValueError, TypeError, KeyError):
        raise CheckpointError("a lease must hold JSON with a generation, but does not. Remove the file.") from None
