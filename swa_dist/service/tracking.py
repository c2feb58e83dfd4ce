"""What a run tells MLflow, by way of a spool on disk: MLflow being slow or down never stops or slows a run.

With registry.py the only importer of mlflow. A spool holds events in the order they happened, each with its own time,
so that sending one twice changes nothing; what could not be sent waits there for `swa-dist replay`.
"""

import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlflow
import mlflow.data
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

from swa_dist.errors import ServiceError, SwaDistError
from swa_dist.service.progress import Display
from swa_dist.storage.files import read_json, write_atomic, writing
from swa_dist.training.state import Row

Event = dict[str, Any]

_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
_DIGEST_CHARACTERS = 36  # the most that MLflow takes
_RETRY_SECONDS = 15.0
_TAIL_BYTES = 65_536  # longer than an event

# MLflow's own defaults hold a caller for minutes when its server is gone (7 retries, 120 s each).
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Target:
    """The MLflow run that a spool belongs to. The tags name it: it is found by them or made with them."""

    uri: str
    experiment: str
    run_name: str
    run_key: str
    first_attempt: int
    """The attempt that began this state: a run that was started over is another MLflow run."""


SPOOL_FILES = ("spool.jsonl", "spool.sent.json", "spool.target.json")


class Spool:
    """A file of events, one JSON object a line, only ever appended to, and beside it the number sent.

    `mirror` is called with the names of files that have changed: of a run on S3, it puts them there.
    """

    def __init__(self, folder: Path, mirror: Callable[[str], None] = lambda name: None) -> None:
        self.folder = folder
        self._mirror = mirror
        self.events, self._sent, self._target = (folder / name for name in SPOOL_FILES)

    def open(self, target: Target) -> None:
        write_atomic(self._target, json.dumps(asdict(target), indent=1))
        self._mirror(self._target.name)

    @property
    def target(self) -> Target:
        facts = read_json(self._target)
        if facts is None:
            raise ServiceError(f"`RUN` must be the folder of a run, but {self.events.parent} has no spool.")
        return Target(**facts)

    def append(self, *events: Event) -> None:
        with writing(self.events), self.events.open("ab+") as file:
            _cut_half_line(file)
            file.writelines((json.dumps(event) + "\n").encode() for event in events)
            file.flush()
            os.fsync(file.fileno())
        self._mirror(self.events.name)

    def read(self) -> list[Event]:
        if not self.events.is_file():
            return []
        lines = self.events.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one short

    @property
    def num_sent(self) -> int:
        return (read_json(self._sent) or {"num_sent": 0})["num_sent"]  # type: ignore[no-any-return]

    def mark_sent(self, num_sent: int) -> None:
        write_atomic(self._sent, json.dumps({"num_sent": num_sent}))
        self._mirror(self._sent.name)

    def waiting(self) -> list[Event]:
        return self.read()[self.num_sent :]


def _cut_half_line(file: BinaryIO) -> None:
    """Cut off what a kill left of a last line: the next event must not be glued to it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read()
    whole = tail.rfind(b"\n") + 1
    if whole or size <= _TAIL_BYTES:
        file.truncate(size - len(tail) + whole)


class SpoolTracker:
    """The tracker of a run: progress to a display, metrics to the spool, and a thread that sends them on."""

    def __init__(self, spool: Spool, display: Display) -> None:
        self._spool = spool
        self._display = display
        self._rows_spooled = sum(event["kind"] == "row" for event in spool.read())
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)
        self._thread.start()

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        self._display.progress(phase, done, total, note)

    def warn(self, message: str) -> None:
        self._display.say(f"warning: {message}")

    def publish(self, rows: Sequence[Row]) -> None:
        new = rows[self._rows_spooled :]
        if new:
            try:
                self._spool.append(*({"kind": "row", **row} for row in new))
            except (SwaDistError, OSError) as error:
                self.warn(f"{error} The metrics are kept on this machine and in the checkpoint; the run goes on.")
            self._rows_spooled = len(rows)
            self._wake.set()

    def close(self) -> None:
        """Stop sending, within the time of one request. What is not sent waits in the spool."""
        self._closing.set()
        self._wake.set()
        self._thread.join()

    def _send(self) -> None:
        failing = False
        while not self._closing.is_set():
            self._wake.wait(timeout=_RETRY_SECONDS if failing else None)
            self._wake.clear()
            if self._closing.is_set():
                return
            try:
                send(self._spool, {})
                failing = False
            except ServiceError as error:
                if not failing:
                    self.warn(f"{error} Metrics wait in {self._spool.events}; the run goes on.")
                failing = True


def configure_client() -> None:
    """Keep MLflow's client from holding its caller for minutes, and from chatter; the environment's settings win."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


Handler = Callable[[mlflow.MlflowClient, str, Event, Path], None]
"""Takes a client, the id of the MLflow run, the event, and the folder of the run that the event is of."""


def send(spool: Spool, handlers: dict[str, Handler]) -> str:
    """Send what waits, in order, up to an event of a kind that has no handler. Returns the MLflow run's id.

    `handlers`: for kinds of events beyond those here.

    Raises ServiceError where MLflow can't be reached or refuses: what was sent until then is not sent again.
    """
    target = spool.target
    try:
        client = mlflow.MlflowClient(tracking_uri=target.uri, registry_uri=target.uri)
        run_id = find_or_create_run(client, target)
        sent = spool.num_sent
        waiting = spool.waiting()
        handlers = _HANDLERS | handlers
        while waiting:
            kind = waiting[0]["kind"]
            count = 1
            if kind == "row":
                while count < len(waiting) and waiting[count]["kind"] == "row" and count < _METRICS_PER_REQUEST // 10:
                    count += 1
                _log_rows(client, run_id, waiting[:count])
            elif kind in handlers:
                handlers[kind](client, run_id, waiting[0], spool.folder)
            else:
                break
            sent += count
            spool.mark_sent(sent)
            waiting = waiting[count:]
    except SwaDistError:
        raise
    except Exception as error:  # a database, a driver, a bucket: whatever MLflow is made of
        raise unanswered(target.uri, error) from error
    return run_id


def unanswered(uri: str, error: Exception) -> ServiceError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return ServiceError(f"MLflow at {uri} must answer, but does not: {reason}.")


def find_or_create_run(client: mlflow.MlflowClient, target: Target) -> str:
    """The id of the run that has the target's tags, which is made if there is none."""
    experiment = client.get_experiment_by_name(target.experiment)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(target.experiment, artifact_location=_artifact_location(target))
    )
    tags = {"swa.run_key": target.run_key, "swa.first_attempt": str(target.first_attempt)}
    found = client.search_runs(
        [experiment_id], filter_string=" and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    )
    if found:
        return str(found[0].info.run_id)
    return str(client.create_run(experiment_id, tags=tags, run_name=target.run_name).info.run_id)


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
    params = [Param(name, str(value)) for name, value in event["params"].items()]
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
