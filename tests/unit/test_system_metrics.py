"""A machine's metrics arrive in a real MLflow while a run is RUNNING there, and no run waits for them."""

import shutil
import socket
import threading
import time

import mlflow
import pytest

from swa_dist.service import system_metrics, tracking
from swa_dist.service.spool import Spool, Target

SECONDS = 0.1
NAMES = {
    *("cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"),
    *("disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes"),
    *("network_receive_megabytes", "network_transmit_megabytes"),
}


@pytest.fixture(autouse=True)
def uncaught(monkeypatch):
    """What threads died of."""
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", str(SECONDS))
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    tracking.configure_client()
    yield
    assert died == []


@pytest.fixture
def client(new_database, tmp_path):
    shutil.copy(new_database, tmp_path / "mlflow.db")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def spool_to(uri, folder):
    folder.mkdir()
    spool = Spool(folder)
    spool.open(Target(uri=uri, experiment="digits", run_name="small", run_key="k" * 64, first_attempt=1))
    return spool


@pytest.fixture
def spool(client, tmp_path):
    return spool_to(client.tracking_uri, tmp_path / "run")


def say(spool, status):
    spool.append({"kind": "status", "status": status, "time_ms": 1})
    return tracking.send(spool, {})


def system(client, run_id):
    return {name: value for name, value in client.get_run(run_id).data.metrics.items() if name.startswith("system/")}


def wait_until(done):
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_running_run_gets_them_from_each_machine_and_on_after_a_pause(spool, client):
    run_id = say(spool, "RUNNING")
    name = "system/node_0/cpu_utilization_percentage"

    def steps():
        return sorted(found.step for found in client.get_metric_history(run_id, name))

    with system_metrics.logged(str(spool.folder), 0), system_metrics.logged(str(spool.folder), 7):
        wait_until(lambda: len(system(client, run_id)) >= 2 * len(NAMES) and len(steps()) >= 3)
        say(spool, "FAILED")  # as when MLflow is away: its monitor ends
        time.sleep(5 * SECONDS)
        before = steps()
        time.sleep(5 * SECONDS)
        assert steps() == before
        say(spool, "RUNNING")
        wait_until(lambda: len(steps()) > len(before))
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert len(set(steps())) == len(steps())
    assert {found for found in system(client, run_id) if "/gpu_" not in found} == {
        f"system/node_{node}/{metric}" for node in (0, 7) for metric in NAMES
    }
    after = steps()
    time.sleep(5 * SECONDS)
    assert steps() == after


def test_nothing_is_made_before_the_tracker_has_made_it(tmp_path):
    database = tmp_path / "new.db"
    spool = spool_to(f"sqlite:///{database}", tmp_path / "run")
    with system_metrics.logged(str(spool.folder), 0):
        time.sleep(5 * SECONDS)
    assert not database.exists()


def test_a_server_that_takes_requests_and_never_answers_holds_nothing_up(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        spool = spool_to(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path / "run")
        spool.mark_sent(1)
        began = time.monotonic()
        with system_metrics.logged(str(spool.folder), 0):
            assert time.monotonic() - began < 0.5
            listener.accept()  # it asks
            left = time.monotonic()
        assert time.monotonic() - left < 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("world_size", "variables", "node"),
    [
        (1, {}, 0),
        (1, {"LOCAL_RANK": "3", "NODE_RANK": "2"}, 0),
        (4, {}, None),
        (4, {"LOCAL_RANK": "0", "NODE_RANK": "2"}, 2),
        (4, {"LOCAL_RANK": "1", "NODE_RANK": "2"}, None),
        (4, {"LOCAL_RANK": "0", "GROUP_RANK": "1"}, 1),
        (4, {"LOCAL_RANK": "0", "GROUP_RANK": "1", "NODE_RANK": "0"}, 1),
        (4, {"LOCAL_RANK": "0"}, None),
    ],
)
def test_one_worker_of_each_machine_reports(monkeypatch, world_size, variables, node):
    for name in ("LOCAL_RANK", "GROUP_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert system_metrics.node_of(world_size) == node
