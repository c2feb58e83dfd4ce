"""One holder at a time, on disk and on S3: races, deaths, pauses, lost answers, clocks that are wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swa_dist.errors import BusyError, CheckpointError
from swa_dist.storage import folder, lease
from swa_dist.storage.lease import guard, hold

TTL = 1.0
LONG = 30.0  # where it is not to be waited for

# Holds the lease, as if on a machine of the name that is given, until it is ended.
HOLD = """
import sys, time
from swa_dist.errors import BusyError
from swa_dist.storage import lease

url, host, ttl, seconds, clock = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])
if host:
    lease.socket.gethostname = lambda: host
now = time.time
time.time = lambda: now() + clock
try:
    with lease.hold(lease.register(url), "the run", lambda line: print(line, flush=True), ttl_seconds=ttl) as held:
        print("held", held.generation, flush=True)
        time.sleep(seconds)
        print("lost" if held.lost else "kept", flush=True)
except BusyError as error:
    print("busy", error, flush=True)
"""


@pytest.fixture(params=["disk", "s3"])
def url(request, tmp_path):
    return str(tmp_path / "runs" / ".lease") if request.param == "disk" else request.getfixturevalue("s3") + "/.lease"


@pytest.fixture
def start(url):
    """Start a process that holds the lease; it is ended with the test."""
    processes = []

    def start_one(*, host="", seconds=60.0, clock=0.0, ttl=TTL):
        arguments = [sys.executable, "-c", HOLD, url, host, str(ttl), str(seconds), str(clock)]
        processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def says(process):
    return process.stdout.readline().strip()


def take(url, ttl=TTL):
    """Take the lease, let it go, and return its generation."""
    with hold(lease.register(url), "the run", lambda line: None, ttl_seconds=ttl) as held:
        return held.generation


def test_one_after_another_each_has_a_higher_generation(url):
    assert [take(url) for _ in range(3)] == [1, 2, 3]


def test_a_second_process_here_is_told_at_once_who_holds_it(url, start):
    holder = start(ttl=LONG)
    assert says(holder) == "held 1"
    began = time.monotonic()
    message = rf"the run must not be running already, but is: process {holder.pid} on"
    with pytest.raises(BusyError, match=message) as caught:
        take(url, LONG)
    assert time.monotonic() - began < LONG / 2
    assert caught.value.exit_code == 75


def test_a_process_here_that_was_killed_is_followed_at_once(url, start):
    holder = start(ttl=LONG)
    says(holder)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is left a zombie, which is dead too
    began = time.monotonic()
    assert take(url, LONG) == 2
    assert time.monotonic() - began < LONG / 2


def test_a_dead_one_elsewhere_is_followed_after_its_time_and_not_before(url, start):
    holder = start(host="elsewhere")
    says(holder)
    holder.kill()
    holder.wait()
    died = time.monotonic()
    assert take(url) == 2
    assert TTL / 2 < time.monotonic() - died < 10 * TTL


@pytest.mark.parametrize("clock", [0.0, 3600.0, -3600.0])
def test_a_living_one_elsewhere_keeps_it_whatever_its_clock_says(url, start, clock):
    holder = start(host="elsewhere", clock=clock)
    assert says(holder) == "held 1"
    waiting = start(seconds=0)
    assert "is held by process" in says(waiting)
    assert says(waiting).startswith("busy the run must not be running already, but is: process")
    assert holder.poll() is None


def test_a_living_one_keeps_it_for_many_times_its_time(url, start):
    holder = start(host="elsewhere", seconds=4 * TTL)
    says(holder)
    assert says(holder) == "kept"


def test_one_that_was_paused_and_followed_knows_it_lost_and_writes_no_more(url, start):
    holder = start(host="elsewhere", seconds=3 * TTL)
    says(holder)
    check = guard(lease.register(url), "the run", generation=1)
    check()
    holder.send_signal(signal.SIGSTOP)
    with hold(lease.register(url), "the run", lambda line: None, ttl_seconds=TTL) as held:
        assert held.generation == 2
        with pytest.raises(BusyError, match=rf"process {os.getpid()} on .* has taken it over \(generation 2 after 1\)"):
            check()
        holder.send_signal(signal.SIGCONT)
        assert says(holder) == "lost"
        holder.wait()
        guard(lease.register(url), "the run", generation=2)()
        assert not held.lost
    assert take(url) == 3


def test_of_many_at_once_one_has_it(url, tmp_path):
    """Each holds it three times for a moment; a file that only one can make tells whether another has it."""
    journal = tmp_path / "journal"
    processes = [
        subprocess.Popen([sys.executable, "-c", RACE, url, str(journal), str(tmp_path / "only")]) for _ in range(6)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * 6
    generations = [int(line) for line in journal.read_text().split()]
    assert len(generations) == 6 * 3
    assert generations == sorted(set(generations))


RACE = """
import os, random, sys, time
from swa_dist.errors import BusyError
from swa_dist.storage import lease

url, journal, only = sys.argv[1:]
held_times = 0
while held_times < 3:
    try:
        with lease.hold(lease.register(url), "x", lambda line: None, ttl_seconds=30) as held:
            handle = os.open(only, os.O_CREAT | os.O_EXCL)
            with open(journal, "a") as file:
                file.write(f"{held.generation}\\n")
            os.close(handle)
            os.unlink(only)
        held_times += 1
    except BusyError:
        time.sleep(random.random() / 50)
"""


def test_a_beat_whose_answer_was_lost_keeps_the_lease(url):
    class Deaf:
        """A register whose every second write happens, and seems not to have."""

        def __init__(self, inner):
            self._inner, self._writes, self.look = inner, 0, inner.look

        def swap(self, content, version):
            self._writes += 1
            written = self._inner.swap(content, version)
            return None if self._writes % 2 == 0 else written

    with hold(Deaf(lease.register(url)), "the run", lambda line: None, ttl_seconds=0.4) as held:
        time.sleep(2)
        assert not held.lost


def test_storage_that_is_away_for_a_moment_costs_no_lease(url):
    class Away:
        """A register that fails, from its second write on, for as long as it is told to."""

        def __init__(self, inner):
            self._inner, self.away, self.look = inner, False, inner.look

        def swap(self, content, version):
            if self.away:
                raise OSError("away")
            return self._inner.swap(content, version)

    register = Away(lease.register(url))
    with hold(register, "the run", lambda line: None, ttl_seconds=0.4) as held:
        register.away = True
        time.sleep(0.6)
        register.away = False
        time.sleep(0.4)
        assert not held.lost
        guard(register, "the run", held.generation)()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"generation": 1}', b'{"generation": "x", "holder": null}'])
def test_a_lease_that_is_none_is_named(url, content):
    folder.write(url, content)
    with pytest.raises(CheckpointError, match="a lease must hold"):
        take(url)


def test_a_lease_that_is_gone_lets_nothing_be_written(url):
    with pytest.raises(BusyError, match="its lease is gone"):
        guard(lease.register(url), "the run", generation=1)()


def test_it_says_for_people_who_holds_it(url, start):
    holder = start()
    says(holder)
    record = json.loads(folder.read(url))
    assert (record["what"], record["generation"], record["holder"]["pid"]) == ("the run", 1, holder.pid)
    assert Path(f"/proc/{holder.pid}").exists()
