"""What a run tells MLflow arrives once, in a real store, however often it is sent and whatever is down meanwhile."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import botocore.exceptions
import mlflow
import pytest

from swa_dist.errors import ExitCode, ServiceError
from swa_dist.service import registry, tracking
from swa_dist.service import spool as spool_module
from swa_dist.service.spool import Spool, Target
from swa_dist.service.tracking import SpoolTracker
from swa_dist.storage.folder import open_folder

SETTINGS = (
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
)


class Record:
    """A display that keeps what is said."""

    def __init__(self):
        self.said, self.shown, self.heard = [], [], threading.Event()

    def say(self, line):
        self.said.append(line)
        self.heard.set()

    def progress(self, phase, done, total, note=""):
        self.shown.append((phase, done, total, note))

    def close(self):
        pass


@pytest.fixture(autouse=True)
def client_settings(tmp_path, monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tracking.configure_client()


@pytest.fixture
def uri(new_database, tmp_path):
    shutil.copy(new_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def client(uri):
    return mlflow.MlflowClient(uri, registry_uri=uri)


@pytest.fixture
def closed():
    """The address of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def target_of(uri, run_key="k" * 64, first_attempt=1):
    return Target(uri=uri, experiment="digits", run_name="small", run_key=run_key, first_attempt=first_attempt)


@pytest.fixture
def spool(uri, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    made = Spool(folder)
    made.open(target_of(uri))
    return made


def row(position, **metrics):
    return {"position": position, "epoch": position / 400, "time_ms": 1_764_000_000_000 + position, "metrics": metrics}


def rows(count):
    return [row(64 * i, **{"train/loss": 1 / i, "train/lr": 0.1 * i}) for i in range(1, count + 1)]


def forget_sent(spool, num_sent):
    """As if no more had been sent: a number that a kill kept from being written."""
    (spool.folder / "spool.sent.json").write_text(json.dumps({"num_sent": num_sent}))


def event(row):
    return {"kind": "row", **row}


def history(client, run_id, name):
    """What MLflow has of a metric, in order: (step, value, time)."""
    found = [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run_id, name)]
    return sorted(found)


def runs(client):
    experiment = client.get_experiment_by_name("digits")
    return client.search_runs([experiment.experiment_id]) if experiment else []


# Metrics


def test_metrics_arrive_with_their_position_and_their_time(spool, client):
    spool.append(*map(event, rows(3)))
    run_id = tracking.send(spool, {})
    expected = [(r["position"], r["metrics"]["train/loss"], r["time_ms"]) for r in rows(3)]
    assert history(client, run_id, "train/loss") == expected
    assert spool.waiting() == []


@pytest.mark.parametrize("sent_before", [0, 3, 7])
def test_a_spool_that_is_sent_twice_gives_each_metric_once(spool, client, sent_before):
    spool.append(*map(event, rows(10)))
    run_id = tracking.send(spool, {})
    first = history(client, run_id, "train/loss"), history(client, run_id, "train/lr")
    assert len(first[0]) == 10
    forget_sent(spool, sent_before)
    assert tracking.send(spool, {}) == run_id
    assert (history(client, run_id, "train/loss"), history(client, run_id, "train/lr")) == first


def test_more_rows_than_one_request_takes_all_arrive(spool, client):
    spool.append(*map(event, rows(1234)))
    run_id = tracking.send(spool, {})
    assert len(history(client, run_id, "train/lr")) == 1234
    assert spool.num_sent == 1234


def test_a_row_of_more_metrics_than_one_request_takes_arrives(spool, client):
    spool.append(event(row(1, **{f"m{i}": float(i) for i in range(1500)})))
    run_id = tracking.send(spool, {})
    metrics = client.get_run(run_id).data.metrics
    assert metrics == {f"m{i}": float(i) for i in range(1500)}


def test_what_was_sent_is_not_sent_again(spool, client):
    spool.append(*map(event, rows(2)))
    run_id = tracking.send(spool, {})
    spool.append(event(row(999, **{"train/loss": 9.0})))
    assert [e["position"] for e in spool.waiting()] == [999]
    assert tracking.send(spool, {}) == run_id
    assert [step for step, _, _ in history(client, run_id, "train/loss")] == [64, 128, 999]


def test_sending_nothing_makes_the_run(spool, client):
    run_id = tracking.send(spool, {})
    assert [run.info.run_id for run in runs(client)] == [run_id]


def test_two_senders_at_once_send_each_row_once_to_one_run(spool, client):
    """A thread that was left behind and the one after it; a run and `swa-dist replay`."""
    everything = rows(400)
    spool.append(*map(event, everything[:300]))
    start, found = threading.Barrier(3), []

    def sender():
        own = Spool(spool.folder)
        start.wait()
        for _ in range(3):
            found.append(tracking.send(own, {}))

    senders = [threading.Thread(target=sender) for _ in range(2)]
    for thread in senders:
        thread.start()
    start.wait()
    spool.append(*map(event, everything[300:]))
    for thread in senders:
        thread.join()
    tracking.send(spool, {})
    (run,) = runs(client)
    assert found == [run.info.run_id] * 6
    expected = [(r["position"], r["metrics"]["train/loss"], r["time_ms"]) for r in everything]
    assert history(client, run.info.run_id, "train/loss") == expected
    assert (spool.num_sent, spool.waiting()) == (400, [])


def test_two_senders_at_once_hand_over_each_model_once(spool):
    handled, start = [], threading.Barrier(2)

    def handler(client, run_id, event, folder):
        time.sleep(0.1)
        handled.append(event["n"])

    def sender():
        start.wait()
        tracking.send(Spool(spool.folder), {"model": handler})

    spool.append(*({"kind": "model", "n": n} for n in range(3)))
    senders = [threading.Thread(target=sender) for _ in range(2)]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join()
    assert handled == [0, 1, 2]


def test_a_sender_does_not_wait_for_good_for_another(spool, monkeypatch):
    monkeypatch.setattr(spool_module, "_LOCK_SECONDS", 0.3)
    with spool.one_sender(), pytest.raises(ServiceError, match="by one process at a time"):
        tracking.send(Spool(spool.folder), {})
    tracking.send(Spool(spool.folder), {})


# The run


def test_the_same_key_and_first_attempt_is_the_same_run(spool, client, uri, tmp_path):
    run_id = tracking.send(spool, {})
    elsewhere = Spool(tmp_path)
    elsewhere.open(target_of(uri))
    elsewhere.append(event(row(64, **{"train/loss": 1.0})))
    assert tracking.send(elsewhere, {}) == run_id
    (run,) = runs(client)
    assert run.info.run_name == "small"
    assert run.data.tags["swa.run_key"] == "k" * 64


@pytest.mark.parametrize("other", [{"first_attempt": 2}, {"run_key": "j" * 64}])
def test_another_first_attempt_or_key_is_another_run(spool, client, uri, tmp_path, other):
    run_id = tracking.send(spool, {})
    elsewhere = Spool(tmp_path)
    elsewhere.open(target_of(uri, **other))
    other_id = tracking.send(elsewhere, {})
    assert {run.info.run_id for run in runs(client)} == {run_id, other_id}
    assert other_id != run_id


def test_of_two_runs_with_the_tags_it_is_the_older_one(spool, client):
    """The answer to the first create_run was lost, and somebody's settings make the client repeat it."""
    experiment = client.create_experiment("digits")
    tags = {"swa.run_key": "k" * 64, "swa.first_attempt": "1"}
    made = [client.create_run(experiment, start_time=t, tags=tags).info.run_id for t in (3000, 1000, 2000)]
    assert tracking.send(spool, {}) == made[1]


def test_params_tags_and_data_sets_with_their_digests_arrive(spool, client, tmp_path):
    digests = {"train": "a" * 64, "val": "b" * 64}
    datasets = {
        split: {"source": (tmp_path / split).as_uri(), "name": f"digits-{split}", "digest": digest}
        for split, digest in digests.items()
    }
    params = {"optim.epochs": 5, "data.flip": False, "data.crop_area": [0.08, 1.0], "seed": 0}
    params |= {f"p{i}": i for i in range(150)}  # more than one request takes
    spool.append(
        {"kind": "start", "params": params, "datasets": datasets},
        {"kind": "tags", "tags": {"swa.attempt": 1, "swa.weights": "IMAGENET1K_V1"}},
    )
    run = client.get_run(tracking.send(spool, {}))
    assert run.data.params == {name: str(value) for name, value in params.items()}
    assert (run.data.tags["swa.attempt"], run.data.tags["swa.weights"]) == ("1", "IMAGENET1K_V1")
    found = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert found.keys() == digests.keys()
    for split, digest in digests.items():
        assert found[split].name == f"digits-{split}"
        assert digest.startswith(found[split].digest)
        assert len(found[split].digest) >= 32
        assert str(tmp_path / split) in found[split].source


def test_a_start_that_is_sent_twice_changes_nothing(spool, client, tmp_path):
    datasets = {"train": {"source": tmp_path.as_uri(), "name": "digits-train", "digest": "a" * 64}}
    spool.append({"kind": "start", "params": {"seed": 0}, "datasets": datasets})
    before = client.get_run(tracking.send(spool, {}))
    forget_sent(spool, 0)
    after = client.get_run(tracking.send(spool, {}))
    assert (after.data.params, len(after.inputs.dataset_inputs)) == (before.data.params, 1)


def test_a_later_attempt_adds_the_params_that_lack_and_nothing_refuses_those_that_are_others(spool, client):
    first = {"seed": 0, "cluster.num_workers": 8, "data.train": "/" + 6500 * "x", "output.dir": ""}
    spool.append({"kind": "start", "params": first, "datasets": {}})
    tracking.send(spool, {})
    second = {"seed": 0, "cluster.num_workers": 2, "tracking.system_metrics": True, "data.train": "/y"}
    spool.append({"kind": "start", "params": second, "datasets": {}}, {"kind": "tags", "tags": {"swa.attempt": 2}})
    run = client.get_run(tracking.send(spool, {}))
    assert spool.waiting() == []
    assert run.data.params == {
        "seed": "0",
        "cluster.num_workers": "8",
        "data.train": first["data.train"][:6000],
        "output.dir": "",
        "tracking.system_metrics": "True",
    }
    assert run.data.tags["swa.attempt"] == "2"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_the_status_and_the_time_of_the_end_arrive_and_a_resumed_run_is_running(spool, client, status):
    spool.append({"kind": "status", "status": "RUNNING"}, {"kind": "status", "status": status, "time_ms": 123_456})
    info = client.get_run(tracking.send(spool, {})).info
    assert (info.status, info.end_time) == (status, 123_456)
    spool.append({"kind": "status", "status": "RUNNING"})
    assert client.get_run(tracking.send(spool, {})).info.status == "RUNNING"


def test_a_file_arrives_as_an_artifact_beside_the_database(spool, client, tmp_path):
    (spool.folder / "recipe.yaml").write_text("name: small\n")
    spool.append({"kind": "artifact", "name": "recipe.yaml"})
    run_id = tracking.send(spool, {})
    (tmp_path / "fetched").mkdir()
    fetched = client.download_artifacts(run_id, "recipe.yaml", str(tmp_path / "fetched"))
    assert Path(fetched).read_text() == "name: small\n"
    assert client.get_run(run_id).info.artifact_uri.startswith((tmp_path / "mlruns").as_uri())


def test_a_file_is_fetched_from_where_the_run_is_before_it_is_sent(spool, client, tmp_path):
    """A run's folder on S3: the worker that sends has a folder of its own."""

    def fetch(name):
        (spool.folder / name).write_text("name: small\n")

    spool.append({"kind": "artifact", "name": "recipe.yaml"})
    run_id = tracking.send(Spool(spool.folder, fetch=fetch), {})
    assert [found.path for found in client.list_artifacts(run_id)] == ["recipe.yaml"]


def test_events_are_handled_in_order_and_one_that_fails_stops_those_after_it(spool, client):
    handled = []

    def handler(client, run_id, event, folder):
        assert folder == spool.folder
        handled.append(event["n"])
        if event["n"] == 2 and len(handled) < 4:
            raise mlflow.exceptions.MlflowException("refused")

    spool.append(*({"kind": "model", "n": n} for n in (1, 2, 3)))
    for _ in range(2):
        with pytest.raises(ServiceError, match="refused"):
            tracking.send(spool, {"model": handler})
        assert [e["n"] for e in spool.waiting()] == [2, 3]
    tracking.send(spool, {"model": handler})
    assert handled == [1, 2, 2, 2, 3]


def test_an_error_of_whatever_mlflow_is_made_of_is_one_that_can_be_waited_out(spool):
    def handler(client, run_id, event, folder):
        raise botocore.exceptions.NoCredentialsError()

    spool.append({"kind": "model"})
    with pytest.raises(ServiceError, match="Unable to locate credentials"):
        tracking.send(spool, {"model": handler})
    assert len(spool.waiting()) == 1


# The spool's file


def test_a_half_written_last_line_is_ignored(spool, client):
    spool.append(*map(event, rows(2)))
    whole = spool.events.read_text()
    for cut in (1, 10, 60):
        spool.events.write_text(whole + json.dumps(event(row(999, **{"train/loss": 1.0})))[:cut])
        assert spool.read() == list(map(event, rows(2)))
    run_id = tracking.send(spool, {})
    assert [step for step, _, _ in history(client, run_id, "train/loss")] == [64, 128]


def test_what_is_written_after_a_half_written_line_is_read(spool):
    """A kill cuts a line short, and the next attempt goes on writing to the same file."""
    spool.append(*map(event, rows(2)))
    with spool.events.open("a") as file:
        file.write('{"kind": "row", "posi')
    again = Spool(spool.events.parent)
    again.append({"kind": "tags", "tags": {}})
    assert again.read() == [*map(event, rows(2)), {"kind": "tags", "tags": {}}]


def test_writers_at_once_leave_whole_lines(spool):
    def write(name):
        for n in range(50):
            Spool(spool.folder).append(
                *({"kind": "tags", "tags": {"x": "y" * 9000}, "by": [name, n]} for _ in range(3))
            )

    writers = [threading.Thread(target=write, args=[name]) for name in range(3)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    found = [e["by"] for e in spool.read()]
    assert sorted(found) == [[name, n] for name in range(3) for n in range(50) for _ in range(3)]


def test_the_number_sent_never_goes_back(spool):
    spool.append(*map(event, rows(5)))
    for number in (4, 2, 0):
        spool.mark_sent(number)
        assert spool.num_sent == 4


def test_a_spool_survives_its_process(spool, uri):
    spool.append(*map(event, rows(3)))
    spool.mark_sent(1)
    again = Spool(spool.events.parent)
    assert again.target == target_of(uri)
    assert again.waiting() == list(map(event, rows(3)))[1:]


def test_texts_of_any_kind_survive_the_spool(spool):
    events = [{"kind": "tags", "tags": {"x": text}} for text in ("a\nb", "a\u2028b\x85c\x0bd", "ü😀", '"', "\\n")]
    spool.append(*events)
    assert spool.read() == events


def test_numbers_that_are_not_finite_arrive(spool, client):
    spool.append(event(row(64, **{"train/loss": float("nan")})), event(row(128, **{"train/loss": 2.0})))
    run_id = tracking.send(spool, {})
    assert [step for step, _, _ in history(client, run_id, "train/loss")] == [64, 128]


def test_a_folder_without_a_spool_is_named(tmp_path):
    with pytest.raises(ServiceError, match=str(tmp_path)):
        _ = Spool(tmp_path).target


# MLflow down


def test_a_service_error_has_exit_code_69():
    assert ServiceError.exit_code == ExitCode.DEPENDENCY_DOWN == 69


def test_a_server_that_is_not_there_is_a_service_error_in_seconds_and_nothing_is_lost(spool, client, closed, uri):
    spool.append({"kind": "tags", "tags": {"swa.attempt": 1}}, *map(event, rows(5)))
    spool.open(target_of(closed))
    began = time.monotonic()
    with pytest.raises(ServiceError, match=f"MLflow at {closed} must answer"):
        tracking.send(spool, {})
    assert time.monotonic() - began < 20  # MLflow's own defaults take minutes
    assert len(spool.waiting()) == 6
    spool.open(target_of(uri))
    run_id = tracking.send(spool, {})
    assert [step for step, _, _ in history(client, run_id, "train/loss")] == [64, 128, 192, 256, 320]
    assert client.get_run(run_id).data.tags["swa.attempt"] == "1"


def test_the_environments_own_settings_of_the_client_win(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking.configure_client()
    assert mlflow.environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 0


def junk_database(folder):
    (folder / "junk.db").write_bytes(b"this is no database" * 100)
    return f"sqlite:///{folder / 'junk.db'}"


def database_under_a_file(folder):
    (folder / "file").touch()
    return f"sqlite:///{folder / 'file' / 'mlflow.db'}"


@pytest.mark.parametrize(
    "address",
    [
        junk_database,
        database_under_a_file,
        lambda folder: "postgresql://127.0.0.1:1/mlflow",
        lambda folder: "foo://bar",
    ],
    ids=["junk-database", "database-under-a-file", "postgresql", "unknown-scheme"],
)
def test_a_store_that_is_none_is_a_service_error_and_nothing_is_lost(spool, tmp_path, address):
    spool.append(*map(event, rows(2)))
    spool.open(target_of(address(tmp_path)))
    with pytest.raises(ServiceError, match="MLflow at"):
        tracking.send(spool, {})
    assert len(spool.waiting()) == 2


# The tracker of a run


@pytest.fixture
def tracker(spool):
    made = SpoolTracker(spool, Record())
    yield made
    made.close(20)


@pytest.fixture
def uncaught(monkeypatch):
    """What threads died of."""
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    return died


def test_publishing_the_same_rows_again_spools_each_once(spool, tracker):
    all_rows = rows(6)
    for count in (2, 2, 4, 4, 6, 6):
        tracker.publish(all_rows[:count])
    assert [e for e in spool.read() if e["kind"] == "row"] == list(map(event, all_rows))


def test_publishing_fewer_rows_than_before_spools_nothing(spool, tracker):
    """A resumed run begins with the rows of its last checkpoint, all of which were published."""
    tracker.publish(rows(4))
    tracker.publish(rows(2))
    tracker.publish([])
    assert len(spool.read()) == 4


def test_a_tracker_of_the_next_attempt_goes_on_where_the_one_before_it_stopped(spool):
    for count in (3, 3, 5):
        tracker = SpoolTracker(spool, Record())
        tracker.publish(rows(count))
        tracker.close(20)
    assert spool.read() == list(map(event, rows(5)))


def test_what_is_published_is_sent_by_the_trackers_own_thread(spool, client, tracker):
    tracker.publish(rows(3))
    deadline = time.monotonic() + 30
    while spool.num_sent < 3 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    (run,) = runs(client)
    assert len(history(client, run.info.run_id, "train/loss")) == 3


def test_what_waits_is_sent_as_soon_as_the_tracker_starts(spool, client):
    spool.append(*map(event, rows(3)))
    tracker = SpoolTracker(spool, Record())
    deadline = time.monotonic() + 30
    while spool.num_sent < 3 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    tracker.close(20)
    (run,) = runs(client)
    assert len(history(client, run.info.run_id, "train/loss")) == 3


def test_rows_that_the_disk_did_not_take_come_with_the_next(spool, closed):
    spool.open(target_of(closed))
    display = Record()
    tracker = SpoolTracker(spool, display)
    tracker.publish(rows(2))
    spool.folder.rename(spool.folder.with_name("away"))
    tracker.publish(rows(4))
    assert any("run/spool.jsonl must be writable" in line for line in display.said)
    spool.folder.with_name("away").rename(spool.folder)
    tracker.publish(rows(6))
    tracker.close(20)
    assert spool.read() == list(map(event, rows(6)))


def test_rows_that_the_mirror_did_not_take_are_spooled_once(spool):
    def mirror(name):
        raise ServiceError("S3 is away")

    tracker = SpoolTracker(Spool(spool.folder, mirror), Record())
    for count in (2, 4):
        tracker.publish(rows(count))
    tracker.close(20)
    assert spool.read() == list(map(event, rows(4)))


def test_rows_from_one_thread_and_progress_and_warnings_from_another_all_arrive(spool):
    display = Record()
    tracker = SpoolTracker(spool, display)
    writer = threading.Thread(target=lambda: [tracker.publish(rows(n)) for n in range(1, 41)])
    writer.start()
    for n in range(200):
        tracker.progress("train", n, 200)
        tracker.warn(str(n))
    writer.join()
    tracker.close(20)
    assert [done for _, done, _, _ in display.shown] == list(range(200))
    assert display.said == [f"warning: {n}" for n in range(200)]
    assert spool.read() == list(map(event, rows(40)))


def test_progress_and_warnings_go_to_the_display(spool):
    display = Record()
    tracker = SpoolTracker(spool, display)
    tracker.progress("train", 64, 400, "epoch 1/5")
    tracker.warn("careful")
    tracker.close(20)
    assert display.shown == [("train", 64, 400, "epoch 1/5")]
    assert display.said == ["warning: careful"]


def test_close_returns_promptly_with_a_server_that_is_not_there_and_nothing_is_lost(spool, closed, uncaught):
    spool.open(target_of(closed))
    display = Record()
    tracker = SpoolTracker(spool, display)
    tracker.publish(rows(3))
    began = time.monotonic()
    tracker.close(20)
    assert time.monotonic() - began < 20
    assert len(spool.waiting()) == 3
    assert uncaught == []


def test_publishing_never_waits_for_a_server_and_warns_once(spool, closed, uncaught, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spool.open(target_of(closed))
    display = Record()
    tracker = SpoolTracker(spool, display)
    tracker.publish(rows(1))
    assert display.heard.wait(30)
    for count in range(2, 20):
        began = time.monotonic()
        tracker.publish(rows(count))
        assert time.monotonic() - began < 1
    tracker.close(20)
    assert len(display.said) == 1
    assert "the run goes on" in display.said[0]
    assert len(spool.waiting()) == 19
    assert uncaught == []


@pytest.fixture
def deaf():
    """The address of a server that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_close_waits_for_a_request_without_answer_no_longer_than_it_was_told(spool, deaf):
    spool.open(target_of(deaf))
    spool.append(*map(event, rows(3)))
    display = Record()
    tracker = SpoolTracker(spool, display)
    time.sleep(0.5)
    began = time.monotonic()
    tracker.close(1)
    assert 0.9 < time.monotonic() - began < 2
    assert (len(spool.waiting()), display.said) == (3, [])


@pytest.mark.parametrize("server", ["closed", "deaf"])
def test_the_last_words_of_a_run_take_no_longer_than_they_may(spool, client, uri, request, server):
    folder = open_folder(str(spool.folder))
    spool.append({"kind": "status", "status": "KILLED", "time_ms": 123})
    spool.open(target_of(request.getfixturevalue(server)))
    began = time.monotonic()
    assert not registry.send_within(folder, 1)
    assert time.monotonic() - began < 2
    assert len(spool.waiting()) == 1


def test_the_last_words_of_a_run_arrive(spool, client):
    spool.append({"kind": "status", "status": "KILLED", "time_ms": 123})
    assert registry.send_within(open_folder(str(spool.folder)), 30)
    (run,) = runs(client)
    assert (run.info.status, run.info.end_time) == ("KILLED", 123)


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_what_is_asked_patiently_may_fail_twice(monkeypatch, failures):
    monkeypatch.setattr(tracking, "_PAUSES_SECONDS", (0.01, 0.01))
    asked = []

    def ask():
        asked.append(1)
        if len(asked) <= failures:
            raise ServiceError("for a moment")
        return "answer"

    if failures > 2:
        with pytest.raises(ServiceError, match="for a moment"):
            tracking.patiently(ask)
    else:
        assert tracking.patiently(ask) == "answer"
    assert len(asked) == min(failures + 1, 3)


@pytest.mark.parametrize("broken", ["database", "event"])
def test_whatever_goes_wrong_in_the_sender_is_a_warning_and_never_a_dead_thread(spool, tmp_path, uncaught, broken):
    if broken == "database":
        spool.open(target_of(junk_database(tmp_path)))
    else:
        spool.append({"kind": "model"})  # of an attempt that got so far and was killed: not this thread's to handle
    display = Record()
    tracker = SpoolTracker(spool, display)
    tracker.publish(rows(1))
    display.heard.wait(2)
    tracker.close(20)
    assert uncaught == []
    assert len(spool.waiting()) == (1 if broken == "database" else 2)


def test_closing_an_idle_tracker_is_instant(spool):
    began = time.monotonic()
    SpoolTracker(spool, Record()).close(20)
    assert time.monotonic() - began < 1
