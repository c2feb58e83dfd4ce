"""What is committed is wholly there or not there, whatever is thrown, killed, flipped or full."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swa_dist.errors import CheckpointError, ExitCode, OutputError
from swa_dist.storage.files import new_folder, read_json, sha256_file, write_atomic, writing
from swa_dist.storage.store import DiskStore, newest

KIND = "checkpoints"


def filling(content):
    """A `fill` that writes two files of `content`."""

    def fill(folder):
        (folder / "model.bin").write_bytes(content * 100)
        (folder / "facts.json").write_text(json.dumps({"content": content.decode()}))

    return fill


@pytest.fixture
def store(tmp_path):
    return DiskStore(tmp_path / "run")


@pytest.fixture
def three(store):
    for name in ("a", "b", "c"):
        store.commit(f"{KIND}/{name}", filling(name.encode()))
    return store


@pytest.fixture
def unwritable(tmp_path):
    """A place that root can't write either: under a regular file."""
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "sub"


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None:
        pytest.skip("mount is not installed")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def everything_under(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


# Commit, open, names, has, remove


def test_what_was_committed_is_opened(store):
    store.commit(f"{KIND}/a", filling(b"x"))
    folder = store.open(f"{KIND}/a")
    assert (folder / "model.bin").read_bytes() == b"x" * 100
    assert json.loads((folder / "facts.json").read_text()) == {"content": "x"}


def test_the_manifest_names_each_file_with_its_hash_and_size(store):
    store.commit(f"{KIND}/a", filling(b"x"))
    folder = store.open(f"{KIND}/a")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {"model.bin", "facts.json"}
    assert files["model.bin"] == {"sha256": sha256_file(folder / "model.bin"), "bytes": 100}


def test_an_entry_is_not_there_until_it_is_filled(store):
    def fill(folder):
        assert not store.has(f"{KIND}/a")
        assert store.names(KIND) == []
        (folder / "model.bin").write_bytes(b"x")

    store.commit(f"{KIND}/a", fill)
    assert store.has(f"{KIND}/a")


def test_names_are_in_order_and_of_one_kind(three):
    three.commit("candidates/start", filling(b"s"))
    assert three.names(KIND) == [f"{KIND}/{name}" for name in ("a", "b", "c")]
    assert three.names("candidates") == ["candidates/start"]
    assert three.names("absent") == []


def test_committing_a_name_again_replaces_the_entry(three):
    three.commit(f"{KIND}/b", lambda folder: (folder / "only.bin").write_bytes(b"new"))
    folder = three.open(f"{KIND}/b")
    assert {path.name for path in folder.iterdir()} == {"only.bin", "manifest.json"}
    assert three.names(KIND) == [f"{KIND}/{name}" for name in ("a", "b", "c")]


def test_a_removed_entry_is_gone_and_the_others_are_not(three):
    three.remove(f"{KIND}/b")
    assert not three.has(f"{KIND}/b")
    assert three.names(KIND) == [f"{KIND}/a", f"{KIND}/c"]
    with pytest.raises(CheckpointError):
        three.open(f"{KIND}/b")


def test_removing_what_is_not_there_changes_nothing(three):
    three.remove(f"{KIND}/z")
    assert three.names(KIND) == [f"{KIND}/{name}" for name in ("a", "b", "c")]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_an_exception_in_fill_leaves_nothing(store, error):
    def fill(folder):
        (folder / "model.bin").write_bytes(b"half")
        raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        store.commit(f"{KIND}/a", fill)
    assert not store.has(f"{KIND}/a")
    assert everything_under(store.root) <= {Path(KIND)}


def test_an_exception_in_fill_leaves_the_entry_that_was_there(three):
    before = three.open(f"{KIND}/b").joinpath("model.bin").read_bytes()

    def fill(folder):
        (folder / "model.bin").write_bytes(b"half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        three.commit(f"{KIND}/b", fill)
    assert three.open(f"{KIND}/b").joinpath("model.bin").read_bytes() == before


# Damage


def flip(path, bit=0, at=50):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [flip, truncate, lengthen, Path.unlink], ids=lambda d: d.__name__)
def test_a_damaged_file_is_refused_by_name(three, damage):
    path = three.root / KIND / "b" / "model.bin"
    damage(path)
    with pytest.raises(CheckpointError, match=str(path)):
        three.open(f"{KIND}/b")
    three.open(f"{KIND}/a")


def test_a_missing_manifest_is_refused_by_name(three):
    (three.root / KIND / "b" / "manifest.json").unlink()
    assert not three.has(f"{KIND}/b")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        three.open(f"{KIND}/b")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"files": []}', '{"files": {"model.bin": {}}}'])
def test_a_manifest_that_is_none_is_refused_by_name(three, text):
    (three.root / KIND / "b" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(three.root / KIND / "b")):
        three.open(f"{KIND}/b")


def test_no_flipped_bit_of_a_manifest_is_worse_than_a_damaged_entry(store):
    """Every bit: what opens has the content that was committed, all else is a CheckpointError."""
    store.commit(f"{KIND}/a", lambda folder: (folder / "m").write_bytes(b"x"))
    manifest = store.root / KIND / "a" / "manifest.json"
    whole, failed = manifest.read_bytes(), []
    for at in range(len(whole)):
        for bit in range(8):
            flip(manifest, bit, at)
            try:
                assert (store.open(f"{KIND}/a") / "m").read_bytes() == b"x"
            except CheckpointError:
                pass
            except Exception as error:
                failed.append(f"bit {bit} of byte {at}: {error!r}")
            manifest.write_bytes(whole)
    assert not failed, "\n".join(failed[:5])


def test_the_newest_whole_entry_is_found_and_nothing_is_said(three):
    said = []
    assert newest(three, KIND, said.append) == f"{KIND}/c"
    assert said == []
    assert newest(three, "absent", said.append) is None


def test_a_damaged_newest_entry_is_named_set_aside_and_the_one_before_it_returned(three):
    damaged = three.root / KIND / "c" / "model.bin"
    flip(damaged)
    content, said = damaged.read_bytes(), []
    assert newest(three, KIND, said.append) == f"{KIND}/b"
    assert len(said) == 1
    assert str(damaged) in said[0]
    assert three.names(KIND) == [f"{KIND}/a", f"{KIND}/b"]
    (aside,) = [path for path in (three.root / KIND).iterdir() if path.name.startswith(".corrupt-")]
    assert aside.name in said[0]
    assert (aside / "model.bin").read_bytes() == content


def test_what_was_set_aside_is_not_looked_at_again_and_its_name_is_free(three):
    for _ in range(2):
        flip(three.root / KIND / "c" / "model.bin")
        newest(three, KIND, lambda message: None)
        said = []
        assert newest(three, KIND, said.append) == f"{KIND}/b"
        assert said == []
        three.commit(f"{KIND}/c", filling(b"again"))
    assert newest(three, KIND, said.append) == f"{KIND}/c"


def test_where_every_entry_is_damaged_there_is_none_and_each_is_named(three):
    for name in ("a", "b", "c"):
        truncate(three.root / KIND / name / "facts.json")
    said = []
    assert newest(three, KIND, said.append) is None
    assert len(said) == 3


def test_sweep_removes_what_is_half_written_and_nothing_else(three):
    (three.root / KIND / ".staging-d-123").mkdir()
    (three.root / KIND / ".staging-d-123" / "model.bin").write_bytes(b"half")
    flip(three.root / KIND / "c" / "model.bin")
    newest(three, KIND, lambda message: None)
    before = everything_under(three.root)
    three.sweep(KIND)
    gone = before - everything_under(three.root)
    assert gone == {Path(KIND) / ".staging-d-123", Path(KIND) / ".staging-d-123" / "model.bin"}
    three.sweep("absent")


# Kills

LIFE = """
import os, sys
from pathlib import Path
from swa_dist.storage.store import DiskStore

def fill(folder, number):
    for file in ("model.bin", "momentum.bin"):
        (folder / file).write_bytes(b"%06d" % number * 2000)

def life(store, journal, first, last):
    for number in range(first, last):
        store.commit(f"checkpoints/{number:06d}", lambda folder: fill(folder, number))
        os.write(journal, b"%d\\n" % number)
        for name in store.names("checkpoints")[:-2]:
            store.remove(name)
"""

KILLED_ANYWHERE = (
    LIFE
    + """
import signal
TOUCHING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
root = Path(sys.argv[1])
for lives in range(1000):
    (root / str(lives)).mkdir()
    if (child := os.fork()) == 0:
        left = lives

        def count(event, arguments):
            global left
            if event in TOUCHING:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        journal = os.open(root / str(lives) / "journal", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        sys.addaudithook(count)
        life(DiskStore(root / str(lives)), journal, 0, 4)
        os._exit(0)
    if os.WIFEXITED(os.waitpid(child, 0)[1]):
        break
"""
)

KILLED_SOMETIME = (
    LIFE
    + """
root = Path(sys.argv[1])
journal = os.open(root / "journal", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
print("begun", flush=True)
life(DiskStore(root), journal, int(sys.argv[2]), 10**6)
"""
)


def check_what_a_kill_left(root):
    """The newest entry opens, is whole and is at least the last that was said to be committed."""
    store, said = DiskStore(root), []
    committed = [int(line) for line in (root / "journal").read_text().split()]
    last = newest(store, KIND, said.append)
    if last is None:
        assert not committed
    else:
        number = int(last.removeprefix(f"{KIND}/"))
        assert number >= max(committed, default=0)
        for file in ("model.bin", "momentum.bin"):
            assert (store.open(last) / file).read_bytes() == b"%06d" % number * 2000
    store.sweep(KIND)
    folder = root / KIND
    assert not folder.is_dir() or not [path for path in folder.iterdir() if path.name.startswith(".staging-")]
    return said


def test_a_kill_before_any_touch_of_the_disk_leaves_a_store_that_opens(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED_ANYWHERE, str(tmp_path)], check=True)
    lives = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert len(lives) > 40  # each touch of four commits and two removals
    for root in lives:
        assert check_what_a_kill_left(root) == [], f"killed before touch {root.name}"
    assert (lives[-1] / "journal").read_text().split() == ["0", "1", "2", "3"]


def test_a_loop_of_commits_killed_at_random_moments_always_goes_on(tmp_path):
    moments = random.Random(0)
    for _ in range(10):
        first = int((DiskStore(tmp_path).names(KIND) or [f"{KIND}/-1"])[-1].removeprefix(f"{KIND}/")) + 1
        arguments = [sys.executable, "-c", KILLED_SOMETIME, str(tmp_path), str(first)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=moments.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert check_what_a_kill_left(tmp_path) == []
    assert (tmp_path / "journal").read_text().split() != []


def test_a_kill_while_an_entry_is_replaced_leaves_the_others_and_never_a_mix(tmp_path):
    script = KILLED_ANYWHERE.replace(
        "life(DiskStore(root / str(lives)), journal, 0, 4)", "again(DiskStore(root / str(lives)))"
    )
    again = """
def again(store):
    store.commit("checkpoints/000002", lambda folder: fill(folder, 9))

def before(store):
    for number in (1, 2):
        store.commit(f"checkpoints/{number:06d}", lambda folder: fill(folder, number))
"""
    script = script.replace("import signal\n", "import signal\n" + again, 1)
    script = script.replace(
        "    if (child := os.fork())", "    before(DiskStore(root / str(lives)))\n    if (child := os.fork())"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert len(list(tmp_path.iterdir())) > 10
    for root in tmp_path.iterdir():
        store = DiskStore(root)
        last = newest(store, KIND, lambda message: None)
        content = {file: (store.open(last) / file).read_bytes() for file in ("model.bin", "momentum.bin")}
        assert content["model.bin"] == content["momentum.bin"]
        assert content["model.bin"] in [b"%06d" % n * 2000 for n in ((2, 9) if last.endswith("2") else (1,))]
        assert store.open(f"{KIND}/000001").is_dir()


# Atomic files


def test_write_atomic_makes_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "deep" / "er" / "summary.json"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_text_is_written_as_utf8_with_its_line_ends(tmp_path):
    write_atomic(tmp_path / "text", "ü\r\n😀")
    assert (tmp_path / "text").read_bytes() == "ü\r\n😀".encode()


def test_write_atomic_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 3)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_as_readable_as_one_written_plainly(tmp_path):
    """Other users of a shared folder (a server of MLflow, workers elsewhere) read the same files."""
    (tmp_path / "plain").write_text("x")
    write_atomic(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_reader_meets_the_old_or_the_new_file_and_nothing_between(tmp_path):
    path = tmp_path / "file"
    script = (
        "import sys; from pathlib import Path; from swa_dist.storage.files import write_atomic\n"
        "for i in range(10**6): write_atomic(Path(sys.argv[1]), bytes([48 + i % 10]) * 200_000)"
    )
    write_atomic(path, b"0" * 200_000)
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as process:
        seen, until = set(), time.monotonic() + 20
        while len(seen) < 5 and time.monotonic() < until:
            content = path.read_bytes()
            assert len(content) == 200_000
            assert len(set(content)) == 1
            seen.add(content[:1])
        process.kill()
    assert len(seen) >= 5


def test_json_is_read_or_named_as_damaged(tmp_path):
    assert read_json(tmp_path / "absent.json") is None
    write_atomic(tmp_path / "good.json", '{"a": 1}')
    assert read_json(tmp_path / "good.json") == {"a": 1}
    for damaged in ('{"a": ', "", "[1]", b"\xff\xfe"):
        write_atomic(tmp_path / "bad.json", damaged)
        with pytest.raises(CheckpointError, match=r"bad\.json"):
            read_json(tmp_path / "bad.json")


# New folders


def test_a_new_folder_is_there_when_its_block_ends_and_not_before(tmp_path):
    target = tmp_path / "data"
    with new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_folder_whose_block_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").touch()

    def fail():
        with new_folder(target) as folder:
            (folder / "new").touch()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        fail()
    assert everything_under(tmp_path) == {Path("data"), Path("data/old")}


# Folders that can't be written and full disks


def test_an_output_error_has_exit_code_73():
    assert OutputError.exit_code == ExitCode.OUTPUT == 73


def test_a_folder_that_cannot_be_written_is_an_output_error_that_names_it(unwritable):
    def make(path):
        with new_folder(path):
            pass

    for write in (
        lambda: DiskStore(unwritable).commit(f"{KIND}/a", filling(b"x")),
        lambda: write_atomic(unwritable / "summary.json", "x"),
        lambda: make(unwritable / "data"),
    ):
        with pytest.raises(OutputError, match="must be writable") as caught:
            write()
        assert str(unwritable) in str(caught.value)


def test_a_full_disk_is_an_output_error_and_the_entries_before_it_stay(full_disk):
    store = DiskStore(full_disk / "run")
    store.commit(f"{KIND}/a", filling(b"x"))
    for size in (2_000_000, 900_000):  # in one file, and in two that are each small enough
        with pytest.raises(OutputError, match="full") as caught:
            store.commit(
                f"{KIND}/b", lambda folder, size=size: [(folder / f).write_bytes(bytes(size)) for f in ("m", "n")]
            )
        assert f"{full_disk}/run/{KIND}/b" in str(caught.value)
    said = []
    assert newest(store, KIND, said.append) == f"{KIND}/a"
    assert said == []
    assert {path.name for path in (store.root / KIND).iterdir()} == {"a"}
    store.commit(f"{KIND}/b", filling(b"y"))  # the failed ones hold no space


def test_write_atomic_on_a_full_disk_leaves_the_old_file(full_disk):
    write_atomic(full_disk / "summary.json", "old")
    with pytest.raises(OutputError, match="full"):
        write_atomic(full_disk / "summary.json", bytes(2_000_000))
    assert (full_disk / "summary.json").read_text() == "old"
    assert [path.name for path in full_disk.iterdir()] == ["summary.json"]


def test_an_output_error_of_dev_full_says_that_the_disk_is_full():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with pytest.raises(OutputError, match="full"), writing(Path("x")), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


# Weights


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from swa_dist.errors import OutputError
from swa_dist.storage.store import DiskStore
from swa_dist.training.state import load_entry, save_entry
store = DiskStore(Path(sys.argv[1]))
save_entry(store, "checkpoints/1", {"model": {"w": torch.ones(10)}}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_entry(store, "checkpoints/2", {"model": {"w": torch.ones(1_000_000)}}, {})
except OutputError as error:
    print(error.exit_code, store.names("checkpoints"), load_entry(store, "checkpoints/1")[0]["model"]["w"].sum().item())
"""


def test_weights_that_do_not_fit_are_an_output_error_and_the_entry_before_stays(tmp_path):
    result = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.split(maxsplit=1) == ["73", "['checkpoints/1'] 10.0\n"]
