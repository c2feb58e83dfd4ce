"""Who is @champion when several processes want to change it at once, are paused, lose their lease, or are killed."""

import collections
import json
import random
import threading
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import pytest

from swa_dist.errors import BusyError, CheckpointError, ConfigError
from swa_dist.service import champion, tracking, versions
from swa_dist.service.promotion import Gatekeeper, Ruling
from swa_dist.storage import lease
from tests.support import Said

STRENGTHS = {"1": 1, "2": 3, "3": 2, "4": 4}
"""How good each version is: the gate's answer is that the better one passes."""


class Killed(BaseException):
    """As by kill -9: nothing after it happens."""


@dataclass(eq=False)
class Machine:
    """A machine on which one process runs, a step at a time: a step is a request to MLflow or to the lease's disk."""

    name: str
    silent: bool = False
    """Paused, or dead: its lease runs out."""
    dead: bool = False
    done: bool = False
    what: str = ""
    next_request: str = ""
    result: object = None
    may_go: threading.Event = field(default_factory=threading.Event)
    waits: threading.Event = field(default_factory=threading.Event)

    def step(self, request=""):
        if self.dead:
            raise Killed
        self.next_request = request
        self.waits.set()
        self.may_go.wait()
        self.may_go.clear()
        if self.dead:
            raise Killed

    def run(self, work):
        try:
            self.step()
            self.result = work()
        except Killed:
            pass
        except Exception as error:
            self.result = error
        self.done = True
        self.waits.set()


here = threading.local()


class Stepped:
    """Each call is a step of this machine."""

    def __init__(self, called, machine):
        self._called, self._machine = called, machine

    def __getattr__(self, name):
        found = getattr(self._called, name)

        def call(*args, **options):
            self._machine.step(name)
            answer = found(*args, **options)
            self._machine.step()  # killed once it was done, before it is known
            return answer

        return call


class Disk:
    """The lease's file as a machine sees it. One of which nothing is heard looks old."""

    def __init__(self, register, machines):
        self._register, self._machines = register, machines
        self._machine = here.machine

    def look(self):
        self._machine.step()
        seen = self._register.look()
        if seen is None:
            return None
        holder = json.loads(seen.content)["holder"]
        silent = holder is not None and self._machines[holder["host"]].silent
        return lease.Seen(seen.content, seen.version, 1e9 if silent else 0.0)

    def swap(self, content, version):
        if self._machine.dead:
            raise OSError("this machine is dead")
        self._machine.step()
        return self._register.swap(content, version)


@dataclass(frozen=True)
class Strengths(Gatekeeper):
    """A gate that knows how good versions are; all else is as it is."""

    machine: Machine = None

    @property
    def _client(self):
        return Stepped(versions.client_of(self.uri), self.machine)

    def _rule(self, version, found, overrides):
        self.machine.step()
        passes = found.champion is None or STRENGTHS[version] > STRENGTHS[found.champion]
        return Ruling(self.name, version, "promoted" if passes else "rejected", "by strength", found.champion, None)

    def _report(self, ruling):
        self.machine.step()


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """In memory where there is a disk of it: each request would wait for the disk."""
    tracking.configure_client()
    found = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    versions.client_of(found).search_registered_models()
    return found


@pytest.fixture
def client(uri):
    return versions.client_of(uri)


def made(client, name, folder, num_versions=4):
    client.create_registered_model(name, tags={champion.LOCK: str(folder / f"{name}.lease")})
    for _ in range(num_versions):
        client.create_model_version(name, source="s3://nowhere/model")


def settled(client, name, say=lambda line: None):
    with champion.holding(client, name, say) as held:
        return held.settle()


def promoted(client, name, version, why="better"):
    with champion.holding(client, name, lambda line: None) as held:
        found = held.settle()
        held.change("promoted", version, found.champion or found.previous, "somebody", why)
    return champion.look(client, name)


def interleaved(seed, uri, client, folder, said, monkeypatch):
    """Three processes that change one model's @champion, in a random order of their steps; each may be paused for so
    long that its lease runs out, or killed. Returns what each came to."""
    chance = random.Random(seed)
    name = f"model-{seed}"
    made(client, name, folder)
    if chance.random() < 0.8:
        promoted(client, name, "1")
    machines = {n: Machine(n) for n in ("a", "b", "c")}
    plain = lease.DiskRegister
    monkeypatch.setattr(lease, "register", lambda url: Disk(plain(lease.Path(url)), machines))
    mine = lease._Holder.this_process()
    monkeypatch.setattr(
        lease._Holder,
        "this_process",
        classmethod(lambda cls: cls(here.machine.name, mine.boot, mine.processes, mine.pid, mine.started)),
    )
    monkeypatch.setattr(lease._Holder, "is_alive", lambda self: None if machines[self.host].silent else True)
    monkeypatch.setattr(versions, "verified", lambda *which: here.machine.step())
    monkeypatch.setattr(champion.time, "sleep", lambda seconds: here.machine.step())

    def start(machine):
        keeper = Strengths(uri, name, said, machine.name, machine)
        what = chance.choice(["2", "3", "4", "2", "3", "4", "back"])
        work = (lambda: keeper.rollback(None, "no reason")) if what == "back" else (lambda: keeper.promote(what))

        def run():
            here.machine = machine
            machine.run(work)

        machine.what = what
        machine.thread = threading.Thread(target=run, daemon=True)
        machine.thread.start()
        machine.waits.wait()

    for machine in machines.values():
        start(machine)
    asleep = {}
    while running := [m for m in machines.values() if not m.done]:
        for m in [m for m in asleep if asleep[m] == 0 or len(asleep) == len(running)]:
            del asleep[m]
            m.silent = False
        asleep = {m: n - 1 for m, n in asleep.items()}
        # Between the look at the lease and the alias is where a pause does most harm: most are there, and till the
        # others are done.
        machine = chance.choice([m for m in running if m not in asleep])
        fate, harms = chance.random(), machine.next_request == "set_registered_model_alias"
        if fate < 0.008:
            machine.dead = machine.silent = True
        elif fate < (0.5 if harms else 0.02) and len(asleep) < len(running) - 1:
            machine.silent = True
            asleep[machine] = 10**6 if harms else chance.randrange(5, 100)
            continue
        machine.waits.clear()
        machine.may_go.set()
        machine.waits.wait()
    monkeypatch.undo()
    monkeypatch.setattr(lease._Holder, "is_alive", lambda self: self.host == mine.host)  # all others are dead by now
    return name, list(machines.values())


NUM_INTERLEAVINGS, NUM_PARTS = 200, 8


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.faults) for part in range(1, NUM_PARTS))])
def test_two_hundred_interleavings_with_pauses_and_kills_leave_the_champion_that_some_order_would(
    part, uri, client, tmp_path, monkeypatch
):
    seen, said = collections.Counter(), Said()
    for seed in range(part * NUM_INTERLEAVINGS // NUM_PARTS, (part + 1) * NUM_INTERLEAVINGS // NUM_PARTS):
        name, machines = interleaved(seed, uri, client, tmp_path, said, monkeypatch)
        found = settled(client, name, said.say)
        check_that_some_order_gives(found, machines)
        assert champion.look(client, name) == found == settled(client, name), "a second repair has nothing to do"
        seen["killed"] += sum(machine.dead for machine in machines)
        for machine in machines:
            if isinstance(machine.result, Ruling):
                seen[machine.result.status] += 1
    assert seen["killed"] > 5
    assert seen["promoted"] > 10
    assert seen["rejected"] > 2
    assert said.count("finishing what") > 2
    assert said.count("has taken it over") > 2
    late, half = said.count("had lost its lease"), said.count("finishing what")
    print(f"{dict(seen)}; {half} finished by another, {late} late writes put right")


def check_that_some_order_gives(found, machines):
    """The journal is that order: each change began where the one before it ended, and none was of the weaker one."""
    now = previous = None
    for entry in found.journal:
        if not entry.is_change or entry.state != "done":
            continue
        assert entry.kind in ("promoted", "rolled back"), f"nobody moved it by hand: {entry}"
        assert entry.before == now, entry
        if entry.kind == "rolled back":
            assert entry.version == previous, f"@previous was another when @champion was {now}: {entry}"
        else:
            assert now is None or STRENGTHS[entry.version] > STRENGTHS[now]
        now, previous = entry.version, entry.previous
    assert found.champion == now, found
    assert found.last_change is None or found.previous == found.last_change.previous
    assert found.challenger != now or now is None
    for machine in machines:
        if machine.dead:
            continue
        if machine.what == "back":
            assert not isinstance(machine.result, Exception) or isinstance(machine.result, ConfigError | BusyError)
            continue
        assert isinstance(machine.result, Ruling), machine.result
        mine = [e for e in found.journal if e.version == machine.what and e.who == machine.name]
        kind = {"promoted": "promoted", "rejected": "rejected"}.get(machine.result.status)
        assert kind is None or any(e.kind == kind and e.state == "done" for e in mine), (machine.result, found)


# One at a time


class Pausing:
    """A client that is away for a while, just before it sets @champion for the first time."""

    def __init__(self, client, meanwhile):
        self._client, self._meanwhile = client, meanwhile

    def __getattr__(self, name):
        return getattr(self._client, name)

    def set_registered_model_alias(self, name, alias, version):
        if alias == "champion" and self._meanwhile:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        self._client.set_registered_model_alias(name, alias, version)


def cut_off(client, name, version):
    """A promotion whose process is killed just before it sets @champion."""

    def killed():
        raise Killed

    with pytest.raises(Killed):
        promoted(Pausing(client, killed), name, version)


def test_what_a_paused_process_wrote_after_its_lease_went_to_another_is_put_right(client, tmp_path, monkeypatch):
    name = "paused"
    made(client, name, tmp_path)
    promoted(client, name, "1")

    def meanwhile():
        monkeypatch.setattr(lease._Holder, "is_alive", lambda self: False)  # as when nothing is heard of it for long
        promoted(client, name, "4", "by another")

    paused = Pausing(client, meanwhile)
    said = Said()
    with pytest.raises(BusyError, match="has taken it over"):
        promoted(paused, name, "3", "by who was paused")
    assert champion.look(client, name).champion == "3", "which is what must not stay"
    found = settled(client, name, said.say)
    assert (found.champion, found.previous) == ("4", "3")
    assert said.count("had lost its lease") == 1
    changes = [(entry.version, entry.before, entry.why) for entry in found.journal if entry.is_change]
    assert changes == [("1", None, "better"), ("3", "1", "by who was paused"), ("4", "3", "by another")]
    assert settled(client, name) == found


def test_a_change_that_was_begun_is_finished_by_the_next(client, tmp_path):
    made(client, "begun", tmp_path)
    promoted(client, "begun", "1")
    client.set_registered_model_alias("begun", "challenger", "2")
    cut_off(client, "begun", "2")
    assert champion.look(client, "begun").champion == "1"
    found = settled(client, "begun")
    assert (found.champion, found.previous, found.challenger) == ("2", "1", None)
    tags = client.get_model_version("begun", "2").tags
    assert tags["swa.champion_by"] == "somebody"
    assert tags["swa.champion_instead_of"] == "1"


def test_a_change_to_a_version_that_was_deleted_meanwhile_is_given_up(client, tmp_path):
    made(client, "deleted", tmp_path)
    promoted(client, "deleted", "1")
    cut_off(client, "deleted", "2")
    client.delete_model_version("deleted", "2")
    found = settled(client, "deleted")
    assert found.champion == "1"
    assert found.journal[-1].state == "given up"
    assert promoted(client, "deleted", "3").champion == "3"


def test_a_version_that_was_repaired_can_be_chosen_by_hand_later(client, tmp_path):
    """Of a change that another finished, a paused process may write once more; not for ever."""
    made(client, "later", tmp_path)
    promoted(client, "later", "1")
    cut_off(client, "later", "3")
    settled(client, "later")
    promoted(client, "later", "4")
    for entry in champion.look(client, "later").journal:  # two hours pass
        when = (datetime.fromisoformat(entry.when) - timedelta(hours=2)).isoformat()
        client.set_registered_model_tag("later", entry.tag, champion._text(replace(entry, when=when)))
    client.set_registered_model_alias("later", "champion", "3")
    found = settled(client, "later")
    assert (found.champion, found.previous, found.journal[-1].kind) == ("3", "4", "moved by hand")


def test_what_is_put_right_is_never_a_version_that_is_gone(client, tmp_path):
    made(client, "both", tmp_path)
    promoted(client, "both", "1")
    cut_off(client, "both", "3")
    settled(client, "both")
    promoted(client, "both", "4")
    client.set_registered_model_alias("both", "champion", "3")
    client.delete_model_version("both", "4")
    found = settled(client, "both")
    assert (found.champion, found.journal[-1].kind) == ("3", "moved by hand")
    assert settled(client, "both") == found


def test_a_version_that_is_deleted_before_its_change_costs_no_champion(client, tmp_path):
    made(client, "too-late", tmp_path)
    promoted(client, "too-late", "1")
    client.delete_model_version("too-late", "2")
    with pytest.raises(ConfigError, match="version 2 of too-late must exist, but was deleted"):
        promoted(client, "too-late", "2")
    assert settled(client, "too-late").champion == "1"

    def deleted():
        client.delete_model_version("too-late", "3")
        raise Killed

    with pytest.raises(Killed):
        promoted(Pausing(client, deleted), "too-late", "3")
    found = settled(client, "too-late")
    assert (found.champion, found.journal[-1].state) == ("1", "given up")


def test_a_champion_that_is_deleted_as_soon_as_it_is_one_is_the_one_before(client, tmp_path):
    made(client, "at-once", tmp_path)
    promoted(client, "at-once", "1")

    class Deleting(Pausing):
        def set_model_version_tag(self, name, version, *tag):
            self._client.delete_model_version(name, version)
            raise Killed

    with pytest.raises(Killed):
        promoted(Deleting(client, None), "at-once", "2")
    assert champion.look(client, "at-once").champion is None
    assert settled(client, "at-once").champion == "1"


def test_a_lease_that_was_lost_is_said_and_no_line_is_overwritten(client, tmp_path):
    made(client, "lost", tmp_path)
    promoted(client, "lost", "1")
    promoted(client, "lost", "2")
    (tmp_path / "lost.lease").unlink()
    said = Said()
    settled(client, "lost", said.say)
    assert said.count("must be the lease of all who promote lost") == 1
    assert [entry.version for entry in promoted(client, "lost", "3").journal] == ["1", "2", "3"]


def test_a_line_of_the_journal_that_cannot_be_read_is_named(client, tmp_path):
    made(client, "odd", tmp_path)
    promoted(client, "odd", "1", "weil es besser ist: \N{CJK UNIFIED IDEOGRAPH-597D}" * 300)
    (entry,) = champion.look(client, "odd").journal
    assert len(client.get_registered_model("odd").tags[entry.tag]) < 5000
    client.set_registered_model_tag("odd", "swa.journal.000009-000009-abcdef", "{}")
    with pytest.raises(CheckpointError, match=r"swa\.journal\.000009-000009-abcdef of odd must be a line"):
        champion.look(client, "odd")


@pytest.mark.parametrize("to", ["3", None])
def test_a_champion_that_was_moved_by_hand_stays_and_is_noted(to, client, tmp_path):
    name = f"by-hand-{to}"
    made(client, name, tmp_path)
    promoted(client, name, "1")
    promoted(client, name, "2")
    if to is None:
        client.delete_registered_model_alias(name, "champion")
    else:
        client.set_registered_model_alias(name, "champion", to)
    said = Said()
    found = settled(client, name, said.say)
    assert found.champion == to
    assert said.count(f"moved by hand from version 2 to {to}") == 1
    last = found.journal[-1]
    assert (last.kind, last.before, last.version) == ("moved by hand", "2", to)
    assert found.previous == "2", "so that a rollback gives it back"
    assert settled(client, name) == found


def test_a_champion_that_was_deleted_is_noted_and_a_version_of_the_one_before_can_come_back(client, tmp_path):
    made(client, "gone", tmp_path)
    promoted(client, "gone", "1")
    promoted(client, "gone", "2")
    client.delete_model_version("gone", "2")
    found = settled(client, "gone")
    assert (found.champion, found.previous) == (None, "1")
    assert settled(client, "gone") == found


def test_one_that_is_moved_from_outside_in_the_same_moment_is_said(client, tmp_path):
    made(client, "outside", tmp_path)
    promoted(client, "outside", "1")

    class Meddling(Pausing):
        def set_model_version_tag(self, *tag):
            self._client.set_model_version_tag(*tag)
            self._client.set_registered_model_alias("outside", "champion", "4")

    with pytest.raises(BusyError, match="must be version 2 now, but is 4"):
        promoted(Meddling(client, None), "outside", "2")


def test_the_place_of_the_lease_is_the_models_for_good(client, tmp_path):
    client.create_registered_model("placed")
    with pytest.raises(ConfigError, match="must be where this machine can write, but is not there"):
        settled(client, "placed")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert champion.claim_lock(client, "placed", one) == one
    assert champion.claim_lock(client, "placed", two) == one
    assert settled(client, "placed").champion is None
    assert (tmp_path / "one").exists()
    client.set_registered_model_tag("placed", champion.LOCK, "/folder/of/another/machine/lease")
    with pytest.raises(ConfigError, match="Run this where its folder is"):
        settled(client, "placed")


def test_who_waits_for_another_for_minutes_is_told_who_it_is(client, tmp_path, monkeypatch):
    made(client, "busy", tmp_path)
    monkeypatch.setattr(champion, "_WAIT_SECONDS", 0.2)
    said = Said()
    with (
        lease.hold(lease.register(str(tmp_path / "busy.lease")), "another", said.say),
        pytest.raises(BusyError, match="promotion of busy must not be running already, but is: process"),
        champion.holding(client, "busy", said.say),
    ):
        pass
    assert said.count("waiting for another promotion of busy") == 1
