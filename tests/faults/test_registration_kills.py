"""Killed again and again while its result is registered, a run ends with one MLflow run, one version, one champion."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from swa_dist.training.world import World
from tests import support

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

KILLS = 60  # more than there are requests: it is over before
EVERY = 2


def finetune(world: World, cwd: str, arguments: list[str], kill_at: int) -> None:
    """`swa-dist finetune`, killed before request `kill_at` that its end makes to MLflow."""
    from swa_dist import cli
    from swa_dist.service import result

    os.chdir(cwd)
    deliver, made = result.deliver, 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def made_or_killed(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return made_or_killed

    def delivered(*arguments: Any, **named: Any) -> Any:
        client = mlflow.MlflowClient
        for name in vars(client):
            if not name.startswith("_") and callable(getattr(client, name)):
                setattr(client, name, counted(getattr(client, name)))
        return deliver(*arguments, **named)

    result.deliver = delivered
    sys.argv = ["swa-dist", *arguments]
    with open(Path(cwd) / "said", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    cli.main()


def test_killed_before_any_request_of_its_registration(few_digits: Path, start_weights: Path, tmp_path: Path) -> None:
    settings = {
        "data.train": few_digits / "train",
        "data.val": few_digits / "val",
        "model.weights": start_weights,
        "optim.epochs": 1,
        "cluster.launcher": "process",
        "cluster.num_workers": 1,
    }
    arguments = ["finetune", "digits", *(text for n, v in settings.items() for text in ("--set", f"{n}={v}"))]
    killed = 0
    for number in range(0, KILLS, EVERY):
        worker = support.start_workers(finetune, 1, str(tmp_path), arguments, number)
        try:
            worker.processes[0].join(300)
            ended = worker.processes[0].exitcode
        finally:
            worker.kill()
        if ended != -signal.SIGKILL:
            break
        killed += 1
    else:
        raise AssertionError(f"not over after {killed} kills: {(tmp_path / 'said').read_text()[-2000:]}")
    assert killed > 3
    (path,) = tmp_path.glob("runs/swa-*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["waiting"] == 0, (tmp_path / "said").read_text()
    assert summary["attempt"] == 1  # what is trained and scored is finished: starts after that only send
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("swa_dist").experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/swa/top1")] == [400]
    (version,) = client.search_model_versions("name = 'digits-resnet'")
    assert summary["registered"]["version"] == str(version.version) == "1"
    assert client.get_model_version_by_alias("digits-resnet", "champion").version == version.version
    print(f"killed {killed} times while registering: one MLflow run, one version, one champion")
