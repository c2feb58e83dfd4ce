"""Entries, folders and single objects on S3: wholly there or not there, and named when they can't be."""

import gc
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import boto3
import pytest

from swa_dist.errors import BusyError, CheckpointError, ConfigError, OutputError, ServiceError
from swa_dist.storage import folder as folders
from swa_dist.storage.s3 import Prefix, S3Store
from swa_dist.storage.store import MANIFEST, DiskStore, newest
from tests.support import SECRET_KEY, free_port
from tests.unit.test_storage import KIND, filling


@pytest.fixture
def remote(s3):
    return Prefix(f"{s3}/runs/swa-1")


@pytest.fixture
def store(remote, tmp_path):
    return S3Store(remote, DiskStore(tmp_path / "local"))


@pytest.fixture
def elsewhere(remote, tmp_path):
    """The same store as another machine has it."""
    return S3Store(remote, DiskStore(tmp_path / "elsewhere"))


@pytest.fixture
def three(store):
    for name in ("a", "b", "c"):
        store.commit(f"{KIND}/{name}", filling(name.encode()))
    return store


def content_of(store, name):
    return (store.open(f"{KIND}/{name}") / "model.bin").read_bytes()[:1]


def data_of(remote, name):
    return [one for one in remote.names(f"{KIND}/{name}/") if "/.data-" in one]


def test_what_was_committed_is_opened_elsewhere(three, elsewhere):
    assert elsewhere.names(KIND) == [f"{KIND}/{name}" for name in "abc"]
    assert [content_of(elsewhere, name) for name in "abc"] == [b"a", b"b", b"c"]
    assert elsewhere.has(f"{KIND}/a")
    assert not elsewhere.has(f"{KIND}/d")
    assert json.loads((elsewhere.open(f"{KIND}/b") / "facts.json").read_text()) == {"content": "b"}


def test_a_committed_entry_takes_no_room_here(three, tmp_path):
    assert [path for path in (tmp_path / "local").rglob("*") if path.is_file()] == []


def test_an_entry_that_is_committed_again_is_replaced_and_what_it_was_is_gone(three, elsewhere, remote):
    three.commit(f"{KIND}/b", filling(b"x"))
    assert content_of(elsewhere, "b") == b"x"
    assert len(data_of(remote, "b")) == 2


def test_a_removed_entry_is_gone_with_its_data_and_the_others_are_not(three, elsewhere, remote):
    three.remove(f"{KIND}/b")
    three.remove(f"{KIND}/never")
    assert elsewhere.names(KIND) == [f"{KIND}/a", f"{KIND}/c"]
    assert remote.names(f"{KIND}/b/") == []
    with pytest.raises(CheckpointError, match=f"{KIND}/b must be a committed entry"):
        elsewhere.open(f"{KIND}/b")


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_an_exception_in_fill_or_the_guard_leaves_the_entry_that_was_there(three, elsewhere, remote, tmp_path, error):
    def raising(*ignored):
        raise error

    guarded = S3Store(remote, DiskStore(tmp_path / "guarded"), guard=raising)
    for store, fill in ((three, raising), (guarded, filling(b"y"))):
        with pytest.raises(type(error)):
            store.commit(f"{KIND}/b", fill)
    assert content_of(elsewhere, "b") == b"b"


def flip(remote, name):
    one = next(n for n in data_of(remote, name) if n.endswith("model.bin"))
    content = bytearray(remote.read(one))
    content[7] ^= 1
    remote.write(one, bytes(content))


def cut(remote, name):
    one = next(n for n in data_of(remote, name) if n.endswith("model.bin"))
    remote.write(one, remote.read(one)[:-1])


def lose(remote, name):
    remote.remove(next(n for n in data_of(remote, name) if n.endswith("model.bin")))


def cut_manifest(remote, name):
    remote.write(f"{KIND}/{name}/{MANIFEST}", remote.read(f"{KIND}/{name}/{MANIFEST}")[:-20])


def climb(remote, name):
    manifest = json.loads(remote.read(f"{KIND}/{name}/{MANIFEST}"))
    manifest["files"]["../../escaped"] = manifest["files"]["model.bin"]
    remote.write(f"{KIND}/{name}/{MANIFEST}", json.dumps(manifest).encode())


@pytest.mark.parametrize("damage", [flip, cut, lose, cut_manifest, climb])
def test_a_damaged_entry_is_named_set_aside_and_the_one_before_it_is_the_newest(
    three, elsewhere, remote, damage, tmp_path
):
    damage(remote, "c")
    with pytest.raises(CheckpointError, match=rf"{remote.url}/{KIND}/c"):
        elsewhere.open(f"{KIND}/c")
    said = []
    assert newest(elsewhere, KIND, said.append) == f"{KIND}/b"
    assert len(said) == 1
    assert f"{remote.url}/{KIND}/c" in said[0]
    assert elsewhere.names(KIND) == [f"{KIND}/a", f"{KIND}/b"]
    assert [one for one in remote.names(f"{KIND}/c/") if "corrupt-" in one]  # kept, to be looked at
    assert list(tmp_path.rglob("escaped")) == []
    elsewhere.commit(f"{KIND}/c", filling(b"z"))
    assert content_of(elsewhere, "c") == b"z"


def test_sweep_removes_what_is_half_written_and_nothing_else(three, elsewhere, remote):
    whole = remote.names()
    remote.write(f"{KIND}/d/.data-0/model.bin", b"half")
    remote.write(f"{KIND}/b/.data-1/model.bin", b"half")
    bucket, _, prefix = remote.url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{KIND}/e/.data-2/model.bin")
    client.create_multipart_upload(Bucket=bucket, Key="another/run")
    elsewhere.sweep(KIND)
    assert remote.names() == whole
    assert [u["Key"] for u in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == ["another/run"]
    assert [content_of(elsewhere, name) for name in "abc"] == [b"a", b"b", b"c"]


KILLED = """
import os, signal, sys
from pathlib import Path
import swa_dist.storage.s3 as s3
from swa_dist.storage.store import DiskStore

remote = s3.Prefix(sys.argv[1])
store = s3.S3Store(remote, DiskStore(Path(sys.argv[2])))

def fill(folder):
    for file in ("model.bin", "momentum.bin"):
        (folder / file).write_bytes(b"new" * 1000)

left = [int(sys.argv[3])]
def count(**ignored):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
for moment in ("before-send.s3", "response-received.s3"):
    remote._client.meta.events.register(moment, count)
store.commit("checkpoints/1", fill)
"""


def test_a_kill_before_or_after_any_request_leaves_the_old_entry_or_the_new_one(s3, tmp_path):
    outcomes = []
    for moment in range(40):
        url = f"{s3}/runs/{moment}"
        store = S3Store(Prefix(url), DiskStore(tmp_path / f"first{moment}"))
        store.commit(f"{KIND}/1", lambda folder: [(folder / n).write_bytes(b"old") for n in ("model.bin", "x.bin")])
        arguments = [sys.executable, "-c", KILLED, url, str(tmp_path / f"killed{moment}"), str(moment)]
        code = subprocess.run(arguments, check=False).returncode
        after = S3Store(Prefix(url), DiskStore(tmp_path / f"after{moment}"))
        content = {path.name: path.read_bytes()[:3] for path in after.open(f"{KIND}/1").glob("*.bin")}
        assert content in ({"model.bin": b"old", "x.bin": b"old"}, {"model.bin": b"new", "momentum.bin": b"new"})
        after.sweep(KIND)
        assert len(after.open(f"{KIND}/1").parts)
        assert len(Prefix(url).names(f"{KIND}/1/")) == 3
        outcomes.append((code, content["model.bin"]))
        if code == 0:
            break
    assert outcomes[-1] == (0, b"new")
    assert {content for code, content in outcomes if code == -signal.SIGKILL} == {b"old", b"new"}


# Folders and single objects


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    return str(tmp_path / "place") if request.param == "disk" else request.getfixturevalue("s3") + "/place"


def test_a_file_at_any_address_is_read_as_it_was_written(place):
    url = folders.join(place, "a b/ö.bin")
    assert folders.read(url) is None
    folders.write(url, b"1")
    folders.write(url, b"2")
    assert folders.read(url) == b"2"
    folders.check_writable(place)
    assert folders.read(folders.join(place, "absent")) is None


def test_what_one_process_puts_into_a_folder_another_finds_there(place):
    one, other = folders.open_folder(place), folders.open_folder(place)
    assert other.read_json("facts.json") is None
    assert not other.has("facts.json")
    one.write("facts.json", '{"x": 1}')
    assert other.has("facts.json")
    assert other.read_json("facts.json") == {"x": 1}
    (one.local / "big.bin").write_bytes(b"0" * 20_000_000)  # goes up in parts
    one.push("big.bin", "never")
    other.pull("big.bin", "never")
    assert (other.local / "big.bin").stat().st_size == 20_000_000
    one.store.commit(f"{KIND}/a", filling(b"a"))
    assert content_of(other.store, "a") == b"a"
    other.remove("facts.json")
    other.remove("facts.json")
    assert not one.has("facts.json")


def test_a_folder_is_set_aside_under_a_free_name_with_all_that_is_in_it(place):
    for round_ in ("1", "2"):
        folder = folders.open_folder(place)
        folder.write("summary.json", json.dumps({"round": round_}))
        folder.store.commit(f"{KIND}/a", filling(round_.encode()))
        assert folders.exists(place)
        folders.set_aside(place, ".attempt-1")
        assert not folders.exists(place)
    for name, round_ in ((".attempt-1", "1"), (".attempt-1-1", "2")):
        old = folders.open_folder(place + name)
        assert old.read_json("summary.json") == {"round": round_}
        assert content_of(old.store, "a") == round_.encode()


def test_what_a_folder_on_s3_has_on_this_machine_goes_with_it(s3):
    folder = folders.open_folder(f"{s3}/run")
    local = folder.local
    folder.write("x", "1")
    assert (local / "x").is_file()
    del folder
    gc.collect()
    assert not local.exists()


def test_a_guard_that_raises_leaves_nothing_committed(place):
    def refused():
        raise BusyError("taken over")

    with pytest.raises(BusyError):
        folders.open_folder(place, refused).store.commit(f"{KIND}/a", filling(b"a"))
    assert folders.open_folder(place).store.names(KIND) == []


@pytest.mark.parametrize(
    ("given", "absolute"), [("s3://b/p/", "s3://b/p"), ("x/../y", "{cwd}/y"), ("~/r", "{home}/r"), ("/a/b", "/a/b")]
)
def test_addresses_are_left_and_paths_made_absolute(given, absolute):
    assert folders.absolute(given) == absolute.format(cwd=Path.cwd(), home=os.environ["HOME"])


# Faults


@pytest.mark.parametrize("url", ["s3:///prefix", "s3://", "http://b/p", "b/p"])
def test_an_address_that_is_none_is_a_config_error(url):
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX"):
        Prefix(url)


class Answering(socketserver.ThreadingTCPServer):
    """A server that gives every request one answer, or cuts the connection where that is empty."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer):
        self.requests = 0
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65_536)
                outer.requests += 1
                self.request.sendall(answer)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def http(status, code):
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "error", "retried"),
    [
        (http("403 Forbidden", "AccessDenied"), OutputError, False),
        (http("403 Forbidden", "SignatureDoesNotMatch"), OutputError, False),
        (http("404 Not Found", "NoSuchBucket"), ServiceError, False),
        (http("500 Internal Server Error", "InternalError"), ServiceError, True),
        (b"", ServiceError, True),
    ],
)
def test_a_refusal_and_an_outage_are_named_with_their_address_and_no_key(s3, monkeypatch, answer, error, retried):
    with Answering(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        began = time.monotonic()
        with pytest.raises(error) as caught:
            Prefix(f"{s3}/runs").write("x/y", b"1")
        server.shutdown()
    assert f"{s3}/runs/x/y" in str(caught.value)
    assert SECRET_KEY not in str(caught.value)
    assert (server.requests > 1) == retried
    assert time.monotonic() - began < 60


def test_no_server_and_no_credentials_are_service_errors(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServiceError, match=urllib.parse.quote("s3") + "://"):
        Prefix(f"{s3}/runs").read("x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ServiceError, match="credentials"):
        Prefix(f"{s3}/runs").read("x")


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
    assert -2 <= seen.age_seconds < 30
