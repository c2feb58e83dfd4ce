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

import pytest
import requests

from swa_dist.service import kube
from tests.support import certificate, command, end_marked, free_port, swa_dist

MARK = "SWA_DIST_TEST_ID"
TOKEN = "0123456789abcdef" * 4
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-s3",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "MLFLOW_TRACKING_TOKEN": "canary-of-mlflow-token",
}
ENDLESS = ("--set", "optim.epochs=1000")  # not over before it is stopped, however fast the machine is


@dataclass(frozen=True)
class Head:
    address: str
    folder: Path
    recipe: list[str]

    def submit(self, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command("submit", *self.recipe, "--address", self.address, *arguments),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return swa_dist(verb, *arguments, "--address", self.address, cwd=self.folder)

    def status(self) -> dict[str, dict[str, Any]]:
        result = self.run("status", "--json")
        assert result.returncode == 0, result.stderr
        return {one["name"]: one for one in json.loads(result.stdout)}


@pytest.fixture(scope="module")
def head(few_digits: Path, start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    scratch = Path(f"/tmp/swa-ray-{os.getpid()}")  # a socket's path must be short
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
                "optim.epochs": 1,
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


def answers(address: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{address}/api/gcs_healthz", timeout=5).ok
    return False


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def newest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("runs/swa-*/checkpoints/0*"), default=None)


@pytest.mark.timeout(600)
def test_a_run_is_submitted_once_attached_to_stopped_and_resumed(head: Head) -> None:
    following = [head.submit(*ENDLESS) for _ in range(2)]  # at once
    wait_for(lambda: newest_checkpoint(head.folder), 180)
    ((name, running),) = head.status().items()
    assert name.endswith("-a1")
    assert (running["status"], running["recipe"], running["exit_code"]) == ("running", "digits", None)

    detached = head.submit(*ENDLESS, start_new_session=True)
    assert detached.stdout is not None
    while "train:" not in detached.stdout.readline():  # it follows
        assert detached.poll() is None
    detached.send_signal(signal.SIGINT)
    said, _ = detached.communicate(timeout=60)
    assert detached.returncode == 0
    assert f"detached; {name} goes on" in said
    assert f"swa-dist logs --follow {name} --address {head.address}" in said

    stopped = head.run("stop", name)
    assert stopped.returncode == 0, stopped.stderr
    checkpoint = newest_checkpoint(head.folder)
    assert checkpoint is not None
    position = json.loads((checkpoint / "facts.json").read_text())["position"]
    assert f"did at image {position} " in stopped.stdout
    outputs = []
    for process in following:
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert "asked to stop" in said
        outputs.append(said)
    assert sorted(f"submitted digits as {name}" in said for said in outputs) == [False, True]
    assert sum("attached to it" in said for said in outputs) == 1
    assert head.status()[name]["status"] == "stopped"

    resumed = head.submit(*ENDLESS)
    second = name.removesuffix("1") + "2"
    wait_for(lambda: newest_checkpoint(head.folder) != checkpoint, 180)
    assert head.run("stop", second).returncode == 0
    said, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 75, errors
    assert f"{name} did not finish (stopped); its state is resumed" in said
    assert f"submitted digits as {second}" in said
    assert set(head.status()) == {name, second}
    assert "has ended already" in head.run("stop", second).stdout
    checkpoint = newest_checkpoint(head.folder)
    assert checkpoint is not None
    facts = json.loads((checkpoint / "facts.json").read_text())
    assert facts["position"] > position
    assert facts["averages"]["swa"] == [400 * epoch for epoch in range(1, facts["position"] // 400 + 1)]
    assert json.loads((checkpoint.parents[1] / "attempt.json").read_text())["attempt"] == 2


def test_a_run_finishes_once_and_then_says_so(head: Head) -> None:
    first = head.submit()
    said, errors = first.communicate(timeout=240)
    assert first.returncode == 0, errors
    assert "verdict:" in said
    (summary_file,) = head.folder.glob("runs/swa-*/summary.json")
    summary = json.loads(summary_file.read_text())
    name = f"swa-{summary['run_key'][:12]}-a1"
    assert head.status()[name]["status"] == "succeeded"
    before = set(head.status())

    again = head.submit()
    said, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "finished already: digits" in said
    assert summary["verdict"]["sentence"] in said
    assert set(head.status()) == before

    printed = head.run("logs", name)
    assert printed.returncode == 0, printed.stderr
    assert "verdict:" in printed.stdout
    assert head.run("logs", name, "--follow").returncode == 0

    # Secrets were in the environment of all of them.
    leaks = []
    for root in (head.folder, Path(f"/tmp/swa-ray-{os.getpid()}")):
        for path in (path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
            content = path.read_bytes()
            leaks += [(path, value) for value in (*CANARIES.values(), TOKEN) if value.encode() in content]
    jobs = requests.get(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10).text
    assert name in jobs
    leaks += [("jobs", value) for value in (*CANARIES.values(), TOKEN) if value in jobs]
    assert leaks == []


def test_what_the_smoke_overlay_runs_runs_on_a_cluster(head: Head) -> None:
    """The manifest's entrypoint, its mounts elsewhere and its epochs fewer."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the overlay, is not installed")
    entrypoint = kube.template_of(kube.render("cpu-smoke"))["spec"]["entrypoint"].split()
    moved = [word.replace("/runs", str(head.folder / "smoke")) for word in entrypoint]
    assert moved != entrypoint
    fewer = ["--set", "optim.epochs=1", "--set", f"tracking.uri=sqlite:///{head.folder / 'smoke.db'}"]
    submitted = subprocess.run(
        ["ray", "job", "submit", "--address", head.address, "--", *map(shlex.quote, moved + fewer)],
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


def test_a_key_that_is_another_on_the_cluster_is_refused(head: Head, few_digits: Path) -> None:
    """As where the index was refreshed between submission and start."""
    environment = os.environ | {
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": "swa-0123456789ab-a1"}})
    }
    result = subprocess.run(
        command("finetune", *head.recipe, "--set", "cluster.address=auto"),
        cwd=head.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 78
    assert "must be the one with key 0123456789ab" in result.stderr


def test_no_cluster_there_is_said_in_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    result = swa_dist("status", "--address", f"http://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert result.returncode == 69
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < 30
