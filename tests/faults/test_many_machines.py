"""Three machines, as network namespaces with addresses of their own: one is cut off, and the run ends on the others.

Each machine has a Ray node; the first has the head, S3 and MLflow too. Nothing is shared but what goes over the network
and the images, which lie on each machine's disk, here the same.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest

from swa_dist.storage import folder
from swa_dist.storage.s3 import Prefix
from tests.support import command, end_marked

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

MARK = "SWA_DIST_TEST_ID"
BRIDGE = "swa-br"
ADDRESSES = {f"swa-h{number}": f"10.77.0.{number}" for number in (1, 2, 3)}
FIRST = "swa-h1"
S3_PORT, MLFLOW_PORT, RAY_PORT, JOBS_PORT = 5555, 5000, 6380, 8265
EPOCHS = 30


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Namespaces joined by a bridge; this process reaches them over it too."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2, which makes network namespaces, is not installed")
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
    try:
        ip("addr", "add", "10.77.0.254/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in ADDRESSES.items():
            ip("netns", "add", name)
            ip("link", "add", f"{name}-b", "type", "veth", "peer", "name", "net0", "netns", name)
            ip("link", "set", f"{name}-b", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@dataclass(frozen=True)
class Machines:
    folder: Path
    bucket: str

    def start(self, host: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{host}.log").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", host, *arguments], cwd=self.folder / host, stdout=log, stderr=log
            )

    def workers(self) -> set[str]:
        """The machines on which workers of the run are."""
        found = set()
        for host in ADDRESSES:
            for pid in ip("netns", "pids", host).stdout.split():
                title = Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else b""
                if b"RayTrainWorker" in title:
                    found.add(host)
        return found


@pytest.fixture
def machines(network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    first = ADDRESSES[FIRST]
    settings = {
        MARK: tmp_path.name,
        "AWS_ENDPOINT_URL": f"http://{first}:{S3_PORT}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "GLOO_SOCKET_IFNAME": "net0",  # the namespaces share a host name, which leads nowhere
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        # A machine that is gone is noticed in seconds, not in the better part of a minute.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    made = Machines(tmp_path, "s3://swa")
    scratch = {host: Path(f"/tmp/{host}-{os.getpid()}") for host in ADDRESSES}  # a socket's path must be short
    try:
        for host in ADDRESSES:
            (tmp_path / host).mkdir()
        made.start(FIRST, sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT))
        made.start(
            FIRST,
            *(sys.executable, "-m", "mlflow", "server", "--host", "0.0.0.0", "--port", str(MLFLOW_PORT)),
            *("--workers", "1", "--allowed-hosts", f"{first}:{MLFLOW_PORT}"),
            *("--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"),
            *("--artifacts-destination", str(tmp_path / "artifacts")),
        )
        for host, address in ADDRESSES.items():
            role = (
                ("--head", "--port", str(RAY_PORT), "--dashboard-host", "0.0.0.0", "--dashboard-port", str(JOBS_PORT))
                if host == FIRST
                else ("--address", f"{first}:{RAY_PORT}")
            )
            made.start(
                host,
                *("ray", "start", "--block", "--node-ip-address", address, "--num-cpus", "1", *role),
                *("--temp-dir", str(scratch[host]), "--object-store-memory", "100000000"),
            )
            if host == FIRST:
                await_listening(first, RAY_PORT)
        for port in (S3_PORT, MLFLOW_PORT, JOBS_PORT):
            await_listening(first, port)
        boto3.session.Session().client("s3").create_bucket(Bucket="swa")
        yield made
    finally:
        end_marked(MARK, tmp_path.name)
        for path in scratch.values():
            shutil.rmtree(path, ignore_errors=True)


def await_listening(address: str, port: int) -> None:
    import socket

    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, f"{address}:{port}"
            time.sleep(0.2)
        else:
            return


def checkpoints(machines: Machines) -> list[str]:
    return sorted(
        name.split("/")[2]
        for name in Prefix(f"{machines.bucket}/runs").names()
        if "/checkpoints/" in name and name.endswith("manifest.json")
    )


def test_a_machine_that_is_cut_off_costs_the_run_a_restart(
    machines: Machines, few_digits: Path, start_weights: Path
) -> None:
    jobs, uri = f"http://{ADDRESSES[FIRST]}:{JOBS_PORT}", f"http://{ADDRESSES[FIRST]}:{MLFLOW_PORT}"
    recipe = ["digits"]
    for name, value in {
        "data.train": few_digits / "train",
        "data.val": few_digits / "val",
        "data.index": f"{machines.bucket}/index",
        "model.weights": start_weights,
        "output.dir": f"{machines.bucket}/runs",
        "tracking.uri": uri,
        "optim.epochs": EPOCHS,
        "cluster.collective_timeout_seconds": 60,
    }.items():
        recipe += ["--set", f"{name}={value}"]
    subprocess.run(command("data", "index", "--recipe", *recipe), check=True, cwd=machines.folder)
    log = (machines.folder / "submit.log").open("w+")
    submitted = subprocess.Popen(
        command("submit", *recipe, "--address", jobs), cwd=machines.folder, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 180
        while len(checkpoints(machines)) < 2:
            assert submitted.poll() is None, (machines.folder / "submit.log").read_text()
            assert time.monotonic() < deadline, (machines.folder / "submit.log").read_text()
            time.sleep(0.5)
        before = machines.workers()
        assert len(before) == 2
        lost = max(before)  # not the first, which has the head
        reached = int(checkpoints(machines)[-1])
        ip("link", "set", f"{lost}-b", "down")
        cut = time.monotonic()
        while not any(int(name) > reached + 400 for name in checkpoints(machines)):
            assert submitted.poll() is None, (machines.folder / "submit.log").read_text()
            assert time.monotonic() < cut + 240, (machines.folder / "submit.log").read_text()
            time.sleep(0.5)
        resumed = time.monotonic() - cut
        on_the_reachable = machines.workers() - {lost}
        assert submitted.wait(timeout=240) == 0, (machines.folder / "submit.log").read_text()
    finally:
        submitted.send_signal(signal.SIGKILL)
        log.close()
    assert len(on_the_reachable) == 2
    (summary_url,) = (name for name in Prefix(f"{machines.bucket}/runs").names() if name.endswith("summary.json"))
    summary: dict[str, Any] = json.loads(folder.read(f"{machines.bucket}/runs/{summary_url}") or b"{}")
    assert summary["average"]["iterates"] == [400 * epoch for epoch in range(1, EPOCHS + 1)]
    assert summary["attempt"] == 1
    assert summary["registered"]["champion"]
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("swa_dist").experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "epoch/loss")
    assert [m.step for m in losses] == [400 * epoch for epoch in range(1, EPOCHS + 1)]
    print(
        f"cut off {lost} of {sorted(before)}; {resumed:.0f} s later a checkpoint beyond, on {sorted(on_the_reachable)}"
    )
