"""Real Ray runs that lose a worker, their driver, or a machine that is told to go."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from swa_dist.storage.store import DiskStore
from tests.small_run import digest_of
from tests.support import command, end_marked, free_port, left_behind, marked, wait_for_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

MARK = "SWA_DIST_TEST_ID"
EPOCHS = 12
TOKEN = "0123456789abcdef" * 4


@dataclass
class Run:
    """`swa-dist finetune digits` with two Ray workers, in a folder of its own."""

    folder: Path
    settings: dict[str, Any]
    process: "subprocess.Popen[bytes] | None" = field(default=None)

    def start(self, **fields: Any) -> "subprocess.Popen[bytes]":
        settings = self.settings | {name.replace("__", "."): value for name, value in fields.items()}
        arguments = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
        with (self.folder / "said").open("w") as said:
            self.process = subprocess.Popen(
                command("finetune", "digits", *arguments), cwd=self.folder, stdout=said, stderr=said
            )
        return self.process

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def ended(self, seconds: float = 400) -> tuple[int, str]:
        assert self.process is not None
        return self.process.wait(seconds), self.said

    @property
    def root(self) -> Path:
        (found,) = self.folder.glob("runs/swa-" + "?" * 12)
        return found

    @property
    def reached(self) -> int:
        """Images of the newest committed checkpoint."""
        return max((int(path.name) for path in self.folder.glob("runs/swa-*/checkpoints/0*")), default=0)

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "summary.json").read_text())
        return found

    @property
    def digest(self) -> str:
        return digest_of(DiskStore(self.root), "candidates/swa")

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> float:
        """Seconds until it holds."""
        assert self.process is not None
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < began + seconds
            time.sleep(0.05)
        return time.monotonic() - began

    def workers(self) -> list[int]:
        """The ids of the processes of its Ray Train workers."""
        found = []
        for pid in marked(MARK, self.folder.name):
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process.pid)
        return sorted(set(found))

    def losses(self) -> list[int]:
        """The steps of the epochs' losses in MLflow."""
        client = mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("swa_dist").experiment_id])
        return [metric.step for metric in client.get_metric_history(run.info.run_id, "epoch/loss")]


@pytest.fixture
def run(few_digits: Path, start_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv(MARK, tmp_path.name)
    settings = {
        "data.train": few_digits / "train",
        "data.val": few_digits / "val",
        "model.weights": start_weights,
        "optim.epochs": EPOCHS,
        "checkpoint.interval_seconds": 0.5,
    }
    yield Run(tmp_path, settings)
    end_marked(MARK, tmp_path.name)


@pytest.fixture(scope="module")
def undisturbed(few_digits: Path, start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The SHA-256 of the SWA weights of the same recipe that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = {
        "data.train": few_digits / "train",
        "data.val": few_digits / "val",
        "model.weights": start_weights,
        "optim.epochs": EPOCHS,
    }
    one = Run(folder, settings)
    one.start()
    code, said = one.ended()
    assert code == 0, said
    return one.digest


def assert_finished(run: Run, undisturbed: str) -> None:
    assert run.digest == undisturbed
    assert run.summary["average"]["iterates"] == [400 * epoch for epoch in range(1, EPOCHS + 1)]
    assert run.summary["bitwise"]
    assert run.losses() == [400 * epoch for epoch in range(1, EPOCHS + 1)]


def test_a_worker_that_is_killed_costs_a_restart_and_no_bit(run: Run, undisturbed: str) -> None:
    run.start()
    run.until(lambda: run.reached > 800)
    reached, victim = run.reached, run.workers()[-1]
    os.kill(victim, signal.SIGKILL)
    seconds = run.until(lambda: run.reached > reached + 400)
    code, said = run.ended()
    assert code == 0, said
    assert_finished(run, undisturbed)
    assert run.summary["attempt"] == 1
    print(f"worker killed at image {reached} or later: {seconds:.0f} s until more than an epoch beyond, same bits")


def test_a_driver_that_is_killed_leaves_a_run_that_the_same_command_finishes(run: Run, undisturbed: str) -> None:
    process = run.start()
    run.until(lambda: run.reached > 800)
    process.kill()
    process.wait()
    end_marked(MARK, run.folder.name)
    reached = run.reached
    run.start()
    seconds = run.until(lambda: run.reached > reached)
    code, said = run.ended()
    assert code == 0, said
    assert "attempt 1 ended without a word" in said
    assert "rank 1" in (run.root / "post-mortem-a1.md").read_text()
    assert_finished(run, undisturbed)
    assert run.summary["attempt"] == 2
    print(
        f"driver killed at image {reached} or later: {seconds:.0f} s from the command to a checkpoint beyond, same bits"
    )


def test_sigterm_to_the_driver_commits_and_ends_with_75_in_its_grace_period(run: Run, undisturbed: str) -> None:
    process = run.start()
    run.until(lambda: run.reached > 800)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, said = run.ended(30)
    seconds = time.monotonic() - began
    assert code == 75, said
    assert f"at image {run.reached} " in said
    assert said.strip().splitlines()[-1] == f"post-mortem: {run.root / 'post-mortem-a1.md'}"
    assert "Traceback" not in said
    assert left_behind(MARK, run.folder.name) == []
    run.start()
    code, said = run.ended()
    assert code == 0, said
    assert_finished(run, undisturbed)
    print(f"SIGTERM to the driver: committed and ended in {seconds:.1f} s, resumed to the same bits")


def test_a_machine_that_is_told_to_go_is_left_in_its_grace_period(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = [Path(f"/tmp/swa-n{number}-{os.getpid()}") for number in (1, 2)]  # a socket's path must be short
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    port = free_port()

    def node(number: int, *role: str) -> "subprocess.Popen[bytes]":
        log = (run.folder / f"node-{number}.log").open("w")
        common = ("--block", "--num-cpus", "1", "--temp-dir", str(scratch[number - 1]))
        return subprocess.Popen(
            ["ray", "start", *role, *common, "--object-store-memory", "100000000"],
            cwd=run.folder,
            stdout=log,
            stderr=log,
        )

    try:
        head = node(1, "--head", "--node-ip-address", "127.0.0.1", "--port", str(port), "--include-dashboard=false")
        wait_for_port(port, head)
        second = node(2, "--address", f"127.0.0.1:{port}")
        epochs = 16
        run.start(cluster__address=f"127.0.0.1:{port}", cluster__min_workers=1, optim__epochs=epochs)
        run.until(lambda: run.reached > 800, 180)
        assert len(run.workers()) == 2
        began, reached = time.monotonic(), run.reached
        second.send_signal(signal.SIGTERM)
        run.until(lambda: "about to go" in run.said, 60)
        saved = time.monotonic() - began
        left_at = run.reached
        run.until(lambda: run.reached > left_at)
        going_on = time.monotonic() - began
        code, said = run.ended()
        assert code == 0, said
        assert "a machine is about to go" in said
        summary = run.summary
        assert summary["average"]["iterates"] == [400 * epoch for epoch in range(1, epochs + 1)]
        assert not summary["bitwise"]
        assert summary["attempt"] == 1
        assert run.losses() == summary["average"]["iterates"]
        print(
            f"machine told to go at image {reached}: state saved at {left_at} after {saved:.1f} s, training goes on"
            f" with one worker after {going_on:.0f} s"
        )
    finally:
        end_marked(MARK, run.folder.name)
        for path in scratch:
            shutil.rmtree(path, ignore_errors=True)
