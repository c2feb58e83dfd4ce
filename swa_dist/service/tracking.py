"""What a run tells MLflow, by way of a spool on disk: MLflow being slow or down never stops or slows a run.

A spool holds events in the order they happened, each with its own time, so that sending one twice changes nothing; what
could not be sent waits there for `swa-dist replay`. Imports mlflow.
"""

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import mlflow
import mlflow.data
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from swa_dist.errors import ServiceError, SwaDistError
from swa_dist.service import mlflow_refusals
from swa_dist.service.progress import Display
from swa_dist.service.spool import Event, Spool, Target
from swa_dist.training.state import Row

T = TypeVar("T")

_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
_PARAM_CHARACTERS = 6000  # the most that MLflow takes, as of a digest
_DIGEST_CHARACTERS = 36
_RETRY_SECONDS = 15.0
_PAUSES_SECONDS = (2.0, 4.0)

# MLflow's own defaults hold a caller for minutes when its server is gone (7 retries, 120 s each). And where an answer
# was lost, its client's retry of create_run is a second run: it retries nothing, and who sends begins with a search.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class SpoolTracker:
    """The tracker of a run: progress to a display, metrics to the spool, and a thread that sends them on, first of all
    what waits there already."""

    def __init__(self, spool: Spool, display: Display) -> None:
        self._spool = spool
        self._display = display
        self._saying = threading.Lock()
        self._rows_spooled = _num_rows(spool)
        self._wake = threading.Event()
        self._closing = threading.Event()
        if spool.waiting():
            self._wake.set()
        self._thread = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)
        self._thread.start()

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        with self._saying:
            self._display.progress(phase, done, total, note)

    def warn(self, message: str) -> None:
        self._say(f"warning: {message}")

    def publish(self, rows: Sequence[Row]) -> None:
        """From any thread, one at a time. Waits for the spool's storage, never for MLflow."""
        new = rows[self._rows_spooled :]
        if new:
            try:
                self._spool.append(*({"kind": "row", **row} for row in new))
                self._rows_spooled = len(rows)
            except (SwaDistError, OSError) as error:
                self.warn(f"{error} The metrics are kept in the checkpoint; the run goes on.")
                with contextlib.suppress(OSError):  # those that the disk did not take come with the next
                    self._rows_spooled = max(self._rows_spooled, _num_rows(self._spool))
            self._wake.set()

    def close(self, patience_seconds: float) -> None:
        """Stop sending, after the request under way, which is left to itself if it takes longer. What is not sent waits
        in the spool."""
        self._closing.set()
        self._wake.set()
        self._thread.join(patience_seconds)

    def _send(self) -> None:
        failing = False
        while True:
            if failing:
                self._closing.wait(_RETRY_SECONDS)
            else:
                self._wake.wait()
            self._wake.clear()
            if self._closing.is_set():
                return
            failed: Exception | None = None
            try:
                send(self._spool, {}, self._closing.is_set)
            except Exception as error:  # nothing may end this thread, or the run would tell MLflow nothing more
                failed = error
            if self._closing.is_set():
                return
            if failed and not failing:
                self.warn(f"{failed} Metrics wait in {self._spool.events}; the run goes on.")
            if failing and not failed:
                self._say("MLflow answers again.")
            failing = failed is not None

    def _say(self, line: str) -> None:
        with self._saying:
            self._display.say(line)


def _num_rows(spool: Spool) -> int:
    return sum(event["kind"] == "row" for event in spool.read())


def configure_client() -> None:
    """Keep MLflow's client from holding its caller for minutes, and from chatter; the environment's settings win."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


Handler = Callable[[mlflow.MlflowClient, str, Event, Path], None]
"""Takes a client, the id of the MLflow run, the event, and the folder of the run that the event is of."""


def send(spool: Spool, handlers: dict[str, Handler], should_stop: Callable[[], bool] = lambda: False) -> str:
    """Send what waits, in order, up to an event of a kind that has no handler. Returns the MLflow run's id.

    `handlers`: for kinds of events beyond those here. `should_stop` is asked between requests.

    Raises ServiceError where MLflow can't be reached or refuses: what was sent until then is not sent again.
    """
    target = spool.target
    with answering(target.uri), spool.one_sender():
        client = mlflow.MlflowClient(tracking_uri=target.uri, registry_uri=target.uri)
        run_id = find_or_create_run(client, target)
        _send_waiting(spool, client, run_id, _HANDLERS | handlers, should_stop)
    return run_id


def _send_waiting(
    spool: Spool,
    client: mlflow.MlflowClient,
    run_id: str,
    handlers: dict[str, Handler],
    should_stop: Callable[[], bool],
) -> None:
    sent = spool.num_sent
    waiting = spool.waiting()
    while waiting and not should_stop():
        kind = waiting[0]["kind"]
        count = 1
        if kind == "row":
            while count < len(waiting) and waiting[count]["kind"] == "row" and count < _METRICS_PER_REQUEST // 10:
                count += 1
            _log_rows(client, run_id, waiting[:count])
        elif kind in handlers:
            if kind == "artifact":
                spool.fetch(waiting[0]["name"])
            handlers[kind](client, run_id, waiting[0], spool.folder)
        else:
            break
        sent += count
        spool.mark_sent(sent)
        waiting = waiting[count:]


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns; after a ServiceError it is asked again, twice, seconds later. For what may be done again."""
    for pause in _PAUSES_SECONDS:
        with contextlib.suppress(ServiceError):
            return ask()
        time.sleep(pause)
    return ask()


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Within the block whatever MLflow raises is a ServiceError."""
    try:
        yield
    except SwaDistError:
        raise
    except Exception as error:  # a database, a driver, a bucket: whatever MLflow is made of
        raise _unanswered(uri, error) from error


def _unanswered(uri: str, error: Exception) -> ServiceError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    if isinstance(error, MlflowException):
        remedy = mlflow_refusals.remedy(uri, error.get_http_status_code(), str(error))
    else:
        remedy = None
    if remedy is not None:
        return ServiceError(f"MLflow at {uri} must do what is asked, but refuses: {reason}. {remedy}")
    return ServiceError(f"MLflow at {uri} must answer, but does not: {reason}.")


def find_or_create_run(client: mlflow.MlflowClient, target: Target) -> str:
    """The id of the oldest run that has the target's tags; one is made if there is none."""
    experiment = client.get_experiment_by_name(target.experiment)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(target.experiment, artifact_location=_artifact_location(target))
    )
    found = _runs(client, experiment_id, target)
    if not found:
        made = client.create_run(experiment_id, tags=_tags(target), run_name=target.run_name)
        found = [made, *_runs(client, experiment_id, target)]  # a lost answer's may have come to be
    return str(_oldest(found).info.run_id)


def find_run(client: mlflow.MlflowClient, target: Target) -> Run | None:
    """The oldest run that has the target's tags, if there is one."""
    experiment = client.get_experiment_by_name(target.experiment)
    found = _runs(client, experiment.experiment_id, target) if experiment else []
    return _oldest(found) if found else None


def _runs(client: mlflow.MlflowClient, experiment_id: str, target: Target) -> list[Run]:
    filter_string = " and ".join(f"tags.`{name}` = '{value}'" for name, value in _tags(target).items())
    return list(client.search_runs([experiment_id], filter_string))


def _oldest(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _tags(target: Target) -> dict[str, str]:
    return {"swa.run_key": target.run_key, "swa.first_attempt": str(target.first_attempt)}


def _artifact_location(target: Target) -> str | None:
    """Beside the database where that is a file: MLflow's default is relative to wherever a process runs."""
    database = target.uri.removeprefix("sqlite:///")
    if database == target.uri:
        return None
    return (Path(database).parent / "mlruns" / target.experiment).as_uri()


def _log_rows(client: mlflow.MlflowClient, run_id: str, rows: Sequence[Event]) -> None:
    metrics = [
        Metric(name, value, row["time_ms"], row["position"]) for row in rows for name, value in row["metrics"].items()
    ]
    for first in range(0, len(metrics), _METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[first : first + _METRICS_PER_REQUEST])


def _log_start(client: mlflow.MlflowClient, run_id: str, event: Event, folder: Path) -> None:
    # Params are write-once in MLflow: one that a later attempt has otherwise would be refused, and all after it wait.
    logged = client.get_run(run_id).data.params
    params = [
        Param(name, str(value)[:_PARAM_CHARACTERS]) for name, value in event["params"].items() if name not in logged
    ]
    for first in range(0, len(params), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[first : first + _PARAMS_PER_REQUEST])
    for split, facts in event["datasets"].items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*interpreted in multiple ways.*")
            source = resolve_dataset_source(facts["source"])
        record = MetaDataset(source, name=facts["name"], digest=facts["digest"][:_DIGEST_CHARACTERS])
        # log_inputs refuses nothing and repeats nothing: an equal data set of a run is kept once.
        client.log_inputs(
            run_id, datasets=[DatasetInput(record._to_mlflow_entity(), [InputTag("mlflow.data.context", split)])]
        )


def _set_tags(client: mlflow.MlflowClient, run_id: str, event: Event, folder: Path) -> None:
    client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in event["tags"].items()])


def _log_artifact(client: mlflow.MlflowClient, run_id: str, event: Event, folder: Path) -> None:
    client.log_artifact(run_id, str(folder / event["name"]))


def _set_status(client: mlflow.MlflowClient, run_id: str, event: Event, folder: Path) -> None:
    if event["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, status=event["status"], end_time=event["time_ms"])


_HANDLERS: dict[str, Handler] = {
    "start": _log_start,
    "tags": _set_tags,
    "artifact": _log_artifact,
    "status": _set_status,
}
