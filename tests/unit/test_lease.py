"""One holder at a time, on disk and on S3: races, deaths, pauses, lost answers, clocks that are wrong."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swa_dist.errors import BusyError, CheckpointError, OutputError
from swa_dist.storage import lease
from swa_dist.storage.lease import DiskRegister, guard, hold
from tests.support import Proxy

TTL = 1.5
"""Long enough that no holder seems dead because the machine is busy."""
LONG = 30.0
"""For what doesn't wait."""
SLACK = 10.0
"""Seconds, of a busy machine."""

# A process that does what it is told, line by line, and says what came of it. `clock` is how wrong its clock is.
PROCESS = """
import contextlib, os, sys, time
from swa_dist.errors import BusyError
from swa_dist.storage import lease

url, host, ttl, clock = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
if host:
    lease.socket.gethostname = lambda: host
def wrong(tell, unit):
    return lambda: tell() + type(tell())(clock * unit)
time.time, time.time_ns = wrong(time.time, 1), wrong(time.time_ns, 10**9)
register = lease.register(url)
register.look()  # makes the client of S3, which takes a moment
stack = contextlib.ExitStack()
print("ready", flush=True)
for line in sys.stdin:
    try:
        if line == "hold\\n":
            held = stack.enter_context(lease.hold(register, "the run", lambda line: None, ttl_seconds=ttl))
            print("held", held.generation, flush=True)
        elif line == "release\\n":
            stack.close()
            print("released", flush=True)
        elif line == "state\\n":
            print("lost" if held.lost else "kept", flush=True)
    except BusyError as error:
        print("busy", error, flush=True)
"""


class Process:
    def __init__(self, url, host, ttl, clock):
        arguments = [sys.executable, "-c", PROCESS, url, host, str(ttl), str(clock)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._popen = subprocess.Popen(arguments, **pipes)
        self.pid, self.send_signal = self._popen.pid, self._popen.send_signal

    def tell(self, word):
        self._popen.stdin.write(f"{word}\n")
        self._popen.stdin.flush()

    def says(self):
        return self._popen.stdout.readline().strip()

    def do(self, word):
        self.tell(word)
        return self.says()

    def pause(self, register):
        """At a moment at which it doesn't have the lock on disk, which nobody could then take."""
        while True:
            self.send_signal(signal.SIGSTOP)
            if not isinstance(register, DiskRegister):
                return
            with open(f"{register}.lock", "a") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            self.send_signal(signal.SIGCONT)
            time.sleep(0.01)

    def kill(self):
        """And leave it a zombie, which is dead too."""
        self._popen.kill()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self):
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture(params=["disk", "s3"])
def url(request, tmp_path):
    return str(tmp_path / "runs" / ".lease") if request.param == "disk" else request.getfixturevalue("s3") + "/.lease"


@pytest.fixture
def start():
    """Start processes; they are ended with the test."""
    processes = []

    def start_all(*arguments):
        started = [Process(*one) for one in arguments]
        processes.extend(started)
        assert [process.says() for process in started] == ["ready"] * len(started)
        return started

    yield start_all
    for process in processes:
        process.end()


@pytest.fixture
def processes(start, url):
    """Start processes that ask for one lease."""

    def start_some(number=1, *, host="", ttl=TTL, clock=0.0):
        started = start(*[(url, host, ttl, clock)] * number)
        return started if number > 1 else started[0]

    return start_some


@pytest.fixture
def register(url):
    return ready(url)


def ready(url):
    """A lease as this process has it. It has looked once, which makes the client of S3."""
    found = lease.register(url)
    found.look()
    return found


def take(register, ttl=LONG):
    """Take the lease, without waiting for a sign of life, let it go, and return its generation."""
    with hold(register, "the run", pytest.fail, ttl_seconds=ttl) as held:
        return held.generation


def write(register, content):
    """Whatever is there; None: nothing."""
    if isinstance(register, DiskRegister):
        register.path.parent.mkdir(exist_ok=True)
        register.path.write_bytes(content) if content is not None else register.path.unlink()
    elif content is not None:
        register.prefix.write(register.name, content)
    else:
        register.prefix.remove(register.name)


def record_of(register):
    return json.loads(register.look().content)


def edit(register, **fields):
    """Change the holder in the record."""
    record = record_of(register)
    record["holder"] |= fields
    write(register, json.dumps(record).encode())


@contextlib.contextmanager
def taking(least, most):
    """Seconds that the block takes."""
    began = time.monotonic()
    yield
    assert least <= time.monotonic() - began < most


# One after another


def test_each_holder_has_a_higher_generation_than_the_one_before_it(register):
    assert [take(register) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RuntimeError), hold(register, "the run", lambda line: None):
        raise RuntimeError
    assert take(register) == 5


def test_the_record_says_for_people_who_holds_it(register, processes):
    holder = processes()
    assert holder.do("hold") == "held 1"
    record = record_of(register)
    assert (record["what"], record["generation"], record["holder"]["pid"]) == ("the run", 1, holder.pid)


def test_a_second_process_here_is_told_at_once_who_holds_it(register, processes):
    holder = processes()
    holder.do("hold")
    with pytest.raises(BusyError) as caught:
        take(register)
    assert caught.value.exit_code == 75
    said = f"the run must not be running already, but is: process {holder.pid} on {os.uname().nodename}."
    assert str(caught.value).startswith(said)
    with hold(lease.register(f"{register}-other"), "another run", pytest.fail):
        pass


def test_a_process_that_holds_it_is_told_so_too(register):
    with hold(register, "the run", pytest.fail), pytest.raises(BusyError, match=f"process {os.getpid()} on"):
        take(register)


def test_one_that_was_released_is_had_at_once(register, processes):
    holder = processes()
    for generation in (1, 3):
        assert holder.do("hold") == f"held {generation}"
        holder.do("release")
        assert take(register) == generation + 1


def test_a_process_here_that_was_killed_is_followed_at_once(register, processes):
    holder = processes()
    holder.do("hold")
    holder.kill()
    assert take(register) == 2


def test_a_process_here_whose_number_another_has_now_is_dead(register, processes):
    holder = processes()
    holder.do("hold")
    holder.pause(register)  # else it mends its record
    edit(register, started=record_of(register)["holder"]["started"] - 1)
    assert take(register) == 2


def test_a_process_here_that_is_paused_keeps_it_since_it_is_not_dead(register, processes):
    holder = processes(ttl=0.3)
    holder.do("hold")
    holder.pause(register)
    until_older(register, 0.4)
    with pytest.raises(BusyError, match=f"process {holder.pid} on"):
        take(register, ttl=0.3)


# Elsewhere


def until_older(register, seconds):
    """Wait until the record seems so old. S3 tells times in whole seconds, so that it can take two more."""
    deadline = time.monotonic() + seconds + 2 + SLACK
    while register.look().age_seconds <= seconds:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_elsewhere_that_shows_no_sign_of_life_is_followed_after_its_time_and_not_before(url, start):
    """On another machine, before this one's start, in another container."""

    def follow(elsewhere):
        number, fields = elsewhere
        there = f"{url}{number}"
        with one_at_a_time:
            register, (holder,) = ready(there), start((there, "", TTL, 0.0))
        holder.do("hold")
        holder.pause(register)
        edit(register, **fields)
        said = []
        with taking(TTL - 0.1, TTL + SLACK), hold(register, "the run", said.append, ttl_seconds=TTL) as held:
            assert held.generation == 2
        who = fields.get("host", os.uname().nodename)
        assert said == [f"the run is held by process {holder.pid} on {who}; waiting up to 2 s for a sign of life"]
        return True

    one_at_a_time = threading.Lock()
    with ThreadPoolExecutor(3) as threads:
        elsewhere = [{"host": "elsewhere"}, {"boot": "another"}, {"processes": "pid:[1]"}]
        assert all(threads.map(follow, enumerate(elsewhere)))


def test_one_elsewhere_that_has_been_silent_for_its_time_is_followed_at_once(register, processes):
    holder = processes(host="elsewhere")
    holder.do("hold")
    holder.kill()
    until_older(register, TTL)
    assert take(register, TTL) == 2


def test_one_whose_heart_beats_keeps_it_however_long_it_is_waited_for_and_whatever_any_clock_says(processes):
    holder = processes(host="elsewhere", clock=3600.0)
    others = [processes(clock=clock) for clock in (0.0, 7200.0, -7200.0)]
    assert holder.do("hold") == "held 1"
    end = time.monotonic() + 1.5 * TTL
    while time.monotonic() < end:
        for other in others:
            other.tell("hold")
        said = f"busy the run must not be running already, but is: process {holder.pid} on elsewhere."
        assert all(other.says().startswith(said) for other in others)
    assert holder.do("state") == "kept"
    assert holder.do("release") == "released"
    assert others[0].do("hold") == "held 2"


def test_one_that_was_paused_and_followed_knows_it_lost_and_writes_no_more(register, processes):
    holder = processes(host="elsewhere", clock=3600.0)
    assert holder.do("hold") == "held 1"
    check = guard(register, "the run", generation=1)
    check()
    holder.pause(register)
    with hold(register, "the run", lambda line: None, ttl_seconds=TTL) as held:
        assert held.generation == 2
        said = rf"process {os.getpid()} on \S+ has taken it over \(generation 2 after 1\). Nothing was written"
        with pytest.raises(BusyError, match=said):
            check()
        holder.send_signal(signal.SIGCONT)
        until_lost(holder)
        holder.do("release")
        guard(register, "the run", generation=2)()
        assert not held.lost
    with pytest.raises(BusyError, match="generation 2 after 1"):  # nor when that one is done
        check()
    assert take(register) == 3


def until_lost(holder):
    deadline = time.monotonic() + TTL + SLACK
    while holder.do("state") != "lost":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_whose_record_was_removed_and_made_anew_has_lost_it_though_generations_begin_again(register, processes):
    holder = processes(host="elsewhere", ttl=0.4)
    assert holder.do("hold") == "held 1"
    holder.pause(register)
    write(register, None)
    with hold(register, "the run", pytest.fail, ttl_seconds=0.4) as held:
        assert held.generation == 1
        holder.send_signal(signal.SIGCONT)
        until_lost(holder)
        time.sleep(0.3)
        assert not held.lost


# Races


def test_of_many_at_once_one_has_it_and_the_others_are_told_who(processes):
    """Rounds in which the holder lets it go or is killed, and all ask again at the same moment."""
    asking = processes(8)
    for generation in range(1, 7):
        for process in asking:
            process.tell("hold")
        said = {process: process.says() for process in asking}
        (holder,) = [process for process in asking if said[process] == f"held {generation}"]
        losers = [process for process in asking if process is not holder]
        told = f"busy the run must not be running already, but is: process {holder.pid} on"
        assert all(said[loser].startswith(told) for loser in losers), said
        if generation % 2:
            holder.kill()
            asking = [*losers, processes()]
        else:
            holder.do("release")


RACE = """
import os, random, sys, time
from swa_dist.errors import BusyError
from swa_dist.storage import lease

url, journal, only = sys.argv[1:]
register, times = lease.register(url), 0
while times < 3:
    try:
        with lease.hold(register, "x", lambda line: None, ttl_seconds=60) as held:
            os.close(os.open(only, os.O_CREAT | os.O_EXCL))
            with open(journal, "a") as file:
                file.write(f"{held.generation}\\n")
            os.unlink(only)
            times += 1
    except BusyError:
        time.sleep(random.random() / 20)
"""


def test_of_many_that_come_and_go_no_two_have_it_at_once_and_no_generation_is_had_twice(url, tmp_path):
    """A file that only one may make tells whether two have it."""
    journal = tmp_path / "journal"
    arguments = [sys.executable, "-c", RACE, url, str(journal), str(tmp_path / "only")]
    processes = [subprocess.Popen(arguments) for _ in range(8)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 8
    generations = [int(line) for line in journal.read_text().split()]
    assert generations == list(range(1, 25))


# Kills

VICTIM = """
import os, sys, time
from swa_dist.storage import lease

TOUCHING = {"open", "os.mkdir", "os.rename", "os.remove", "os.utime"}
for line in sys.stdin:
    url, moment = line.split()
    moment = int(moment)
    if (child := os.fork()) == 0:
        os.environ["AWS_SDK_UA_APP_ID"] = f"{os.getpid()}-{moment}"

        def count(event, arguments):
            global moment
            if event in TOUCHING and (event != "open" or "/runs/" in str(arguments[0])):
                moment -= 1
                if moment < 0:
                    os.kill(os.getpid(), 9)

        if not url.startswith("s3:"):
            sys.addaudithook(count)
        with lease.hold(lease.register(url), "x", lambda line: None, ttl_seconds=0.2):
            time.sleep(float(sys.argv[1]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_lease_that_is_had_at_once(url, request):
    """Before each request, or each touch of the disk, of a process that takes, keeps and releases it."""
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        if url.startswith("s3:"):
            proxy = stack.enter_context(Proxy(request.getfixturevalue("s3_server")))
            environment["AWS_ENDPOINT_URL"] = proxy.url
        arguments = [sys.executable, "-c", VICTIM, "0.15" if url.startswith("s3:") else "0.12"]  # for a few beats
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        victims = stack.enter_context(subprocess.Popen(arguments, env=environment, **pipes))
        register, last, killed = lease.register(url), 0, 0
        for moment in itertools.count():
            victims.stdin.write(f"{url} {moment}\n")
            victims.stdin.flush()
            code = int(victims.stdout.readline())
            generation = take(register)
            assert generation in ((last + 2,) if code == 0 else (last + 1, last + 2))
            last = generation
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
        victims.stdin.close()
    assert killed >= 3


# Answers that are lost, storage that is away


def test_no_lost_answer_of_a_write_loses_the_lease(s3, s3_server, monkeypatch):
    """The first write takes it, then its heart beats, and the last releases it. S3 has done what it didn't tell."""

    def lose(lost):
        written, releasing = 0, False

        def rule(number, method, path):
            nonlocal written
            written += method == "PUT"
            return "deaf" if method == "PUT" and (written == lost + 1 or (lost == 3 and releasing)) else ""

        with Proxy(s3_server, rule) as proxy:
            with one_at_a_time:
                direct = ready(f"{s3}/{lost}.lease")
                with monkeypatch.context() as patch:
                    patch.setenv("AWS_ENDPOINT_URL", proxy.url)
                    heard = ready(f"{s3}/{lost}.lease")
            with hold(heard, "the run", pytest.fail, ttl_seconds=TTL) as held:
                assert held.generation == 1
                while written < 5:
                    time.sleep(0.05)
                assert not held.lost
                guard(direct, "the run", 1)()
                releasing = lost == 3
            assert take(direct) == 2
        return True

    one_at_a_time = threading.Lock()
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lose, range(4)))


def test_storage_that_is_away_for_longer_than_its_time_costs_no_lease_that_nobody_took(s3, s3_server, monkeypatch):
    away = False
    with Proxy(s3_server, lambda number, method, path: "cut" if away else "") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        register = lease.register(f"{s3}/.lease")
        with hold(register, "the run", pytest.fail, ttl_seconds=0.4) as held:
            away = True
            time.sleep(1.0)
            away = False
            seen = len(proxy.seen)
            while len(proxy.seen) < seen + 3:
                time.sleep(0.1)
            assert not held.lost
            guard(register, "the run", held.generation)()


class Deaf:
    """A register of which every second write happens, but seems not to have."""

    def __init__(self, inner):
        self._inner, self.writes, self.look = inner, 0, inner.look

    def swap(self, content, version):
        self.writes += 1
        written = self._inner.swap(content, version)
        return None if self.writes % 2 else written


def test_a_write_that_seems_not_to_have_happened_but_has_costs_no_lease(register):
    deaf = Deaf(register)
    for generation in (1, 2):
        with hold(deaf, "the run", pytest.fail, ttl_seconds=0.4) as held:
            assert held.generation == generation
            time.sleep(0.4)
            assert not held.lost
    assert deaf.writes > 4
    assert take(register) == 3


class Failing:
    """A register that fails while it is told to, in a way that nobody has thought of."""

    def __init__(self, inner):
        self._inner, self.fails = inner, False

    def look(self):
        return self._inner.look()

    def swap(self, content, version):
        if self.fails:
            raise ZeroDivisionError
        return self._inner.swap(content, version)


def test_a_heart_goes_on_beating_whatever_goes_wrong(register):
    failing = Failing(register)
    with hold(failing, "the run", pytest.fail, ttl_seconds=0.4) as held:
        failing.fails = True
        time.sleep(0.3)
        failing.fails = False
        before = register.look().version
        deadline = time.monotonic() + SLACK
        while register.look().version == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not held.lost


def test_a_process_that_has_the_lock_and_is_paused_is_named_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_LOCK_SECONDS", 0.3)
    url = str(tmp_path / ".lease")
    register = lease.register(url)
    assert take(register) == 1
    with open(f"{url}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with taking(0.3, SLACK), pytest.raises(BusyError, match=re.escape(f"{url}.lock must be free")):
            take(register)
    assert take(register) == 2


def test_on_disk_nothing_is_left_but_the_lease_and_its_lock(tmp_path):
    register = lease.register(str(tmp_path / ".lease"))
    with hold(register, "the run", pytest.fail, ttl_seconds=0.2) as held:
        time.sleep(0.3)
        guard(register, "the run", held.generation)()
    assert {path.name for path in tmp_path.iterdir()} == {".lease", ".lease.lock"}


# Registers


def test_of_many_writes_on_condition_of_one_version_one_is_made(url, register):
    others, version = [ready(url) for _ in range(4)], None
    for round_ in range(10):
        with ThreadPoolExecutor(4) as threads:
            done = list(threads.map(lambda n: others[n].swap(b"%d %d" % (round_, n), version), range(4)))  # noqa: B023
        (writer,) = [n for n in range(4) if done[n] is not None]
        seen = register.look()
        assert (seen.content, seen.version) == (b"%d %d" % (round_, writer), done[writer])
        version = seen.version


def test_its_age_is_that_of_its_last_write(register):
    register.swap(b"1", None)
    until_older(register, 0.5)
    register.swap(b"2", register.look().version)
    assert register.look().age_seconds < SLACK


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"\xff",
    b'{"generation": 1}',
    b'{"generation": "x", "holder": null}',
    b'{"generation": 1e999, "holder": null}',
    b'{"generation": 1, "holder": {"pid": 1}}',
    b'{"generation": 1, "holder": 3}',
]


def test_a_lease_that_is_none_is_named_and_not_overwritten(register, url):
    for content in GARBAGE:
        write(register, content)
        for ask in (lambda: take(register), guard(register, "the run", 1)):
            with pytest.raises(CheckpointError, match=rf"a lease must hold .*{re.escape(url)}"):
                ask()
        assert register.look().content == content


def test_a_lease_that_is_gone_lets_nothing_be_written(register):
    with pytest.raises(BusyError, match="its lease is gone"):
        guard(register, "the run", generation=1)()


def test_a_place_that_cannot_be_written_is_an_output_error_that_names_it(tmp_path, s3):
    (tmp_path / "file").touch()
    for url in (str(tmp_path / "file" / ".lease"), f"{s3}-absent/.lease"):
        with pytest.raises(OutputError, match=re.escape(url)):
            take(lease.register(url))


def test_it_runs_without_boto3_where_it_is_on_disk(tmp_path):
    code = "import sys; from swa_dist.storage import lease; lease.register(sys.argv[1]).look(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert "boto3" not in loaded.stdout.split()
    assert not Path(tmp_path / "x").exists()
