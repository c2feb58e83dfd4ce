"""A run's folder, and single files, are the same to work with on disk and on S3."""

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from swa_dist.errors import BusyError, CheckpointError, ConfigError, OutputError, ServiceError
from swa_dist.storage import folder as folders
from swa_dist.storage.folder import absolute, check_writable, exists, is_s3, join, open_folder, read, set_aside, write
from swa_dist.storage.s3 import Prefix
from swa_dist.storage.store import MANIFEST
from tests.support import Proxy, answer_of, free_port
from tests.unit.test_storage import KIND, filling


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    """Where a folder can be made."""
    return (
        str(tmp_path / "runs" / "swa-1") if request.param == "disk" else request.getfixturevalue("s3") + "/runs/swa-1"
    )


def content_of(folder, name):
    return (folder.store.open(f"{KIND}/{name}") / "model.bin").read_bytes()


def everything(url):
    """The files under an address, by name, and what is in them; not what holds the store together."""
    if not is_s3(url):
        found = {str(path.relative_to(url)): path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    else:
        prefix = Prefix(url)
        found = {name: prefix.read(name) for name in prefix.names()}
    return {re.sub(r"/\.data-\w+", "", name): content for name, content in found.items() if MANIFEST not in name}


# Addresses


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://b/p/", "s3://b/p"),
        ("s3://b/p", "s3://b/p"),
        ("x/../y", "{cwd}/y"),
        (".", "{cwd}"),
        ("~/r", "{home}/r"),
        ("/a/b/", "/a/b"),
        ("/a/./c/../b", "/a/b"),
    ],
)
def test_paths_are_made_absolute_and_addresses_are_left(given, expected):
    expected = expected.format(cwd=Path.cwd(), home=os.environ["HOME"])
    assert absolute(given) == expected
    assert absolute(expected) == expected


@pytest.mark.parametrize("given", ["/a/b", "/a/b/", "s3://b/p", "s3://b/p/", "s3://b", "/"])
def test_a_name_is_joined_to_an_address_by_one_slash(given):
    assert join(given, "x") == f"{given.rstrip('/')}/x"


def test_what_is_on_s3_is_told_by_its_address():
    assert [is_s3(url) for url in ("s3://b/p", "s3://b", "/s3/x", "s3", "x/s3://b", "./s3:/b")] == [True, True] + [
        False
    ] * 4


# Single files


@pytest.mark.parametrize("name", ["x", "deep er/ö+%#?.bin"])
def test_a_file_at_any_address_is_read_as_it_was_written(place, name):
    url = join(place, name)
    assert read(url) is None
    for content in (b"22", b""):
        write(url, content)
        assert read(url) == content
    assert everything(place) == {name: b""}
    folders.remove(url)
    folders.remove(url)
    assert read(url) is None
    assert read(join(url, "under/it")) is None


def test_nothing_is_under_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert read(str(tmp_path / "file" / "x")) is None
    with pytest.raises(OutputError, match="must be writable"):
        write(str(tmp_path / "file" / "x"), b"1")
    with pytest.raises(OutputError, match="must be writable"):
        folders.remove(str(tmp_path / "file" / "x"))


def test_a_file_of_a_bucket_itself_is_one_too(s3):
    write(f"{s3}/x", b"1")
    assert read(f"{s3}/x") == b"1"
    with pytest.raises(ConfigError):
        read(s3)


def test_a_place_that_can_be_written_is_left_as_it_was(place):
    check_writable(place)
    assert everything(place) == {}
    write(join(place, "x"), b"1")
    check_writable(place)
    assert everything(place) == {"x": b"1"}


def test_a_place_that_cannot_be_written_is_named(tmp_path, s3, s3_server, monkeypatch):
    (tmp_path / "file").touch()
    for url, error in (
        (str(tmp_path / "file" / "runs"), OutputError),
        ("/proc/runs", OutputError),
        (f"{s3}-absent/runs", OutputError),
    ):
        with pytest.raises(error, match=re.escape(url)):
            check_writable(url)
    with Proxy(s3_server, lambda number, method, path: answer_of("403 Forbidden", "AccessDenied")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(OutputError, match=f"{s3}/runs"):
            check_writable(f"{s3}/runs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServiceError, match=f"{s3}/runs"):
        check_writable(f"{s3}/runs")


# Folders


def test_what_one_process_puts_into_a_folder_another_finds_there(place):
    one, other = open_folder(place), open_folder(f"{place}/")
    assert (other.read_json("facts.json"), other.has("facts.json")) == (None, False)
    for number in (1, 2):
        one.write("facts.json", json.dumps({"x": number}))
        assert other.has("facts.json")
        assert other.read_json("facts.json") == one.read_json("facts.json") == {"x": number}
    one.store.commit(f"{KIND}/a", filling(b"a"))
    assert content_of(other, "a") == b"a" * 100
    other.remove("facts.json")
    other.remove("facts.json")
    assert (one.has("facts.json"), one.read_json("facts.json")) == (False, None)


def test_files_are_pushed_and_pulled_where_they_are_there(place):
    one, other = open_folder(place), open_folder(place)
    for name, size in (("small", 3), ("large", 9_000_000), ("deep/er", 0)):
        (one.local / name).parent.mkdir(parents=True, exist_ok=True)
        (one.local / name).write_bytes(bytes(size))
    one.push("small", "never", "large", "deep/er")
    other.pull("small", "never", "large", "deep/er")
    assert [(other.local / name).stat().st_size for name in ("small", "large", "deep/er")] == [3, 9_000_000, 0]
    assert not (other.local / "never").exists()
    assert set(everything(place)) == {"small", "large", "deep/er"}
    (one.local / "small").write_bytes(b"changed")
    one.push("small")
    other.pull("small")
    assert (other.local / "small").read_bytes() == b"changed"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b"\xff\xfe"])
def test_json_that_is_damaged_is_named_as_where_others_find_it(place, content):
    write(join(place, "facts.json"), content)
    with pytest.raises(CheckpointError, match=re.escape(join(place, "facts.json"))) as caught:
        open_folder(place).read_json("facts.json")
    assert tempfile.gettempdir() + "/swa-run" not in str(caught.value)


def test_a_folder_is_opened_without_being_made(place):
    folder = open_folder(place)
    assert not exists(place)
    assert folder.store.names(KIND) == []
    assert not folder.store.has(f"{KIND}/a")
    assert not exists(place)


def test_a_guard_that_raises_leaves_nothing_committed(place):
    def refuse():
        raise BusyError("taken over")

    folder = open_folder(place, refuse)
    with pytest.raises(BusyError):
        folder.store.commit(f"{KIND}/a", filling(b"a"))
    for opened in (folder, open_folder(place)):
        assert opened.store.names(KIND) == []
        with pytest.raises(CheckpointError):
            opened.store.open(f"{KIND}/a")


def test_what_a_folder_on_s3_has_on_this_machine_goes_with_it_and_its_store(s3):
    folder = open_folder(f"{s3}/run")
    local = folder.local
    folder.write("x", "1")
    assert (local / "x").is_file()
    store = folder.store
    del folder
    gc.collect()
    store.commit(f"{KIND}/a", filling(b"a"))
    assert (store.open(f"{KIND}/a") / "model.bin").is_file()
    del store
    gc.collect()
    assert not local.parent.exists()


def test_a_process_leaves_nothing_of_a_folder_on_s3_behind(s3, tmp_path):
    code = f"""
from swa_dist.storage.folder import open_folder
folder = open_folder("{s3}/run")
folder.write("x", "1")
folder.store.commit("{KIND}/a", lambda folder: (folder / "m").write_bytes(b"1"))
folder.store.open("{KIND}/a")
raise SystemExit(3)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_what_it_has_here_a_folder_on_s3_is_an_output_error(s3, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=re.escape(str(tmp_path / "file"))):
        open_folder(f"{s3}/run")


# Setting aside


def test_there_is_a_folder_where_anything_is_in_it(place):
    assert not exists(place)
    write(f"{place}0/x", b"1")
    assert not exists(place)
    write(join(place, "deep/x"), b"1")
    assert exists(place)
    assert exists(f"{place}/")


def test_a_folder_with_nothing_in_it_and_a_file_are_none(tmp_path):
    (tmp_path / "file").touch()
    assert not exists(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert not exists(str(tmp_path / "empty"))


def fill(place, content):
    folder = open_folder(place)
    folder.write("summary.json", json.dumps({"content": content}))
    folder.write("attempt.json", "{}")
    for name in ("a", "b"):
        folder.store.commit(f"{KIND}/{name}", filling(content.encode()))


def check_filled(place, content):
    folder = open_folder(place)
    assert folder.read_json("summary.json") == {"content": content}
    assert folder.has("attempt.json")
    assert [content_of(folder, name) for name in ("a", "b")] == [content.encode() * 100] * 2


def test_a_folder_is_set_aside_under_a_free_name_with_all_that_is_in_it(place):
    write(f"{place}0/x", b"another run's")
    write(join(place.rpartition("/")[0], ".swa-1.lease"), b"beside it")
    for content, slash in (("x", ""), ("y", "/"), ("z", "")):
        fill(place, content)
        set_aside(place + slash, ".attempt-1")
        assert not exists(place)
    for suffix, content in ((".attempt-1", "x"), (".attempt-1-1", "y"), (".attempt-1-2", "z")):
        check_filled(place + suffix, content)
    assert read(f"{place}0/x") == b"another run's"
    assert read(join(place.rpartition("/")[0], ".swa-1.lease")) == b"beside it"


SET_ASIDE = """
import os, sys
from swa_dist.storage.folder import set_aside

for line in sys.stdin:
    url, moment = line.split()
    if (child := os.fork()) == 0:
        os.environ["AWS_SDK_UA_APP_ID"] = f"{os.getpid()}-{moment}"
        set_aside(url, ".aside")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def under(bucket, place):
    return {name.removeprefix(place): bucket.read(name) for name in bucket.names(f"{place}/")}


def test_a_kill_before_any_request_of_setting_aside_loses_nothing_and_can_be_made_good(s3, s3_server):
    """Under the old name is the whole run, or under the new one; and what is left there looks like no run."""
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(s3_server))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"AWS_ENDPOINT_URL": proxy.url}
        victims = stack.enter_context(subprocess.Popen([sys.executable, "-c", SET_ASIDE], env=environment, **pipes))
        codes, bucket = [], Prefix(s3)
        while not codes or codes[-1]:
            place = f"{len(codes)}/swa-1"
            for name in ("summary.json", f"{KIND}/a/{MANIFEST}", f"{KIND}/a/.data-0/model.bin"):
                bucket.write(f"{place}/{name}", name.encode())
            whole = under(bucket, place)
            victims.stdin.write(f"{s3}/{place} {len(codes)}\n")
            victims.stdin.flush()
            codes.append(int(victims.stdout.readline()))
            left, aside = under(bucket, place), under(bucket, f"{place}.aside")
            assert whole in (left, aside)
            if left != whole:
                assert not [name for name in left if name.endswith(("summary.json", MANIFEST))]
            if left:
                set_aside(f"{s3}/{place}", ".aside")
            assert not under(bucket, place)
            assert whole in (under(bucket, f"{place}.aside"), under(bucket, f"{place}.aside-1"))
        victims.stdin.close()
    assert len(codes) > 8
    assert set(codes) == {0, -9}
