"""A real Ray head with a jobs server behind a token takes submissions: they attach, stop, resume and finish once."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from swa_dist.service import kube
from tests.service.forked import Running, start, swa_dist
from tests.support import certificate, command, end_marked, free_port, marked

MARK = "SWA_DIST_TEST_ID"
TOKEN = "0123456789abcdef" * 4
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-s3",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "MLFLOW_TRACKING_TOKEN": "canary-of-mlflow-token",
}
EPOCHS = 4


@dataclass(frozen=True)
class Head:
    address: str
    folder: Path
    recipe: list[str]

    def start(self, verb: str, *arguments: str) -> Running:
        return start(verb, *arguments, "--address", self.address, cwd=self.folder)

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.start(verb, *arguments).ended()

    def status(self) -> dict[str, dict[str, Any]]:
        result = self.run("status", "--json")
        assert result.returncode == 0, result.stderr
        return {one["name"]: one for one in json.loads(result.stdout)}


@pytest.fixture(scope="module")
def head(few_digits: Path, start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    scratch = scratch_of_ray()
    settings = CANARIES | {
        MARK: folder.name,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ray_port, port = free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        arguments = [
            *("ray", "start", "--head", "--block", "--num-cpus", "2", "--temp-dir", str(scratch)),
            *("--port", str(ray_port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(port)),
            *("--object-store-memory", "100000000"),
        ]
        log = (folder / "head.log").open("w")
        subprocess.Popen(arguments, stdout=log, stderr=log, cwd=folder)
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: answers(address), 60)
            index = folder / "index"
            recipe = ["digits"]
            for name, value in {
                "data.train": few_digits / "train",
                "data.val": few_digits / "val",
                "data.index": index,
                "model.weights": start_weights,
                "output.dir": folder / "runs",
                "tracking.uri": f"sqlite:///{folder / 'mlflow.db'}",
                "optim.epochs": EPOCHS,
                "schedule.max_lr": 1e-3,
                "schedule.min_lr": 1e-4,
            }.items():
                recipe += ["--set", f"{name}={value}"]
            written = swa_dist("data", "index", "--recipe", *recipe, cwd=folder)
            assert written.returncode == 0, written.stderr
            yield Head(address, folder, recipe)
        finally:
            end_marked(MARK, folder.name)
            shutil.rmtree(scratch, ignore_errors=True)
            log.close()


def scratch_of_ray() -> Path:
    return Path(f"/tmp/swa-ray-{os.getpid()}")  # a socket's path must be short


def answers(address: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{address}/api/gcs_healthz", timeout=5).ok
    return False


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def newest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("runs/swa-*/checkpoints/0*"), default=None)


def train_workers(mark: str) -> list[psutil.Process]:
    """They write their title over their environment: they are found as the raylet's children."""
    found = {}
    for pid in marked(MARK, mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found[process.pid] = process
    return list(found.values())


@contextlib.contextmanager
def paused(mark: str) -> Iterator[None]:
    """Within the block the run's workers stand still: it can't be over, however fast the machine is."""
    workers = train_workers(mark)
    assert len(workers) == 2
    try:
        for worker in workers:
            worker.suspend()
        yield
    finally:
        for worker in workers:
            worker.resume()


@pytest.mark.timeout(600)
def test_a_run_is_submitted_once_attached_to_stopped_resumed_and_finishes_once(head: Head) -> None:
    following = [head.start("submit", *head.recipe) for _ in range(2)]  # at once
    wait_for(lambda: newest_checkpoint(head.folder), 180)
    with paused(head.folder.name):
        ((name, running),) = head.status().items()
        assert name.endswith("-a1")
        assert (running["status"], running["recipe"], running["exit_code"]) == ("running", "digits", None)
        assert_an_interrupt_detaches(head, name)
        stop = head.start("stop", name)
        wait_for(lambda: list(head.folder.glob("runs/swa-*/stop")), 120)
    stopped = stop.ended()
    assert stopped.returncode == 0, stopped.stderr
    checkpoint = newest_checkpoint(head.folder)
    assert checkpoint is not None
    position = json.loads((checkpoint / "facts.json").read_text())["position"]
    assert f"did at image {position} " in stopped.stdout
    outputs = [process.ended() for process in following]
    for output in outputs:
        assert output.returncode == 75, output.stderr
        assert "asked to stop" in output.stdout
    assert sorted(f"submitted digits as {name}" in output.stdout for output in outputs) == [False, True]
    assert sum("attached to it" in output.stdout for output in outputs) == 1
    assert head.status()[name]["status"] == "stopped"

    second = name.removesuffix("1") + "2"
    resumed = head.run("submit", *head.recipe)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{name} did not finish (stopped); its state is resumed" in resumed.stdout
    assert f"submitted digits as {second}" in resumed.stdout
    assert "verdict:" in resumed.stdout
    ended = head.status()
    assert {one: facts["status"] for one, facts in ended.items()} == {name: "stopped", second: "succeeded"}
    assert "has ended already" in head.run("stop", second).stdout
    folder = checkpoint.parents[1]
    summary = json.loads((folder / "summary.json").read_text())
    assert second == f"swa-{summary['run_key'][:12]}-a2"
    assert summary["average"]["iterates"] == [400 * epoch for epoch in range(1, EPOCHS + 1)]
    assert json.loads((folder / "attempt.json").read_text()) == {"attempt": 2, "first_attempt": 1}
    last = json.loads((folder / "candidates" / "last" / "facts.json").read_text())
    assert last["training"]["world_sizes"] == [2, 2]  # it went on from there

    again = head.run("submit", *head.recipe)
    assert again.returncode == 0, again.stderr
    assert "finished already: digits" in again.stdout
    assert summary["verdict"]["sentence"] in again.stdout
    assert head.status() == ended

    printed = head.run("logs", second)
    assert printed.returncode == 0, printed.stderr
    assert "verdict:" in printed.stdout
    assert head.run("logs", second, "--follow").returncode == 0
    assert secrets_of(head, second) == []


def assert_an_interrupt_detaches(head: Head, name: str) -> None:
    detached = subprocess.Popen(
        command("submit", *head.recipe, "--address", head.address),
        cwd=head.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert detached.stdout is not None
    while "evaluate start:" not in detached.stdout.readline():  # it follows
        assert detached.poll() is None
    detached.send_signal(signal.SIGINT)
    said, _ = detached.communicate(timeout=60)
    assert detached.returncode == 0
    assert f"detached; {name} goes on" in said
    assert f"swa-dist logs --follow {name} --address {head.address}" in said


def secrets_of(head: Head, name: str) -> list[tuple[Any, str]]:
    """Where the secrets that are in the environment of all of them lie open, after the run of this name."""
    leaks: list[tuple[Any, str]] = []
    for root in (head.folder, scratch_of_ray()):
        for path in (path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
            content = path.read_bytes()
            leaks += [(path, value) for value in (*CANARIES.values(), TOKEN) if value.encode() in content]
    jobs = requests.get(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10).text
    assert name in jobs
    return leaks + [("jobs", value) for value in (*CANARIES.values(), TOKEN) if value in jobs]


@pytest.mark.faults
def test_what_the_smoke_overlay_runs_runs_on_a_cluster(head: Head) -> None:
    """The manifest's entrypoint, its mounts elsewhere, its epochs fewer and its network smaller."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the overlay, is not installed")
    entrypoint = kube.template_of(kube.render("cpu-smoke"))["spec"]["entrypoint"].split()
    moved = [word.replace("/runs", str(head.folder / "smoke")) for word in entrypoint]
    assert moved != entrypoint
    for name, value in {
        "optim.epochs": 1,
        "model.arch": "shufflenet_v2_x0_5",
        "data.group_images": 32,
        "tracking.uri": f"sqlite:///{head.folder / 'mlflow.db'}",
        "registry.model": "smoke",
    }.items():
        moved += ["--set", f"{name}={value}"]
    submitted = subprocess.run(
        ["ray", "job", "submit", "--address", head.address, "--", *map(shlex.quote, moved)],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
        cwd=head.folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    (summary,) = head.folder.glob("smoke/swa-*/summary.json")
    assert json.loads(summary.read_text())["registered"]["champion"]


@pytest.mark.parametrize(("mode", "token"), [("token", "f" * 64), ("disabled", TOKEN)])
def test_a_wrong_or_missing_token_is_refused_with_what_to_set(
    head: Head, monkeypatch: pytest.MonkeyPatch, mode: str, token: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    result = head.run("status")
    assert result.returncode == 69
    assert "RAY_AUTH_TOKEN" in result.stderr
    assert token not in result.stderr
    assert "Traceback" not in result.stderr


def test_behind_https_its_certificate_is_checked(head: Head, tmp_path: Path) -> None:
    served, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served, key)
    with Terminator(context, int(head.address.rpartition(":")[2])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = ("--address", f"https://127.0.0.1:{server.server_address[1]}")
        trusted = swa_dist("status", *address, "--ca-file", str(served), cwd=tmp_path)
        unknown = swa_dist("status", *address, cwd=tmp_path)
        server.shutdown()
    assert trusted.returncode == 0, trusted.stderr
    assert unknown.returncode == 69
    assert "Traceback" not in unknown.stderr


class Terminator(socketserver.ThreadingTCPServer):
    """Takes TLS connections on loopback and hands their content on to a port."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext, port: int) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with (
                    contextlib.suppress(OSError),
                    context.wrap_socket(self.request, server_side=True) as outer,
                    socket.create_connection(("127.0.0.1", port)) as inner,
                ):
                    threading.Thread(target=forward, args=(inner, outer), daemon=True).start()
                    forward(outer, inner)

        super().__init__(("127.0.0.1", 0), Handler)


def forward(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(65_536):
            target.sendall(content)


def test_a_run_that_the_cluster_does_not_know_is_named(head: Head) -> None:
    result = head.run("logs", "swa-0123456789ab-a1")
    assert result.returncode == 78
    assert "swa-0123456789ab-a1 is none" in result.stderr


def test_a_key_that_is_another_on_the_cluster_is_refused(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the index was refreshed between submission and start."""
    job = {"metadata": {"job_submission_id": "swa-0123456789ab-a1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    result = swa_dist("finetune", *head.recipe, "--set", "cluster.address=auto", cwd=head.folder)
    assert result.returncode == 78
    assert "must be the one with key 0123456789ab" in result.stderr


def test_no_cluster_there_is_said_in_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    result = swa_dist("status", "--address", f"http://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert result.returncode == 69
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < 30
