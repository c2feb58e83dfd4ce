"""CPU, memory, disk, network and GPUs of each machine as metrics, by MLflow's own monitor. Best effort: no run fails of
it, nor waits for it. Imports mlflow.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator

import mlflow
import psutil
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from swa_dist.service import tracking
from swa_dist.service.spool import SPOOL_FILES, Target
from swa_dist.storage import folder as folders
from swa_dist.storage.folder import join

_SECONDS = 10.0
_LAST_SECONDS = 1.0


def node_of(world_size: int) -> int | None:
    """The rank of this worker's machine, if this is the worker that reports for it: the first there.

    torchrun calls a machine's rank GROUP_RANK, Ray NODE_RANK.
    """
    if world_size == 1:
        return 0
    node = os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK"))
    return int(node) if node is not None and os.environ.get("LOCAL_RANK") == "0" else None


@contextlib.contextmanager
def logged(run_dir: str, node: int) -> Iterator[None]:
    """Within the block a thread samples this machine as `system/node_<node>/...` of the MLflow run of a run's folder.

    It begins when that run is there and RUNNING, and again after an outage of MLflow. At the block's end it is left to
    itself where a request takes long.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_log, args=(run_dir, node, ended), name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LAST_SECONDS)


def _log(run_dir: str, node: int, ended: threading.Event) -> None:
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # that MLflow is away, the tracker says
    seconds = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or _SECONDS
    psutil.cpu_percent()  # is the share since the last call, of the same thread: a first one says 0
    while not ended.wait(seconds):
        with contextlib.suppress(Exception):  # nothing may end this thread but the worker's end
            target, run_id = _running(run_dir)
            monitor = SystemMetricsMonitor(
                run_id, seconds, resume_logging=True, node_id=f"node_{node}", tracking_uri=target.uri
            )
            # In this thread and until that event: MLflow's own start and finish would wait for its requests.
            monitor._shutdown_event = ended
            monitor.monitor()
            monitor.mlflow_logger.flush()


def _running(run_dir: str) -> tuple[Target, str]:
    """Where a run's metrics go, and its MLflow run. Raises LookupError where that isn't there yet, or not RUNNING."""
    sent, destination = (folders.read(join(run_dir, name)) for name in SPOOL_FILES[1:])
    if sent is None or destination is None:
        # MLflow makes a database that isn't there, which two threads at once get wrong: the tracker is the first.
        raise LookupError("nothing was sent yet")
    target = Target(**json.loads(destination))
    run = tracking.find_run(mlflow.MlflowClient(tracking_uri=target.uri), target)
    if run is None or run.info.status != "RUNNING":
        raise LookupError("no run to log to")
    return target, str(run.info.run_id)
