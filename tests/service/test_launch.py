"""The same recipe without Ray: under torchrun and in one process, stopped, and with MLflow away."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from swa_dist import config
from tests.service.forked import start, swa_dist
from tests.support import MlflowServer, command


def settings(digits: Path, weights: Path, **fields: Any) -> list[str]:
    """The digits recipe on these images, one epoch in one process unless told otherwise."""
    values = {
        "data.train": digits / "train",
        "data.val": digits / "val",
        "model.weights": weights,
        "optim.epochs": 1,
        "cluster.launcher": "process",
        "cluster.num_workers": 1,
    } | fields
    return ["finetune", "digits", *(text for name, value in values.items() for text in ("--set", f"{name}={value}"))]


def summary_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/swa-*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_torchrun_and_one_process_give_the_same(few_digits: Path, start_weights: Path, tmp_path: Path) -> None:
    alone, many = tmp_path / "alone", tmp_path / "many"
    for folder in (alone, many):
        folder.mkdir()
    # At a fine-tuning rate rounding stays rounding.
    low = {"schedule.max_lr": 1e-3, "schedule.min_lr": 1e-4}
    result = swa_dist(*settings(few_digits, start_weights, **low), cwd=alone)
    assert result.returncode == 0, result.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*torchrun, "-m", "swa_dist", *settings(few_digits, start_weights, **low)]
    result = subprocess.run(arguments, cwd=many, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("verdict:") == 1
    first, second = summary_in(alone), summary_in(many)
    assert first["run_key"] == second["run_key"]
    for name, metrics in first["candidates"].items():
        assert second["candidates"][name]["nll"] == pytest.approx(metrics["nll"], rel=1e-3)


def test_sigterm_saves_the_state_and_the_same_command_resumes(
    few_digits: Path, start_weights: Path, tmp_path: Path
) -> None:
    # Two hundred epochs: it can't be over before the signal comes.
    arguments = settings(few_digits, start_weights, **{"optim.epochs": 200})
    process = subprocess.Popen(
        command(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/swa-*/checkpoints/0*")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "asked to stop" in errors
    assert "Traceback" not in errors
    newest = max(tmp_path.glob("runs/swa-*/checkpoints/0*"))
    position = json.loads((newest / "facts.json").read_text())["position"]
    assert f"image {position} " in errors
    (attempt,) = tmp_path.glob("runs/swa-*/attempt.json")
    assert json.loads(attempt.read_text())["attempt"] == 1
    (newest.parent.parent / "stop").touch()  # a request of before the start must not stop it: the start clears it
    second = start(*arguments, cwd=tmp_path)
    while max(tmp_path.glob("runs/swa-*/checkpoints/0*")) == newest:
        assert second.workers.processes[0].is_alive(), second.ended()
        time.sleep(0.1)
    (newest.parent.parent / "stop").touch()
    ended = second.ended()
    assert ended.returncode == 75, ended.stderr
    assert json.loads(attempt.read_text()) == {"attempt": 2, "first_attempt": 1}


def test_mlflow_away_the_run_goes_on_and_replay_or_the_same_command_delivers(
    few_digits: Path, start_weights: Path, tmp_path: Path
) -> None:
    server = MlflowServer(tmp_path)
    uri = server.uri
    same = settings(few_digits, start_weights, **{"tracking.uri": uri})
    result, again = swa_dist(*same, cwd=tmp_path), swa_dist(*same, cwd=tmp_path)
    (folder,) = tmp_path.glob("runs/swa-*")
    for ended in (result, again, swa_dist("replay", str(folder), cwd=tmp_path)):
        assert ended.returncode == 69, ended.stderr
        assert uri in ended.stderr
        assert f"swa-dist replay {folder}" in ended.stderr
        assert "Traceback" not in ended.stderr
    for ended in (result, again):
        assert "verdict:" in ended.stdout
        assert f"post-mortem: {folder / 'post-mortem-a1.md'}" in ended.stderr
    assert "finished already" in again.stdout
    assert "must answer" in (folder / "post-mortem-a1.md").read_text()
    assert json.loads((folder / "attempt.json").read_text())["attempt"] == 1  # nothing was trained again
    assert summary_in(tmp_path)["registered"] is None
    # What waits belongs to the folder, wherever that is; and a copy of it that sends the same doubles nothing.
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    with server:
        for _ in range(2):  # the second has nothing left to do
            delivered = swa_dist("replay", str(moved), cwd=tmp_path)
            assert delivered.returncode == 0, delivered.stderr
        delivered = swa_dist(*same, cwd=tmp_path)
        assert delivered.returncode == 0, delivered.stderr
        assert "finished already" in delivered.stdout
        assert "digits-resnet version 1 " in delivered.stdout
        client = mlflow.MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("swa_dist").experiment_id])
        assert run.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "epoch/loss")] == [400]
        assert str(client.get_model_version_by_alias("digits-resnet", "champion").version) == "1"
        assert len(client.search_model_versions("name = 'digits-resnet'")) == 1
        for one in (folder, moved):
            assert json.loads((one / "summary.json").read_text())["registered"]["champion"]
        artifacts = {"recipe.yaml", "curves.png", "summary.json", "promotion"}
        assert {a.path for a in client.list_artifacts(run.info.run_id)} == artifacts
        recipe = config.flatten(config.to_tree(config.load(folder / "recipe.yaml")))
        assert run.data.params == {name: str(value) for name, value in recipe.items()}
