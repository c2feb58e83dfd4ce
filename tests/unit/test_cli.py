"""The command line: each foreseen mistake ends with its own exit code and one message, and with no traceback."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

from swa_dist import cli, config, models
from swa_dist.config import Model

JOBS = Path(__file__).parents[2] / "jobs"
SHIPPED = sorted(path.stem for path in JOBS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder and a home of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process: its exit code, what it printed, and its errors.

    An error that is not foreseen is raised here, and fails the test.
    """

    def run_command(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["swa-dist", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run_command


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A small network's weights for the digits."""
    path = tmp_path_factory.mktemp("cli") / "start.safetensors"
    network = models.build(Model(arch="mobilenet_v3_small", weights="none", num_classes=10), seed=0)
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.fixture
def small(digits, start, here):
    """Settings that make the shipped recipe `digits` run on these."""
    settings = {
        "model.arch": "mobilenet_v3_small",
        "model.weights": start,
        "data.train": digits / "train",
        "data.val": digits / "val",
        "tracking.uri": f"sqlite:///{here / 'mlflow.db'}",
        "output.dir": here / "runs",
    }
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def fingerprint_in(out):
    return re.search(r"fingerprint ([0-9a-f]{12})\b", out)[1]


# Usage


def test_help_names_every_verb_and_ends_well(run):
    code, out, _ = run("--help")
    assert code == 0
    for verb in (
        *("quickstart", "finetune", "submit", "status", "logs", "stop", "render", "doctor"),
        *("check", "show", "schema", "replay", "data", "evaluate", "recalibrate"),
    ):
        assert verb in out


@pytest.mark.parametrize(
    "arguments",
    [["finetun", "digits"], ["check"], ["check", "digits", "--sett", "a=b"], ["data", "verbless"], ["check", "a", "b"]],
    ids=" ".join,
)
def test_a_command_that_is_none_is_a_usage_error(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage:" in err


@pytest.mark.parametrize("verb", [[], ["quickstart"], ["finetune"], ["data"], ["data", "index"]], ids=" ".join)
def test_every_verb_has_help(run, verb):
    for flag in ("-h", "--help"):
        assert run(*verb, flag)[0] == 0


# Recipes


@pytest.mark.parametrize("verb", ["check", "show", "finetune"])
def test_an_unknown_recipe_lists_those_that_are_shipped(run, verb):
    code, out, err = run(verb, "resnet51")
    assert (code, out) == (78, "")
    assert err.startswith("swa-dist: `RECIPE` must be")
    assert "'resnet51'" in err
    for name in SHIPPED:
        assert name in err


def test_a_recipe_file_that_is_not_there_is_named(run):
    code, _, err = run("check", "absent.yaml")
    assert code == 78
    assert "absent.yaml does not exist" in err


@pytest.mark.parametrize("verb", ["check", "show", "finetune"])
def test_a_misspelt_key_is_explained(run, verb):
    code, out, err = run(verb, "digits", "--set", "optim.epocs=3")
    assert (code, out) == (78, "")
    assert "`optim.epocs` is not a setting; did you mean `epochs`?" in err


def test_a_misspelt_key_ends_the_quickstart_before_it_writes_anything(run, here):
    code, _, err = run("quickstart", "--set", "optim.epocs=3")
    assert code == 78
    assert "did you mean `epochs`" in err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_has_no_problems(run, name):
    code, out, err = run("check", name)
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: no problems. fingerprint ")


def test_check_takes_overrides_and_says_another_fingerprint(run):
    _, plain, _ = run("check", "digits")
    code, other, _ = run("check", "digits", "--set", "seed=1", "--set", "optim.epochs=10")
    assert code == 0
    assert fingerprint_in(other) != fingerprint_in(plain)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_show_prints_is_a_recipe_with_the_same_fingerprint(run, here, name):
    _, text, _ = run("show", name)
    (here / "shown.yaml").write_text(text)
    _, again, _ = run("check", "shown.yaml")
    assert fingerprint_in(again) == fingerprint_in(run("check", name)[1])
    assert run("show", "shown.yaml")[1] == text


def test_schema_is_json(run):
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out) == config.schema()


@pytest.mark.parametrize("arguments", [["check", "digits"], ["check", "digits", "--set", "seed=-1"], ["check", "nope"]])
def test_the_program_ends_as_it_does_here(run, arguments):
    """The real process: `python -m swa_dist` and the installed `swa-dist`."""
    code, out, err = run(*arguments)
    for program in ([sys.executable, "-m", "swa_dist"], [str(Path(sys.executable).with_name("swa-dist"))]):
        process = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
        assert (process.returncode, process.stdout, process.stderr) == (code, out, err)


# Data


def images_under(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_data_digits_writes_400_training_images_and_is_idempotent(run, here):
    code, out, _ = run("data", "digits", "made/here")
    assert code == 0
    assert "400 images" in out
    first = images_under(here / "made" / "here")
    assert sum(path.parts[0] == "train" for path in first) == 400
    assert sum(path.parts[0] == "val" for path in first) == 1397
    assert {path.parts[1] for path in first} == {str(digit) for digit in range(10)}
    assert run("data", "digits", "made/here")[0] == 0
    assert images_under(here / "made" / "here") == first
    assert [path.name for path in (here / "made").iterdir()] == ["here"]


def test_data_digits_writes_the_same_bytes_each_time(run, here, digits):
    run("data", "digits", "data")
    assert images_under(here / "data") == images_under(digits)


def test_data_digits_never_says_that_images_are_there_which_are_not(run, here):
    (here / "empty").mkdir()
    code, out, _ = run("data", "digits", "empty")
    assert ("400 images" in out and code == 0) == (len(images_under(here / "empty")) == 1797)


def test_data_digits_into_a_place_that_cannot_be_written_is_an_output_error(run, here):
    (here / "file").touch()
    code, _, err = run("data", "digits", "file/data")
    assert code == 73
    assert str(Path("file/data")) in err


def test_data_index_counts_images_and_classes_and_says_the_digest(run, here, digits):
    code, out, _ = run("data", "index", digits / "train", "--out", "train.parquet")
    assert code == 0
    assert re.search(r"400 images, 10 classes, digest [0-9a-f]{64}\n$", out)
    assert (here / "train.parquet").is_file()


def test_data_index_names_every_damaged_file(run, here, digits):
    bad = here / "train"
    for number in range(3):
        (bad / "cat").mkdir(parents=True, exist_ok=True)
        (bad / "cat" / f"{number}.jpg").write_text("no image")
    code, _, err = run("data", "index", "train")
    assert code == 65
    assert "3 of 3" in err
    for number in range(3):
        assert str(bad / "cat" / f"{number}.jpg") in err


@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_data_index_of_no_data_set_names_the_folder(run, here, what):
    (here / "empty").mkdir()
    (here / "file").touch()
    code, _, err = run("data", "index", what)
    assert code == 65
    assert str(here / what) in err


def test_data_index_that_cannot_be_written_is_an_output_error(run, here, digits):
    (here / "file").touch()
    code, _, err = run("data", "index", digits / "train", "--out", "file/train.parquet")
    assert code == 73
    assert "file/train.parquet" in err


@pytest.fixture
def indexed(here, digits):
    """Settings that name the digits and an index of them that is yet to be written."""
    settings = {"data.train": digits / "train", "data.val": digits / "val", "data.index": here / "index"}
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def test_data_index_of_a_recipe_writes_both_splits_and_is_what_a_scan_finds(run, here, indexed):
    code, out, _ = run("data", "index", "--recipe", "digits", *indexed)
    assert code == 0
    assert re.search(r"index: indices of train and val, digest [0-9a-f]{64}\n$", out)
    assert sorted(path.name for path in (here / "index").iterdir()) == ["train.parquet", "val.parquet"]


@pytest.mark.parametrize("arguments", [(), ("folder", "--recipe", "digits")])
def test_data_index_takes_a_folder_or_a_recipe(run, arguments):
    code, _, err = run("data", "index", *arguments)
    assert code == 2
    assert "either SRC or --recipe" in err


def test_data_index_of_a_recipe_that_names_none_says_what_to_set(run):
    code, _, err = run("data", "index", "--recipe", "digits")
    assert code == 78
    assert "data.index=FOLDER" in err


def test_a_named_index_of_images_that_are_not_there_is_a_data_error_that_says_how_to_refresh_it(run, here, indexed):
    assert run("data", "index", "--recipe", "digits", *indexed)[0] == 0
    (here / "moved").mkdir()
    process = ["--set", "cluster.launcher=process", "--set", "cluster.num_workers=1"]
    code, _, err = run("finetune", "digits", *indexed, *process, "--set", f"data.train={here / 'moved'}")
    assert code == 65
    assert "swa-dist data index" in err
    assert str(here / "moved") in err


# Submissions that can't begin


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("submit", "digits"), 78, "--address"),
        (("status",), 78, "--address"),
        (("logs", "swa-0123456789ab-a1"), 78, "--address"),
        (("stop", "swa-0123456789ab-a1"), 78, "--address"),
        (("stop", "absent"), 78, "must be the folder of a run"),
        (("submit", "digits", "--to", "moon"), 2, "--to"),
        (("submit", "digits", "--to", "kube", "--overlay", "absent"), 78, "cpu-smoke"),
        (("submit", "digits", "--to", "kube", "--template", "absent.yaml"), 78, "absent.yaml"),
        (("status", "--address", "http://127.0.0.1:1", "--ca-file", "absent.pem"), 78, "absent.pem"),
        (("check", "env:SWA_DIST_ABSENT"), 78, "SWA_DIST_ABSENT"),
    ],
)
def test_a_submission_that_cannot_be_is_refused_with_its_code(run, monkeypatch, arguments, code, says):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    found, _, err = run(*arguments)
    assert found == code
    assert says in err


def test_the_entry_point_for_jobs_by_hand_is_finetune_on_the_jobs_cluster(monkeypatch, capsys):
    arguments = [str(JOBS / "finetune.py"), "digits.yaml", "--set", "optim.epochs=zero"]
    result = subprocess.run([sys.executable, *arguments], cwd=JOBS, capture_output=True, text=True, check=False)
    assert result.returncode == 78
    assert "`optim.epochs` must be" in result.stderr
    # On two workers, which one process is not: so it runs `finetune`. In this process, which has what that imports.
    monkeypatch.chdir(JOBS)
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], "cluster.launcher=process"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(arguments[0], run_name="__main__")
    assert end.value.code == 78
    assert sys.argv[1:4] == ["finetune", "--set", "cluster.address=auto"]
    assert "`cluster.num_workers` must be 1 where `cluster.launcher` is process" in capsys.readouterr().err


def test_a_recipe_travels_in_a_variable(run, monkeypatch):
    monkeypatch.setenv("SWA_DIST_RECIPE", run("show", "digits")[1])
    code, out, _ = run("check", "env:SWA_DIST_RECIPE", "--set", "seed=3")
    assert code == 0
    assert fingerprint_in(out) == fingerprint_in(run("check", "digits", "--set", "seed=3")[1])


# Runs that can't begin


def test_an_output_folder_that_cannot_be_written_ends_a_run_before_it_begins(run, here, small):
    (here / "file").touch()
    arguments = [*small, "--set", "cluster.launcher=process", "--set", "cluster.num_workers=1"]
    code, _, err = run("finetune", "digits", *arguments, "--set", "output.dir=file/runs")
    assert code == 73
    assert "`output.dir`" in err
    assert str(here / "file" / "runs") in err
    assert sorted(path.name for path in here.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("setting", "code", "says"),
    [
        ("data.train=absent", 65, "`data.train`"),
        ("model.weights=absent.pth", 78, "`model.weights`"),
        ("model.arch=resnet18", 65, "`model.arch`"),
        ("model.num_classes=11", 65, "`model.num_classes`"),
        ("model.arch=mobilenet_v9", 78, "Did you mean mobilenet_v"),
        ("data.group_images=57", 78, "`data.group_images`"),  # 400 = 7 * 57 + 1
        ("cluster.num_workers=2", 78, "`cluster.num_workers` must be 1"),
    ],
)
def test_a_run_that_cannot_succeed_is_refused_with_its_code_and_leaves_no_run(run, here, small, setting, code, says):
    arguments = [*small, "--set", "cluster.launcher=process", "--set", "cluster.num_workers=1", "--set", setting]
    found, _, err = run("finetune", "digits", *arguments)
    assert found == code
    assert says in err
    assert not list(here.glob("runs/swa-*"))


def test_more_workers_than_this_machine_has_are_refused_in_seconds(run, small):
    workers = len(os.sched_getaffinity(0)) + 1
    settings = [f"cluster.num_workers={workers}", "data.group_images=2", f"data.global_batch={2 * workers}"]
    began = time.monotonic()
    code, _, err = run("finetune", "digits", *small, *(part for s in settings for part in ("--set", s)))
    assert time.monotonic() - began < 60
    assert code == 78
    assert f"`cluster.num_workers` must be at most {workers - 1} on this machine" in err
    assert f"but is {workers}." in err


def test_replay_of_a_folder_that_is_no_run_names_it(run, here):
    code, _, err = run("replay", "absent")
    assert code == 69
    assert str(here / "absent") in err
