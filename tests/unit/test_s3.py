"""Committed entries and single objects on S3: wholly there or not there, and named when they can't be."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.retries.standard import ExponentialBackoff

from swa_dist.errors import BusyError, CheckpointError, ConfigError, ExitCode, OutputError, ServiceError
from swa_dist.storage import s3 as storage
from swa_dist.storage.s3 import Prefix, S3Store
from swa_dist.storage.store import MANIFEST, DiskStore, newest
from tests.support import SECRET_KEY, Proxy, answer_of, free_port
from tests.unit.test_storage import KIND, filling

PART = 9_000_000
"""Bytes of a file that goes up in parts."""


class OnDisk:
    """The files in a folder, by the names of a `Prefix`'s methods."""

    def __init__(self, folder):
        self.folder, self.url = folder, str(folder)

    def names(self, under=""):
        found = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        return [name for name in found if name.startswith(under)]

    def read(self, name):
        return (self.folder / name).read_bytes()

    def write(self, name, content):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def remove(self, name):
        (self.folder / name).unlink()


class Place:
    """Where a store is: what is there, and the store as one process after another has it."""

    def __init__(self, objects, scratch):
        self.objects, self._scratch, self._number = objects, scratch, 0

    def store(self, guard=lambda: None):
        if isinstance(self.objects, OnDisk):
            return DiskStore(self.objects.folder, guard)
        self._number += 1
        return S3Store(self.objects, DiskStore(self._scratch / f"process{self._number}"), guard)

    def name(self, entry, file="model.bin"):
        """Of an entry's file, as it lies there."""
        (one,) = [name for name in self.objects.names(f"{KIND}/{entry}/") if name.endswith(f"/{file}")]
        return one

    def change(self, entry, change, file="model.bin"):
        name = self.name(entry, file)
        self.objects.write(name, change(self.objects.read(name)))


@pytest.fixture
def remote(s3):
    return Prefix(f"{s3}/runs/swa-1")


@pytest.fixture
def on_s3(remote, tmp_path):
    return Place(remote, tmp_path)


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    return Place(OnDisk(tmp_path / "run"), tmp_path) if request.param == "disk" else request.getfixturevalue("on_s3")


def with_three(place):
    store = place.store()
    for name in "abc":
        store.commit(f"{KIND}/{name}", filling(name.encode()))
    return store


def content_of(store, name, kind=KIND):
    folder = store.open(f"{kind}/{name}")
    content = json.loads((folder / "facts.json").read_text())["content"]
    assert set((folder / "model.bin").read_bytes().decode()) == {content}
    return content


# What holds on disk and on S3


def test_what_was_committed_is_opened_by_another_process(place):
    with_three(place)
    store = place.store()
    assert store.names(KIND) == [f"{KIND}/{name}" for name in "abc"]
    assert [content_of(store, name) for name in "abc"] == ["a", "b", "c"]
    assert store.has(f"{KIND}/a")
    assert not store.has(f"{KIND}/d")


def test_an_entry_is_not_there_until_it_is_filled_and_guarded(place):
    looked = []

    def absent(*ignored):
        looked.append((place.store().has(f"{KIND}/a"), place.store().names(KIND)))

    def fill(folder):
        absent()
        filling(b"x")(folder)
        absent()

    place.store(guard=absent).commit(f"{KIND}/a", fill)
    assert looked == [(False, [])] * 3
    assert place.store().has(f"{KIND}/a")


def test_names_are_in_order_of_one_kind_and_of_one_run(place):
    store = place.store()
    for name in ("b", "a", "000000000512", "c-1", "c"):
        store.commit(f"{KIND}/{name}", filling(b"x"))
    store.commit("candidates/start", filling(b"s"))
    store.commit(f"{KIND}-old/z", filling(b"s"))
    assert store.names(KIND) == [f"{KIND}/{name}" for name in ("000000000512", "a", "b", "c", "c-1")]
    assert store.names("candidates") == ["candidates/start"]
    assert store.names("absent") == []


def test_an_entry_that_is_committed_again_is_replaced_and_what_it_was_is_gone(place):
    store = with_three(place)
    store.commit(f"{KIND}/b", lambda folder: (folder / "only.bin").write_bytes(b"new"))
    folder = place.store().open(f"{KIND}/b")
    assert {path.name for path in folder.iterdir()} == {"only.bin", MANIFEST}
    assert len(place.objects.names(f"{KIND}/b/")) == 2
    assert store.names(KIND) == [f"{KIND}/{name}" for name in "abc"]


def test_a_removed_entry_is_gone_with_its_data_and_the_others_are_not(place):
    store = with_three(place)
    store.open(f"{KIND}/b")
    store.remove(f"{KIND}/b")
    store.remove(f"{KIND}/never")
    assert store.names(KIND) == [f"{KIND}/a", f"{KIND}/c"]
    assert place.objects.names(f"{KIND}/b/") == []
    for process in (store, place.store()):
        with pytest.raises(CheckpointError, match=rf"{KIND}/b must be a committed entry, but has no {MANIFEST}"):
            process.open(f"{KIND}/b")


@pytest.mark.parametrize(
    ("error", "name"), [(RuntimeError("x"), "b"), (KeyboardInterrupt(), "d"), (BusyError("taken over"), "b")]
)
def test_an_exception_in_fill_or_the_guard_leaves_what_was_there_for_this_process_too(place, error, name):
    def raising(*ignored):
        raise error

    with_three(place)
    for store, fill in ((place.store(), raising), (place.store(guard=raising), filling(b"y"))):
        store.open(f"{KIND}/b")
        with pytest.raises(type(error)):
            store.commit(f"{KIND}/{name}", fill)
        assert content_of(store, "b") == "b"
        assert store.names(KIND) == [f"{KIND}/{name}" for name in "abc"]
        if name == "d":
            with pytest.raises(CheckpointError):
                store.open(f"{KIND}/d")
    place.store().sweep(KIND)
    assert len(place.objects.names()) == 9


# Damage


def flip(place):
    place.change("c", lambda content: content[:7] + bytes([content[7] ^ 1]) + content[8:])


def cut(place):
    place.change("c", lambda content: content[:-1])


def lose(place):
    place.objects.remove(place.name("c"))


def cut_manifest(place):
    place.change("c", lambda content: content[:-20], MANIFEST)


def no_files(place):
    place.change("c", lambda content: b'{"files": [1, 2]}', MANIFEST)


def no_facts(place):
    place.change("c", lambda content: json.dumps(json.loads(content) | {"files": {"x": {}}}).encode(), MANIFEST)


@pytest.mark.parametrize("damage", [flip, cut, lose, cut_manifest, no_files, no_facts])
def test_a_damaged_entry_is_named_set_aside_and_the_one_before_it_is_the_newest(place, damage):
    with_three(place)
    damage(place)
    kept = {place.objects.read(name) for name in place.objects.names(f"{KIND}/c/")}
    named = re.escape(f"{place.objects.url}/{KIND}/c") + ("/.*model.bin" if damage in (flip, cut, lose) else "")
    store, said = place.store(), []
    with pytest.raises(CheckpointError, match=named):
        store.open(f"{KIND}/c")
    store.sweep(KIND)
    assert newest(store, KIND, said.append) == f"{KIND}/b"
    assert len(said) == 1
    assert re.search(named, said[0])
    assert store.names(KIND) == [f"{KIND}/a", f"{KIND}/b"]
    assert not store.has(f"{KIND}/c")
    assert newest(store, KIND, said.append) == f"{KIND}/b"
    assert len(said) == 1
    store.commit(f"{KIND}/c", filling(b"z"))  # the name is free
    store.sweep(KIND)
    assert content_of(place.store(), "c") == "z"
    aside = re.search(r"Set aside as (\S+);", said[0])[1]
    assert {place.objects.read(name) for name in place.objects.names(f"{KIND}/{aside}/")} == kept


@pytest.mark.parametrize("file", ["../escaped", "../../escaped", "/tmp/escaped", "..", ".", "", "a/b", "a\0b"])
def test_a_manifest_that_names_files_elsewhere_is_refused_and_nothing_is_written_there(on_s3, file, tmp_path):
    with_three(on_s3)

    def climb(content):
        manifest = json.loads(content)
        manifest["files"] = {file: manifest["files"]["model.bin"]}
        return json.dumps(manifest).encode()

    on_s3.change("c", climb, MANIFEST)
    at = json.loads(on_s3.objects.read(f"{KIND}/c/{MANIFEST}"))["at"]
    with contextlib.suppress(ServiceError, ConfigError):  # not all of these can be names of objects
        on_s3.objects.write(f"{KIND}/c/{at}/{file}", on_s3.objects.read(on_s3.name("c")))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=re.escape(f"{on_s3.objects.url}/{KIND}/c/{MANIFEST} must list files")):
        on_s3.store().open(f"{KIND}/c")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_where_every_entry_is_damaged_there_is_none_and_each_is_named(place):
    with_three(place)
    for name in "abc":
        place.change(name, lambda content: content[:-1], "facts.json")
    said = []
    assert newest(place.store(), KIND, said.append) is None
    assert len(said) == 3


def test_no_flipped_bit_of_a_manifest_is_worse_than_a_damaged_entry_nor_costs_its_data(on_s3):
    """What opens has the content that was committed, all else is a CheckpointError; and sweeping leaves the data."""
    on_s3.store().commit(f"{KIND}/a", lambda folder: (folder / "m").write_bytes(b"x"))
    manifest, data = f"{KIND}/a/{MANIFEST}", on_s3.name("a", "m")
    whole, bits, failed = on_s3.objects.read(manifest), random.Random(0), []
    for at in range(0, len(whole), 6):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bits.randrange(8)
        on_s3.objects.write(manifest, bytes(damaged))
        store = on_s3.store()
        store.sweep(KIND)
        try:
            assert (store.open(f"{KIND}/a") / "m").read_bytes() == b"x"
        except CheckpointError:
            pass
        except Exception as error:
            failed.append(f"byte {at}: {error!r}")
        assert on_s3.objects.read(data) == b"x", f"byte {at}: {bytes(damaged)}"
    assert not failed, "\n".join(failed[:5])


# What holds on S3 alone


def test_a_committed_entry_takes_no_room_here(on_s3, tmp_path):
    with_three(on_s3)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_copy_on_this_machine_is_used_while_it_is_whole_and_of_the_entry_that_is_there(on_s3):
    store = with_three(on_s3)
    path = store.open(f"{KIND}/b") / "model.bin"
    made = path.stat().st_ino
    assert (store.open(f"{KIND}/b") / "model.bin").stat().st_ino == made
    path.write_bytes(b"damaged here")
    assert content_of(store, "b") == "b"
    on_s3.store().commit(f"{KIND}/b", filling(b"n"))
    assert content_of(store, "b") == "n"
    on_s3.store().remove(f"{KIND}/b")
    with pytest.raises(CheckpointError):
        store.open(f"{KIND}/b")


def test_sweep_removes_what_is_half_written_and_nothing_else(on_s3, s3):
    with_three(on_s3)
    flip(on_s3)
    newest(on_s3.store(), KIND, lambda message: None)
    flip_of_b = on_s3.name("b")
    on_s3.objects.remove(flip_of_b)  # an entry that lacks a file is damaged, not half written
    whole = on_s3.objects.names()
    on_s3.objects.write(f"{KIND}/d/.data-0/model.bin", b"half")
    on_s3.objects.write(f"{KIND}/a/.data-1/model.bin", b"half")
    on_s3.objects.write("candidates/d/.data-0/model.bin", b"of another kind")
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    for key in (f"runs/swa-1/{KIND}/e/.data-2/model.bin", f"runs/swa-1/{KIND}/a/.data-3/x", f"runs/swa-10/{KIND}/e/x"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    on_s3.store().sweep(KIND)
    assert on_s3.objects.names() == sorted(whole + ["candidates/d/.data-0/model.bin"])
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]]
    assert left == [f"runs/swa-10/{KIND}/e/x"]
    assert content_of(on_s3.store(), "a") == "a"
    on_s3.store().sweep("absent")


def test_an_entry_that_another_wrote_after_the_guard_was_asked_is_left_to_it(on_s3):
    """A process that was paused between the guard and its write, and taken over meanwhile."""
    with_three(on_s3)
    for name in ("b", "d"):
        late = on_s3.store(guard=lambda name=name: on_s3.store().commit(f"{KIND}/{name}", filling(b"n")))
        with pytest.raises(BusyError, match=re.escape(f"{on_s3.objects.url}/{KIND}/{name}")) as caught:
            late.commit(f"{KIND}/{name}", filling(b"o"))
        assert caught.value.exit_code == ExitCode.STOPPED
        assert content_of(late, name) == "n"
        on_s3.store().sweep(KIND)
        assert content_of(on_s3.store(), name) == "n"
        assert len(on_s3.objects.names(f"{KIND}/{name}/")) == 3


# Kills

VICTIM = f"""
import os, sys
from pathlib import Path
from swa_dist.storage.s3 import Prefix, S3Store
from swa_dist.storage.store import DiskStore

def fill(folder):
    size = {PART} if deed == "commit large" else 100
    (folder / "model.bin").write_bytes(b"n" * size)
    (folder / "facts.json").write_text('{{"content": "n"}}')

deed, url, scratch = sys.argv[1:]
for line in sys.stdin:
    moment = int(line)
    if (child := os.fork()) == 0:
        os.environ["AWS_SDK_UA_APP_ID"] = f"{{os.getpid()}}-{{moment}}"
        store, kind = S3Store(Prefix(url), DiskStore(Path(scratch) / str(moment))), f"kind{{moment}}"
        if deed.startswith("commit"):
            store.commit(f"{{kind}}/b", fill)
        elif deed == "sweep":
            store.sweep(kind)
        else:
            getattr(store, deed.replace(" ", "_"))(f"{{kind}}/b")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def is_committed(store, objects, kind, before):
    """Whether the new entry is there; if not, the one before it is, if there was one, and nothing between."""
    if newest(store, kind, pytest.fail) is None:
        assert not before
        return False
    content = content_of(store, "b", kind)
    assert content in {"n", *before}
    return content == "n"


def is_removed(store, objects, kind, before):
    return newest(store, kind, pytest.fail) is None


def is_set_aside(store, objects, kind, before):
    assert before <= {objects.read(name) for name in objects.names(f"{kind}/")}  # it is never nowhere
    gone = not store.has(f"{kind}/b")
    assert newest(store, kind, lambda message: None) is None
    return gone


def is_swept(store, objects, kind, before):
    assert newest(store, kind, pytest.fail) == f"{kind}/b"
    return not objects.names(f"{kind}/c/")


def prepare(deed, store, objects, kind):
    """What is there before a deed; what must not be lost by it."""
    if deed in ("commit", "commit large"):
        return set()
    store.commit(f"{kind}/b", filling(b"b"))
    if deed == "set aside":
        names = objects.names(f"{kind}/b/")
        objects.write(next(name for name in names if name.endswith("model.bin")), b"damaged")
        return {objects.read(name) for name in names}
    if deed == "sweep":
        for one in ("b/.data-0/model.bin", "c/.data-0/model.bin", "c/.data-0/facts.json"):
            objects.write(f"{kind}/{one}", b"half")
    return {"b"}


@pytest.mark.parametrize(
    ("deed", "is_done", "least"),
    [
        ("commit", is_committed, 5),
        ("commit again", is_committed, 6),
        ("commit large", is_committed, 8),
        ("remove", is_removed, 3),
        ("set aside", is_set_aside, 9),
        ("sweep", is_swept, 6),
    ],
)
def test_a_kill_before_any_request_leaves_what_was_there_or_what_was_to_be(
    s3_server, on_s3, tmp_path, deed, is_done, least
):
    """Each request of the deed in turn is the one before which its process is killed."""
    objects, done, code = on_s3.objects, [], None
    with Proxy(s3_server) as proxy:
        arguments = [sys.executable, "-c", VICTIM, deed, objects.url, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(arguments, env=os.environ | {"AWS_ENDPOINT_URL": proxy.url}, **pipes) as victims:
            while code != 0:
                kind, store = f"kind{len(done)}", on_s3.store()
                before = prepare(deed, store, objects, kind)
                victims.stdin.write(f"{len(done)}\n")
                victims.stdin.flush()
                code = int(victims.stdout.readline())
                assert code in (0, -9)
                if deed == "set aside":  # sweeping must not lose it either
                    store.sweep(kind)
                done.append(is_done(store, objects, kind, before))
                store.sweep(kind)
                left = [name for name in objects.names(f"{kind}/") if "/.corrupt-" not in name]
                assert len(left) == (3 if f"{kind}/b/{MANIFEST}" in left else 0)
            victims.stdin.close()
    assert len(done) > least
    assert done == sorted(done)  # once it is done it stays so
    assert (done[0], done[-1]) == (False, True)
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=objects.url.split("/")[2])


# Answers that are lost, refusals, outages


_one_environment = threading.Lock()


def through(proxy, remote):
    """The same objects, by way of a proxy."""
    with _one_environment, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        found = Prefix(remote.url)
        found.has("x")  # makes the client
    proxy.seen.clear()
    return found


@pytest.mark.parametrize("fate", ["deaf", "cut"])
def test_a_commit_gets_over_any_request_or_answer_that_is_lost(s3_server, remote, tmp_path, fate):
    """Each request of a commit once: it is not heard, or it is done and its answer is lost."""

    def commit_without(lost):
        with Proxy(s3_server) as proxy:
            there = through(proxy, remote)
            proxy.rule = lambda number, method, path: fate if number == lost else ""
            store = S3Store(there, DiskStore(tmp_path / str(lost)))
            for content in (b"o", b"n"):
                store.commit(f"kind{lost}/a", filling(content))
            requests = len(proxy.seen)
            assert content_of(store, "a", f"kind{lost}") == "n"
            assert len(there.names(f"kind{lost}/a/")) == 3
            return requests

    with ThreadPoolExecutor(4) as threads:
        requests = list(threads.map(commit_without, range(11)))  # 5 of the first commit, 6 of the second
    assert min(requests) == 12


def tried(remote, tmp_path):
    """Everything that is asked of S3, by name."""
    (tmp_path / "small").write_bytes(b"x")
    (tmp_path / "large").write_bytes(bytes(PART))
    return {
        "read": lambda: remote.read("x/y"),
        "look": lambda: remote.look("x/y"),
        "write": lambda: remote.write("x/y", b"1"),
        "swap": lambda: remote.swap("x/y", b"1", None),
        "has": lambda: remote.has("x/y"),
        "upload": lambda: remote.upload(tmp_path / "small", "x/y"),
        "upload large": lambda: remote.upload(tmp_path / "large", "x/y"),
        "download": lambda: remote.download("x/y", tmp_path / "down"),
        "names": lambda: remote.names("x/y"),
        "remove": lambda: remote.remove("x/y"),
        "copy": lambda: remote.copy("x/y", "z"),
        "abort": lambda: remote.abort_uploads("x/y"),
    }


@pytest.mark.parametrize("code", ["AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "Novel"])
def test_what_s3_refuses_is_an_output_error_at_once_that_names_the_address_and_no_key(
    s3_server, remote, tmp_path, code
):
    remote.write("x/y", b"1")
    with Proxy(s3_server) as proxy:
        there = through(proxy, remote)
        proxy.rule = lambda number, method, path: answer_of("403 Forbidden", code)
        deeds = tried(there, tmp_path)
        for what, do in deeds.items() if code == "AccessDenied" else [("write", deeds["write"])]:
            proxy.seen.clear()
            with pytest.raises(OutputError, match="refuses") as caught:
                do()
            assert caught.value.exit_code == 73
            assert f"{remote.url}/x/y" in str(caught.value), what
            assert SECRET_KEY not in str(caught.value)
            assert len(proxy.seen) == 1, what
    assert remote.read("x/y") == b"1"
    assert not (tmp_path / "down").exists()


def test_credentials_that_have_run_out_are_a_refusal(s3_server, remote):
    with Proxy(s3_server) as proxy:
        there = through(proxy, remote)
        proxy.rule = lambda number, method, path: answer_of("400 Bad Request", "ExpiredToken")
        with pytest.raises(OutputError, match="refuses"):
            there.write("x/y", b"1")


def test_no_credentials_are_a_refusal_too(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(OutputError, match="credentials") as caught:
        Prefix(f"{s3}/runs").read("x")
    assert f"{s3}/runs/x" in str(caught.value)


def test_a_bucket_that_is_not_there_is_an_output_error_that_names_it(s3, tmp_path):
    absent = Prefix(f"{s3}-absent/runs")
    for what, do in tried(absent, tmp_path).items():
        if what in ("has", "download", "copy"):
            continue  # they ask with HEAD, whose answer doesn't tell a bucket from an object
        with pytest.raises(OutputError, match=re.escape(f"{s3}-absent/runs/x/y must be in a bucket that is there")):
            do()
    assert not absent.has("x/y")
    store = S3Store(absent, DiskStore(tmp_path / "local"))
    with pytest.raises(OutputError):
        store.commit(f"{KIND}/a", filling(b"x"))


OUTAGES = {
    "500": answer_of("500 Internal Server Error", "InternalError"),
    "503": answer_of("503 Slow Down", "SlowDown"),
    "not heard": "cut",
    "answer lost": "deaf",
    "no server": None,
}


def test_an_outage_is_a_service_error_in_bounded_time_that_names_the_address_and_no_key(
    s3_server, remote, tmp_path, monkeypatch
):
    """boto3's own waits, of up to 15 seconds where S3 says to slow down, are a twentieth here; their number is not."""
    monkeypatch.setitem(ExponentialBackoff._DEFAULT_BACKOFF_CONFIG, "throttling_base_scale", 0.05)
    check_outages(remote, s3_server, tmp_path, most_seconds=20)


def check_outages(remote, s3_server, tmp_path, most_seconds):
    """All kinds at once, on a machine that need not do fifteen things at once."""
    deeds = ("write", "upload large", "names")

    def out(kind, deed):
        with Proxy(s3_server) as proxy:
            there = through(proxy, remote)
            proxy.rule = lambda number, method, path: OUTAGES[kind]
            if kind == "no server":
                proxy.shutdown()
                proxy.socket.close()
            scratch = tmp_path / f"{kind} {deed}"
            scratch.mkdir()
            began = time.monotonic()
            with pytest.raises(ServiceError) as caught:
                tried(there, scratch)[deed]()
            return str(caught.value), time.monotonic() - began, len(proxy.seen)

    asked = [(kind, deed) for kind in OUTAGES for deed in deeds]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda one: out(*one), asked))
    for (kind, deed), (said, seconds, requests) in zip(asked, found, strict=True):
        assert f"{remote.url}/x/y" in said, said
        assert SECRET_KEY not in said
        assert seconds < most_seconds, (kind, deed)
        assert requests == (0 if kind == "no server" else 5), (kind, deed)
    assert ServiceError.exit_code == 69


def test_an_object_that_may_not_be_removed_is_a_refusal_though_the_answer_says_200(s3_server, remote, tmp_path):
    body = "<DeleteResult><Error><Key>x</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    with Proxy(s3_server) as proxy:
        there = through(proxy, remote)
        proxy.rule = lambda number, method, path: (
            f"200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}" if method == "POST" and "delete" in path else ""
        )
        there.write("x", b"1")
        with pytest.raises(OutputError, match=re.escape(f"{remote.url}/x")):
            there.remove("x")
        store = S3Store(there, DiskStore(tmp_path / "local"))
        for content in (b"o", b"n"):  # it is committed, whatever becomes of what it replaces
            store.commit(f"{KIND}/a", filling(content))
        assert content_of(store, "a") == "n"
        with pytest.raises(OutputError):
            store.remove(f"{KIND}/a")


def test_an_endpoint_with_a_password_is_not_repeated(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET_KEY}@127.0.0.1:{free_port()}")
    with pytest.raises(ServiceError, match="127") as caught:
        Prefix(f"{s3}/runs").read("x")
    assert SECRET_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3:///prefix", "s3://", "http://b/p", "b/p", "s3:/b", f"s3://key:{SECRET_KEY}@bucket/p", "s3://a b/p"]
)
def test_an_address_that_is_none_is_a_config_error(url):
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX") as caught:
        Prefix(url)
    assert SECRET_KEY not in str(caught.value)


# Single objects


def test_swap_writes_only_what_it_was_read_as(remote):
    first = remote.swap("x", b"1", None)
    assert first is not None
    assert remote.swap("x", b"2", None) is None
    second = remote.swap("x", b"2", first)
    assert second not in (None, first)
    assert remote.swap("x", b"3", first) is None
    assert remote.swap("never", b"3", first) is None
    seen = remote.look("x")
    assert (seen.content, seen.version) == (b"2", second)


def test_an_object_never_seems_older_than_it_is(remote):
    """Its server tells times in whole seconds."""
    for _ in range(8):
        began = time.monotonic()
        remote.write("x", b"1")
        time.sleep(0.15)
        age = remote.look("x").age_seconds
        assert age < time.monotonic() - began
        assert age > -2


@pytest.mark.parametrize("name", ["a b/ö+%.bin", "a?b#c&d=e", "deep/er/😀", "a//b"])
def test_a_name_may_have_any_characters(remote, name, tmp_path):
    remote.write(name, b"1")
    remote.copy(name, f"{name}-copy")
    assert remote.names() == [name, f"{name}-copy"]
    assert remote.has(name)
    remote.download(f"{name}-copy", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == remote.read(name) == b"1"
    remote.remove(name, f"{name}-copy")
    assert remote.names() == []


def test_prefixes_that_begin_alike_are_apart_and_a_bucket_is_one_too(s3):
    urls = [f"{s3}/a", f"{s3}/a/b", f"{s3}/ab", f"{s3}/a?b", f"{s3}/a#b", s3]
    there = [Prefix(f"{url}/") for url in urls]
    for url, prefix in zip(urls, there, strict=True):
        prefix.write("x", url.encode())
    assert [prefix.read("x") for prefix in there] == [url.encode() for url in urls]
    assert there[0].names() == ["b/x", "x"]
    assert len(there[-1].names()) == len(urls)


def test_lists_and_removals_have_pages(remote, monkeypatch):
    """The server of the tests lists twenty at a time."""
    monkeypatch.setattr(storage, "_DELETED_PER_REQUEST", 5)
    names = [f"{number:02d}" for number in range(24)]
    for name in names:
        remote.write(f"many/{name}", b"x")
    remote.write("other", b"x")
    assert remote.names("many/") == [f"many/{name}" for name in names]
    remote.remove(*remote.names("many/"))
    assert remote.names() == ["other"]


def test_a_large_file_goes_up_and_comes_down_as_it_was(remote, tmp_path):
    content = random.Random(0).randbytes(PART) * 2
    (tmp_path / "up").write_bytes(content)
    remote.upload(tmp_path / "up", "x")
    remote.download("x", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == content
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["down", "up"]


def test_a_file_of_this_machine_that_cannot_be_written_is_named_and_s3_is_not_blamed(remote, tmp_path):
    remote.write("x", b"1")
    with pytest.raises(OutputError, match=f"{tmp_path}/absent/x must be writable"):
        remote.download("x", tmp_path / "absent" / "x")
