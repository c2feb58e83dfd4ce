"""MLflow is away in every way that it can be: no step of a run waits for it, and in the end it has all of it once."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from swa_dist import config
from swa_dist.errors import ServiceError
from swa_dist.service import registry, tracking
from swa_dist.service.progress import Silent
from swa_dist.service.spool import Spool, Target
from swa_dist.service.tracking import SpoolTracker
from swa_dist.storage.folder import open_folder
from tests.support import MlflowServer, Proxy, Said, digits_recipe, write_finished

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STEPS, STEP_SECONDS, ROWS_EVERY = 150, 0.02, 5
BEGINS, ENDS = 30, 110  # the steps at which an outage in the middle does
LONGEST_STEP_SECONDS = 2.0
END_MS = 1_764_000_999_000


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow-server")) as made:
        yield made


@pytest.fixture
def server(one_server: MlflowServer) -> Iterator[MlflowServer]:
    """It runs, whatever the test before this did to it."""
    one_server.start()
    yield one_server
    one_server.signal(signal.SIGCONT)


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    tracking.configure_client()
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.3)
    monkeypatch.setattr(tracking, "_PAUSES_SECONDS", (0.1, 0.1))


def rows(count: int) -> list[Any]:
    return [
        {
            "position": 64 * n,
            "epoch": n / 100,
            "time_ms": 1_764_000_000_000 + n,
            "metrics": {"train/loss": 1 / n, "train/lr": 0.1 * n},
        }
        for n in range(1, count + 1)
    ]


PARAMS = {"optim.epochs": 5, "seed": 0}
TAGS = {"swa.run_key": "k" * 64, "swa.first_attempt": "1"}


def new_spool(folder: Path, uri: str, experiment: str) -> Spool:
    """A run's, as it is when the run starts."""
    folder.mkdir()
    spool = Spool(folder)
    spool.open(Target(uri=uri, experiment=experiment, run_name="small", run_key="k" * 64, first_attempt=1))
    (folder / "recipe.yaml").write_text("name: small\n")
    dataset = {"source": folder.as_uri(), "name": "digits-train", "digest": "a" * 64}
    spool.append(
        {"kind": "start", "params": PARAMS, "datasets": {"train": dataset}},
        {"kind": "tags", "tags": {"swa.attempt": 1}},
        {"kind": "status", "status": "RUNNING"},
        {"kind": "artifact", "name": "recipe.yaml"},
    )
    return spool


@dataclass(frozen=True)
class Timed:
    longest_step: float
    total: float


def train(tracker: SpoolTracker, at: Callable[[int], None]) -> Timed:
    """Steps that report as a run's do."""
    everything, steps = rows(STEPS), []
    for step in range(STEPS):
        at(step)
        began = time.monotonic()
        time.sleep(STEP_SECONDS)
        tracker.progress("train", step, STEPS)
        if step % ROWS_EVERY == 0 or step == STEPS - 1:
            tracker.publish(everything[: step + 1])
        steps.append(time.monotonic() - began)
    return Timed(max(steps), sum(steps))


def runs_in(server: MlflowServer, experiment: str) -> list[Any]:
    client = mlflow.MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_all_is_there_once(server: MlflowServer, experiment: str, seen: set[str]) -> None:
    client = mlflow.MlflowClient(server.uri)
    (run,) = runs_in(server, experiment)
    assert seen <= {run.info.run_id}
    for name in ("train/loss", "train/lr"):
        found = sorted((m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, name))
        assert found == [(row["position"], row["metrics"][name], row["time_ms"]) for row in rows(STEPS)]
    assert run.data.params == {name: str(value) for name, value in PARAMS.items()}
    assert {name: run.data.tags[name] for name in (*TAGS, "swa.attempt")} == TAGS | {"swa.attempt": "1"}
    assert (run.info.status, run.info.end_time) == ("FINISHED", END_MS)
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["digits-train"]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["recipe.yaml"]


@pytest.fixture(scope="module")
def healthy(one_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Timed:
    """The same steps with a server that answers."""
    one_server.start()
    tracker = SpoolTracker(new_spool(tmp_path_factory.mktemp("healthy") / "run", one_server.uri, "healthy"), Said())
    timed = train(tracker, lambda step: None)
    tracker.close(20)
    return timed


ERROR_500 = "500 Internal MlflowServer Error\r\nContent-Length: 0\r\n\r\n"
ERROR_403 = "403 Forbidden\r\nContent-Length: 0\r\n\r\n"


class Outage:
    """One that begins and ends in the middle of a run, in a thread of its own as an operator would have it."""

    def __init__(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self._steps = {BEGINS: threading.Event(), ENDS: threading.Event()}
        self._thread = threading.Thread(target=self._happen, args=(begin, end), daemon=True)
        self._thread.start()

    def at(self, step: int) -> None:
        if step in self._steps:
            self._steps[step].set()

    def _happen(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self._steps[BEGINS].wait()
        begin()
        self._steps[ENDS].wait()
        end()

    def join(self) -> None:
        self._thread.join()


def finish(spool: Spool) -> str:
    """What the driver does when its workers are done."""
    spool.append({"kind": "status", "status": "FINISHED", "time_ms": END_MS})
    return registry.send(open_folder(str(spool.folder)), Silent())


def assert_no_slower(name: str, timed: Timed, healthy: Timed) -> None:
    print(
        f"{name}: longest step {timed.longest_step * 1000:.0f} ms, all steps {timed.total:.2f} s,"
        f" {timed.total / healthy.total:.3f} of the time with a healthy server"
    )
    assert timed.longest_step <= LONGEST_STEP_SECONDS
    assert timed.total <= healthy.total + max(0.5, 0.2 * healthy.total)


def test_a_server_that_comes_up_after_the_training_gets_all_of_it(
    server: MlflowServer, healthy: Timed, tmp_path: Path
) -> None:
    server.kill()
    spool, said = new_spool(tmp_path / "run", server.uri, "down"), Said()
    tracker = SpoolTracker(spool, said)
    timed = train(tracker, lambda step: None)
    tracker.close(2)
    assert len(said.lines) == 1
    with pytest.raises(ServiceError, match="must answer"):
        finish(spool)
    assert spool.num_sent == 0
    server.start()
    seen = {registry.send(open_folder(str(spool.folder)), Silent())}
    assert_no_slower("down at start", timed, healthy)
    assert_all_is_there_once(server, "down", seen)


@pytest.mark.parametrize("outage", ["killed", "stopped", "500", "403"])
def test_an_outage_in_the_middle_is_caught_up_with_by_the_thread_itself(
    server: MlflowServer, healthy: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: str
) -> None:
    answer = [""]
    with Proxy(server.uri, lambda number, method, path: answer[0]) as proxy:
        happening = {
            "killed": lambda: Outage(server.kill, server.start),
            "stopped": lambda: Outage(lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT)),
            "500": lambda: Outage(lambda: answer.__setitem__(0, ERROR_500), lambda: answer.__setitem__(0, "")),
            "403": lambda: Outage(lambda: answer.__setitem__(0, ERROR_403), lambda: answer.__setitem__(0, "")),
        }[outage]()
        if outage == "stopped":
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # so that requests are given up, and sent again
        uri = proxy.url if outage in ("500", "403") else server.uri
        spool, said = new_spool(tmp_path / "run", uri, outage), Said()
        tracker = SpoolTracker(spool, said)
        wait_until(lambda: spool.waiting() == [])
        seen = {run.info.run_id for run in runs_in(server, outage)}
        assert len(seen) == 1
        timed = train(tracker, happening.at)
        happening.join()
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
        wait_until(lambda: spool.waiting() == [])
        wait_until(lambda: len(said.lines) >= 2)
        tracker.close(20)
        warning, again = said.lines
        assert "the run goes on" in warning
        assert again == "MLflow answers again."
        seen.add(finish(spool))
    assert_no_slower(outage, timed, healthy)
    assert_all_is_there_once(server, outage, seen)


def test_a_server_that_takes_ten_seconds_an_answer_delays_nothing_and_its_thread_can_be_left(
    server: MlflowServer, healthy: Timed, tmp_path: Path
) -> None:
    slow = threading.Event()
    slow.set()

    def rule(number: int, method: str, path: str) -> str:
        if slow.is_set():
            time.sleep(10)
        return ""

    with Proxy(server.uri, rule) as proxy:
        spool, said = new_spool(tmp_path / "run", proxy.url, "slow"), Said()
        began = time.monotonic()
        tracker = SpoolTracker(spool, said)
        timed = train(tracker, lambda step: None)
        tracker.close(2)
        assert time.monotonic() - began < timed.total + 2 + 1
        assert not registry.send_within(open_folder(str(spool.folder)), 1)
        slow.clear()
        seen = {finish(spool)}
        assert said.lines == []
    assert_no_slower("10 s an answer", timed, healthy)
    assert_all_is_there_once(server, "slow", seen)


class LosingAnswers:
    """Every other answer to a write of a kind is lost, the first among them."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds
        self.times = dict.fromkeys(kinds, 0)

    def __call__(self, number: int, method: str, path: str) -> str:
        if method == "GET":
            return ""
        for kind in self.kinds:
            if path.partition("?")[0].endswith(kind):
                self.times[kind] += 1
                return "deaf" if self.times[kind] % 2 else ""
        return ""


def test_writes_whose_answers_are_lost_are_done_once(server: MlflowServer, healthy: Timed, tmp_path: Path) -> None:
    kinds = ("experiments/create", "runs/create", "runs/log-batch", "runs/log-inputs", "runs/update", "recipe.yaml")
    losing = LosingAnswers(*kinds)
    with Proxy(server.uri, losing) as proxy:
        spool, said = new_spool(tmp_path / "run", proxy.url, "deaf"), Said()
        tracker = SpoolTracker(spool, said)
        timed = train(tracker, lambda step: None)
        wait_until(lambda: spool.waiting() == [])
        tracker.close(20)
        seen = {finish(spool)}
        assert min(losing.times.values()) > 0
        assert losing.times["runs/create"] == 1  # the run that it made is found
    assert_no_slower("answers lost", timed, healthy)
    assert_all_is_there_once(server, "deaf", seen)


def test_a_model_whose_registration_has_no_answers_is_registered_once(
    server: MlflowServer, few_digits: Path, tmp_path: Path
) -> None:
    """Each write is lost once: the logged model, its end, the name, the version and the alias."""
    recipe = digits_recipe(few_digits, "random", **{"registry.model": "outages", "output.dir": str(tmp_path)})
    losing = LosingAnswers(
        *("mlflow/logged-models", "outputs", "PATCH"),
        *("registered-models/create", "model-versions/create", "registered-models/alias", "registered-models/set-tag"),
    )

    def rule(number: int, method: str, path: str) -> str:
        return losing(number, method, "PATCH" if method == "PATCH" else path)

    with Proxy(server.uri, rule) as proxy:
        spool, folder = new_spool(tmp_path / "run", proxy.url, "model"), open_folder(str(tmp_path / "run"))
        write_finished(folder, recipe)
        model = {
            "recipe": config.to_tree(recipe),
            "uri": proxy.url,
            "entry": "candidates/swa",
            "time_ms": END_MS,
            "tags": {"attempt": 1, "verdict": "-"},
        }
        spool.append({"kind": "model", **model}, {"kind": "status", "status": "FINISHED", "time_ms": END_MS})
        sends = 0
        while spool.waiting():
            sends += 1
            assert sends < 20, losing.times
            with contextlib.suppress(ServiceError):
                registry.send(folder, Silent())
    client = mlflow.MlflowClient(server.uri, registry_uri=server.uri)
    (run,) = runs_in(server, "model")
    (version,) = client.search_model_versions("name = 'outages'")
    assert version.run_id == run.info.run_id
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert version.source == logged.artifact_location
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "outages", "version": 1}]
    assert str(client.get_model_version_by_alias("outages", "champion").version) == version.version == "1"
    assert (run.info.status, run.info.end_time) == ("FINISHED", END_MS)
    assert (folder.read_json(registry.REGISTERED) or {})["champion"]
    assert min(losing.times.values()) > 0, losing.times
