"""An attempt that did not end well leaves a file that says why, what to do, and nothing that is secret."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from swa_dist import errors
from swa_dist.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    OutOfMemoryError,
    OutputError,
    ServiceError,
    Stopped,
    SwaDistError,
)
from swa_dist.service import post_mortem
from swa_dist.service.environment import redact
from swa_dist.service.layout import SUMMARY
from swa_dist.service.submit import RECIPE_VARIABLE
from swa_dist.service.worker_log import WorkerLog, ending, log_name
from swa_dist.storage.folder import is_s3, join, open_folder, read
from swa_dist.training import checkpoints
from swa_dist.training.state import save_entry
from tests.support import free_port, start_workers

RECIPE = "name: digits\noptim:\n  epochs: 5\n"
ROWS = [
    {"position": n, "epoch": n / 400, "time_ms": 1_764_000_000_000 + n, "metrics": {"train/loss": n / 1000}}
    for n in range(100, 900, 100)
]


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path):
    return open_folder(
        str(tmp_path / "runs" / "swa-1") if request.param == "disk" else request.getfixturevalue("s3") + "/runs/swa-1"
    )


def a_folder(tmp_path):
    return open_folder(str(tmp_path / "runs" / "swa-1"))


def commit(folder, position, rows=ROWS):
    facts = {"position": position, "rows": rows}
    save_entry(folder.store, f"checkpoints/{position:012d}", {"model": {"w": torch.zeros(3)}}, facts)


def written(folder, error, attempt=1):
    """The post-mortem's text, read from where it is said to be."""
    address = post_mortem.write(folder, attempt, error, RECIPE)
    assert address == join(folder.url, f"post-mortem-a{attempt}.md")
    return read(address).decode()


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


# What it says


def test_a_post_mortem_says_why_where_the_run_got_to_and_what_each_worker_said_last(folder):
    commit(folder, 400)
    commit(folder, 880)
    save_entry(folder.store, "candidates/start", {"model": {"w": torch.zeros(3)}}, {})
    for rank in range(2):
        with WorkerLog(folder, 3, rank, 2, "cpu") as log:
            log.say(f"hello from {rank}")
    text = written(open_folder(folder.url), raised(ServiceError("MLflow must answer, but does not.")), attempt=3)
    assert text.startswith("# swa-1, attempt 3: why it ended\n\n**MLflow must answer, but does not.**")
    assert "It ended by ServiceError, with exit code 69." in text
    assert re.search(r"`checkpoints/000000000880`, at image 880 \(epoch 2\.20\), committed 0:00:\d\d ago", text)
    assert "scored already: start." in text
    assert "image 800, epoch 2.000: train/loss 0.8" in text
    assert "image 300," not in text
    assert [f"hello from {rank}" in text.split(f"### rank {rank}\n")[1] for rank in (0, 1)] == [True, True]
    assert "in raised\n    raise error" in text
    assert RECIPE.rstrip() in text.split("## Configuration")[1]


def test_the_age_is_that_of_the_checkpoint(tmp_path):
    folder = a_folder(tmp_path)
    commit(folder, 400)
    an_hour_ago = time.time() - 3600
    os.utime(folder.local / "checkpoints/000000000400/manifest.json", (an_hour_ago, an_hour_ago))
    assert re.search(r"committed 1:00:0\d ago", written(folder, None))


def test_a_run_of_which_nothing_was_committed_or_said_is_told_so(folder):
    text = written(folder, raised(DataError("an image must be whole.")))
    assert "no checkpoint was committed; scored already: nothing." in text
    assert "No metrics were committed." in text
    assert "There are no logs of this attempt" in text


def test_an_entry_that_is_no_checkpoint_does_not_count_as_one(tmp_path):
    folder = a_folder(tmp_path)
    commit(folder, 400)
    (folder.local / "checkpoints" / "000000000800").mkdir()  # half removed
    assert "`checkpoints/000000000400`, at image 400" in written(folder, None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"position": 1, "rows": [{}]}'])
def test_a_damaged_checkpoint_is_named_and_the_rest_is_said_all_the_same(tmp_path, content):
    folder = a_folder(tmp_path)
    commit(folder, 400)
    (folder.local / "checkpoints/000000000400/facts.json").write_text(content)
    with WorkerLog(folder, 1, 0, 1, "cpu") as log:
        log.say("hello")
    text = written(folder, raised(CheckpointError("it is damaged.")))
    assert "`checkpoints/000000000400`, whose facts.json can't be read" in text
    assert "hello" in text


def test_names_of_entries_are_those_that_training_gives_them():
    assert (post_mortem._CHECKPOINTS, post_mortem._CANDIDATES) == (checkpoints.CHECKPOINTS, checkpoints.CANDIDATES)


def test_a_kill_is_told_as_one_by_the_start_that_finds_it(tmp_path):
    text = written(a_folder(tmp_path), None)
    assert "It left no word here: its process was killed" in text
    assert "Traceback" not in text


def test_the_environment_is_told_and_only_variables_that_are_known_to_be_harmless(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("SOME_SETTING", "unheard-of-value")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pass@mlflow.example")
    text = written(a_folder(tmp_path), None).split("## Environment")[1]
    for expected in (
        f"torch: {torch.__version__.partition('+')[0]}",
        f"python: {sys.version.split()[0]}",
        "ray: 2.",
        "mlflow: ",
        "torchvision: ",
        "nvidia-dali-cuda130: ",
        "swa_dist: ",
        f"host: {os.uname().nodename}",
        f"CPUs: {os.cpu_count()}",
        "GPUs: ",
        "GiB free",
        "NCCL_DEBUG=INFO",
        "LOCAL_RANK=3",
        "MLFLOW_TRACKING_URI=https://[redacted]@mlflow.example",
    ):
        assert expected in text
    assert "not known" not in text
    assert re.search(rf"free disk: \d+\.\d GiB at {tmp_path}", text)
    assert "unheard-of-value" not in text


# What to do next


KINDS = {
    ConfigError: "Change the recipe",
    DataError: "Mend the images",
    CheckpointError: "A damaged checkpoint is set aside",
    NumericsError: "Resume once",
    OutOfMemoryError: "`data.group_images` smaller",
    ServiceError: "swa-dist doctor",
    OutputError: "Free space",
    BusyError: "Let that one go on",
    Stopped: "Nothing went wrong",
    SwaDistError: "Do as the reason says",
    KeyboardInterrupt: "it was interrupted",
    torch.OutOfMemoryError: "`data.group_images` smaller",
    MemoryError: "`data.group_images` smaller",
    RuntimeError: "This is a bug: report it, with this file",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_has_its_next_step_and_the_command_that_resumes(tmp_path, kind):
    folder = a_folder(tmp_path)
    text = written(folder, raised(kind("this and that.")))
    step = text.split("## What to do next")[1].split("##")[0]
    assert KINDS[kind] in step
    assert f"```text\nswa-dist finetune {folder.url}/recipe.yaml\n```" in step


def test_no_kind_of_error_is_without_a_next_step_of_its_own():
    kinds = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, SwaDistError)}
    assert {one.__name__ for one in kinds} <= set(post_mortem._NEXT)


def test_a_full_disk_that_nobody_foresaw_is_not_taken_for_a_bug(tmp_path):
    assert "Free space" in written(a_folder(tmp_path), raised(OSError(errno.ENOSPC, "No space left on device")))


def test_the_command_is_one_for_where_the_run_was_started(tmp_path, s3, monkeypatch):
    on_disk, on_s3 = open_folder(str(tmp_path / "my runs" / "swa-1")), open_folder(f"{s3}/swa-1")
    assert f"swa-dist finetune '{on_disk.url}/recipe.yaml'" in written(on_disk, None)
    assert "Save the configuration below as recipe.yaml. The command that resumes it" in written(on_s3, None)
    monkeypatch.setenv(RECIPE_VARIABLE, "{}")
    assert "swa-dist submit recipe.yaml --address http://HEAD:8265" in written(on_s3, None)
    monkeypatch.delenv(RECIPE_VARIABLE)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert "torchrun --nnodes 2 --nproc-per-node 8 -m swa_dist finetune recipe.yaml" in written(on_s3, None)


# Stacks


def test_the_stacks_of_ranks_that_hang_alike_are_told_once_and_apart_from_the_odd_one(tmp_path):
    folder = a_folder(tmp_path)
    workers = start_workers(hang_in_one_of_two_places, 3, folder.url)
    try:
        deadline = time.monotonic() + 20
        while not all((read(join(folder.url, log_name(1, rank))) or b"").count(b"File") for rank in range(3)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.2)
    finally:
        workers.kill()
    text = written(folder, raised(ServiceError("every worker must answer.")))
    stacks, said = text.split("## Stacks of hangs and crashes")[1].split("## What the workers said last")
    assert "### rank 0, 2\n" in stacks
    assert "### rank 1\n" in stacks
    assert stacks.count("wait_for_the_others") == 1
    assert "decode_a_damaged_image" in stacks.split("### rank 1\n")[1]
    assert "most recent call first" not in said


def hang_in_one_of_two_places(world, url):
    with WorkerLog(open_folder(url), 1, world.rank, world.size, world.device) as log:
        log.alive(0.1)
        decode_a_damaged_image() if world.rank == 1 else wait_for_the_others()


def wait_for_the_others():
    time.sleep(60)


def decode_a_damaged_image():
    time.sleep(60)


def test_of_several_dumps_the_last_is_told_and_what_threads_said_meanwhile_is_no_part_of_it():
    stamp = "2026-01-01T00:00:00.000Z "
    first = ["Timeout (0:00:01)!", "Thread 0x01 (most recent call first):", '  File "a.py", line 1 in a']
    second = ["Fatal Python error: Aborted", "", "Current thread 0x02 (most recent call first):", '  File "b.py"']
    found = ending("\n".join([f"{stamp}x", *first, f"{stamp}y", "  more of y", *second[:3], f"{stamp}z", *second[2:]]))
    assert found.said == [f"{stamp}x", f"{stamp}y", "  more of y", f"{stamp}z"]
    assert found.stacks == [*second[:3], *second[2:]]
    assert ending("\n".join([*first, f"{stamp}y"])).said_more
    assert not ending("\n".join([f"{stamp}y", *first])).said_more


def test_logs_of_many_workers_and_of_great_length_stay_readable(tmp_path):
    folder = a_folder(tmp_path)
    for rank in range(200):
        path = folder.local / log_name(1, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"2026-01-01T00:00:00.000Z line {n} of {rank}\n" for n in range(100)))
    path.write_text("x" * 3_000_000 + "\n2026-01-01T00:00:00.000Z the end\n")
    text = written(folder, None)
    assert len(text) < 100_000
    assert "line 99 of 0\n" in text
    assert "the end" in text


def test_what_looks_like_the_end_of_a_block_stays_in_it(tmp_path):
    folder = a_folder(tmp_path)
    with WorkerLog(folder, 1, 0, 1, "cpu") as log:
        log.say("```\n# a heading")
    text = written(folder, None)
    assert "````text\n" in text
    assert text.index("# a heading") < text.rindex("````\n")


# Secrets


def test_no_secret_of_the_environment_or_of_an_address_is_in_it_wherever_it_was_said(folder, monkeypatch):
    planted = {
        "SOME_API_KEY": "sk-1234567890",
        "DB_PASSWORD": "p@ss/w\"or'd&1",
        "A_TOKEN": "-----BEGIN-----\nfirst-line-of-it\nsecond-line-of-it",
        "aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG",
        "NOT_TEXT_SECRET": os.fsdecode(b"\xff-not-text"),
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    said = (
        " ".join([*planted.values(), repr(planted["DB_PASSWORD"]), json.dumps(planted["DB_PASSWORD"])])
        + " p%40ss%2Fw%22or%27d%261 postgresql://someone:very/s@cret@db:5432/x https://ghp_abcdef@host/x.git"
        + " https://host/x?a=b&X-Amz-Signature=0123abcd&c=d Authorization: Bearer abcdefgh.ijkl"
    )
    with WorkerLog(folder, 1, 0, 1, "cpu") as log:
        log.say(said)
    monkeypatch.setenv("RAY_ADDRESS", "ray://someone:very-s3cret@host:10001")
    cause = raised(RuntimeError(said))
    error = OutputError(f"{'x' * (post_mortem._REASON_CHARACTERS - 8)}sk-1234567890")  # where the reason is cut short
    error.__cause__ = cause
    text = written(folder, raised(error))
    for secret in (
        "sk-123",
        "p@ss",
        "p%40ss",
        "or'd&1",
        "or\\'d&1",
        "first-line",
        "second-line",
        "wJalr",
        "not-text",
        "someone",
        "cret@",
        "very",
        "ghp_",
        "0123abcd",
        "ijkl",
    ):
        assert secret not in text, secret
    assert "&c=d" in text
    assert "ray://[redacted]@host:10001" in text


def test_what_is_no_secret_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    plain = "s3://bucket/run@2/x, models:/digits@champion, http://host:5000/x, a@b.c is false, a bearer of news"
    assert redact(plain) == plain


# Where it goes


def test_it_lies_where_the_run_is_and_nowhere_else(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    assert post_mortem.missing(folder, 2)
    assert "attempt 2" in written(folder, None, attempt=2)
    assert not post_mortem.missing(open_folder(folder.url), 2)
    assert post_mortem.missing(folder, 1)
    assert is_s3(folder.url) or [path.name for path in folder.local.iterdir()] == ["post-mortem-a2.md"]
    assert not list((tmp_path / "scratch").glob("*.md"))


def test_an_attempt_that_finished_or_never_was_is_not_missing(folder):
    assert not post_mortem.missing(folder, 0)
    folder.write(SUMMARY, "{}")
    assert not post_mortem.missing(folder, 1)


def test_where_the_folder_can_not_be_written_it_goes_among_the_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "runs").write_text("a file")
    address = post_mortem.write(a_folder(tmp_path), 1, raised(OutputError("it is full.")), RECIPE)
    assert Path(address).parent == tmp_path
    assert address.endswith("-post-mortem-a1.md")
    assert "it is full." in Path(address).read_text()


def test_s3_that_is_away_does_not_keep_it_from_being_written_here(s3, tmp_path, monkeypatch):
    folder = open_folder(f"{s3}/swa-1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    text = Path(post_mortem.write(folder, 1, raised(ServiceError("S3 must answer.")), RECIPE)).read_text()
    assert "Not all of the run's folder could be read: S3 must list" in text
    assert "S3 must answer." in text


def test_where_it_can_be_written_nowhere_nothing_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    (tmp_path / "runs").write_text("a file")
    assert post_mortem.write(a_folder(tmp_path), 1, raised(OutputError("it is full.")), RECIPE) is None


def test_a_second_ctrl_c_does_not_take_the_place_of_the_first(tmp_path):
    folder = a_folder(tmp_path)
    commit(folder, 400)
    facts = folder.local / "checkpoints/000000000400/facts.json"
    facts.unlink()
    os.mkfifo(facts)  # reading it waits, until the signal comes
    # To this thread: another that got it would not end the wait.
    threading.Timer(0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    assert post_mortem.write(folder, 1, raised(KeyboardInterrupt()), RECIPE) is None


def test_an_error_that_can_not_say_what_it_is_does_not_raise_another(tmp_path):
    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    assert "MuteError that says nothing" in written(a_folder(tmp_path), raised(MuteError()))


def test_starting_with_it_does_not_import_torch():
    code = "import sys, swa_dist.service.post_mortem; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
