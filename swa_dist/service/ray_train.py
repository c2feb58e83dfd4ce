"""A run on Ray Train workers. The only importer of ray.train.

Ray reads its token settings when it is imported, so launch.py has them in the environment before it imports this.
"""

import _thread
import collections
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from swa_dist import config
from swa_dist.config import Cluster
from swa_dist.errors import ConfigError, ServiceError, Stopped, SwaDistError
from swa_dist.service.progress import Display
from swa_dist.service.run import Job, work
from swa_dist.service.stopping import Termination, never
from swa_dist.storage.folder import join
from swa_dist.training.world import TorchWorld

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_CAPACITY_SECONDS = 5.0
_DEPARTURE_SECONDS = 20.0
_UNHEARD_SECONDS = 10.0
_WITHOUT_WORKERS = (
    "the run was told to end while it had no workers; what was committed is kept. The same command resumes it."
)
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing large goes through Ray
_STOP, _LEAVE = "stop", "leave"


def fit(job: Job, display: Display, termination: Termination) -> None:
    """Run the job's workers to their end. Raises what a worker raised, or ServiceError where Ray itself failed.

    SIGTERM has the run commit its state and end with Stopped. Machines that are told to go have it commit its state and
    go on without them, if enough remain or others come.
    """
    cluster = config.from_tree(job.recipe).cluster
    with contextlib.ExitStack() as stack:
        stack.enter_context(_connected(cluster))
        stack.enter_context(termination.installed())  # Ray has put its own handler in place
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="swa-ray-"))
        gpus = _gpus_per_worker(cluster)
        _await_capacity(cluster, gpus, display)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = _Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        stack.enter_context(_shown(board, display))
        trainer = _trainer(
            job, cluster, gpus, board, scratch if cluster.address == "local" else join(job.run_dir, "ray")
        )
        while _fit_once(trainer, board, termination):
            display.say("a machine is about to go: the state is saved; going on with those that stay")
            _await_departure()
            try:
                _await_capacity(cluster, gpus, display)
            except ConfigError as error:
                raise Stopped(
                    f"the machines that went away must be replaced within {cluster.start_timeout_seconds} s, but were"
                    f" not: {error} The state is saved. The same command resumes it."
                ) from error


def _fit_once(trainer: TorchTrainer, board: Any, termination: Termination) -> bool:
    """Whether the workers left, to begin again elsewhere. Otherwise they are done; or what ended them is raised."""
    with termination.awaited() as told, _watched(board, told):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise (ray.get(board.ended_by.remote()) or _cause(error)) from error
        except KeyboardInterrupt:
            if told():
                raise Stopped(_WITHOUT_WORKERS) from None
            raise
    ended = ray.get(board.ended_by.remote())
    if ended is not None:
        raise ended
    left = ray.get(board.take_left.remote())
    if left and termination.told:
        raise Stopped(_WITHOUT_WORKERS)
    return bool(left)


def _trainer(job: Job, cluster: Cluster, gpus: int, board: Any, storage: str) -> TorchTrainer:
    elastic = _least(cluster) < cluster.num_workers
    return TorchTrainer(
        _worker,
        train_loop_config={"job": asdict(job), "board": board},
        torch_config=TorchConfig(timeout_s=cluster.collective_timeout_seconds),
        scaling_config=ScalingConfig(
            num_workers=(_least(cluster), cluster.num_workers) if elastic else cluster.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _worker(settings: dict[str, Any]) -> None:
    """One worker's life. Most errors of ours come from the run, not from the machine that it is on: workers are not
    started again for them, or, where others wait for this one and must be ended, only to learn of it."""
    board, job = settings["board"], Job(**settings["job"])
    if ray.get(board.ended_by.remote()) is None:
        timeout = config.from_tree(job.recipe).cluster.collective_timeout_seconds
        world = TorchWorld(ray.train.torch.get_device(), timeout)
        board.here.remote(world.rank, world.size, ray.get_runtime_context().get_node_id())
        try:
            with _asked(board) if world.rank == 0 else contextlib.nullcontext(never) as should_stop:
                work(job, world, _BoardDisplay(board), should_stop)
        except Stopped as stopped:  # as one, on all workers
            if not ray.get(board.leave.remote()):
                ray.get(board.end.remote(stopped))
        except SwaDistError as error:
            if not isinstance(error, ServiceError):  # what is down now may be up when they start again
                ray.get(board.end.remote(error))
            raise
    ray.train.report({"finished": 1})


@ray.remote(num_cpus=0)
class _Board:
    """Where workers pin what the driver's display is to show, what ended the run and where they are, and the driver
    what it asks of them: the two need share nothing but Ray."""

    def __init__(self) -> None:
        self._items: list[tuple[str, tuple[Any, ...]]] = []
        self._ended_by: SwaDistError | None = None
        self._asked = ""
        self._left = False
        self._heard = time.monotonic()
        self._nodes: dict[int, str] = {}

    def pin(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self._items.append((kind, arguments))

    def end(self, error: SwaDistError) -> None:
        self._ended_by = self._ended_by or error

    def ended_by(self) -> SwaDistError | None:
        return self._ended_by

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        items, self._items = self._items, []
        return items

    def here(self, rank: int, size: int, node: str) -> None:
        """A worker of so many is on this machine. Those that were before are no more."""
        self._nodes = {other: at for other, at in self._nodes.items() if other < size} | {rank: node}

    def nodes(self) -> set[str]:
        return set(self._nodes.values())

    def ask(self, what: str) -> float:
        """_STOP: commit the state and end; nothing takes that back. _LEAVE: commit it, to begin again elsewhere.

        Returns for how many seconds no worker has looked.
        """
        if self._asked != _STOP:
            self._asked = what
        return time.monotonic() - self._heard

    def asked(self) -> bool:
        self._heard = time.monotonic()
        return self._asked != ""

    def leave(self) -> bool:
        """A worker has committed its state and ends. Whether it is to begin again elsewhere."""
        if self._asked != _LEAVE:
            return False
        self._left = True
        return True

    def take_left(self) -> bool:
        """Whether the workers left. From here on none has, and none is asked to."""
        left, self._left = self._left, False
        if self._asked == _LEAVE:
            self._asked = ""
        self._nodes = {}
        return left


@contextlib.contextmanager
def _watched(board: Any, told: Callable[[], bool]) -> Iterator[None]:
    """Within the block the driver asks the workers to stop when it is told to end itself, or when its own machine is
    about to go, and to leave when one of theirs is."""
    with _polling(lambda: _look(board, told), "watcher"):
        yield


def _look(board: Any, told: Callable[[], bool]) -> None:
    if told():
        unheard = ray.get(board.ask.remote(_STOP), timeout=_ANSWER_SECONDS)
        ended = ray.get(board.ended_by.remote(), timeout=_ANSWER_SECONDS)
        if unheard > _UNHEARD_SECONDS and ended is None:  # Ray waits for machines: there is no worker to save anything
            _thread.interrupt_main()
        return
    # What Ray Train's own watcher asks. Its public answer, ray.train.get_preemption_info, is a barrier of all workers.
    going = set(ray._private.state.state.get_draining_nodes())
    if ray.get_runtime_context().get_node_id() in going:
        ray.get(board.ask.remote(_STOP), timeout=_ANSWER_SECONDS)
    elif going and going & ray.get(board.nodes.remote(), timeout=_ANSWER_SECONDS):
        ray.get(board.ask.remote(_LEAVE), timeout=_ANSWER_SECONDS)


@contextlib.contextmanager
def _asked(board: Any) -> Iterator[Callable[[], bool]]:
    """Within the block, whether the driver asks the workers to stop or to leave."""
    found = threading.Event()

    def look() -> None:
        if ray.get(board.asked.remote(), timeout=_ANSWER_SECONDS):
            found.set()

    with _polling(look, "asked"):
        yield found.is_set


@contextlib.contextmanager
def _polling(look: Callable[[], None], name: str) -> Iterator[None]:
    """Within the block a thread looks twice a second, and once more at its end."""
    ended = threading.Event()

    def poll() -> None:
        while True:
            last = ended.wait(_POLL_SECONDS)
            with contextlib.suppress(Exception):  # whatever it is, the next look may go well; without it a run is deaf
                look()
            if last:
                return

    thread = threading.Thread(target=poll, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=2 * _ANSWER_SECONDS)


class _BoardDisplay:
    """A worker's display: sends on what matters, twice a second at most."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._phase = ""
        self._next = 0.0

    def say(self, line: str) -> None:
        self._board.pin.remote("say", (line,))

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if phase != self._phase or done >= total or now >= self._next:
            self._phase, self._next = phase, now + _POLL_SECONDS
            self._board.pin.remote("progress", (phase, done, total, note))

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _shown(board: Any, display: Display) -> Iterator[None]:
    """Within the block what is pinned on the board is shown."""

    def show() -> None:
        for kind, arguments in ray.get(board.take.remote(), timeout=_ANSWER_SECONDS):
            getattr(display, kind)(*arguments)

    with _polling(show, "display"):
        yield


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[None]:
    """Within the block this process is a driver of Ray; a Ray that was started for it is gone afterwards."""
    scratch = tempfile.mkdtemp(prefix="swa-ray-")  # not under the run's folder: a socket's path must be short
    try:
        try:
            if cluster.address == "local":
                ray.init(
                    address="local",
                    num_cpus=len(os.sched_getaffinity(0)),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="warning",
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=scratch,
                )
            else:
                ray.init(address=cluster.address, logging_level="warning")
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ServiceError(
                f"Ray at `cluster.address` ({cluster.address}) must answer, but does not: {error}."
            ) from error
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _least(cluster: Cluster) -> int:
    """The number of workers that the run may start with."""
    return cluster.num_workers if cluster.min_workers == "all" else cluster.min_workers


def _gpus_per_worker(cluster: Cluster) -> int:
    if cluster.gpus_per_worker == "auto":
        return 1 if ray.cluster_resources().get("GPU", 0) else 0
    return cluster.gpus_per_worker


def _resources() -> dict[str, float]:
    """Those of the machines that stay."""
    going = ray._private.state.state.get_draining_nodes()
    total: collections.Counter[str] = collections.Counter()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in going:
            total.update(node["Resources"])
    return dict(total)


def _await_departure() -> None:
    """A machine that is drained and empty goes in seconds. Until it has, Ray plans with it, and then waits for it."""
    deadline = time.monotonic() + _DEPARTURE_SECONDS
    while ray._private.state.state.get_draining_nodes() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _await_capacity(cluster: Cluster, gpus: int, display: Display) -> None:
    """Wait for a cluster that can grow; a Ray of our own can't."""
    patience = 0 if cluster.address == "local" else cluster.start_timeout_seconds
    deadline = time.monotonic() + patience
    asked = False
    while True:
        have = _resources()
        lacking = [
            (resource, each)
            for resource, each in (("CPU", cluster.cpus_per_worker), ("GPU", gpus))
            if each and _least(cluster) * each > have.get(resource, 0)
        ]
        if not lacking:
            return
        resource, each = lacking[0]
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"`cluster.num_workers` must be at most {int(have.get(resource, 0) / each)} where there are"
                f" {have.get(resource, 0):g} {resource}s at {each:g} per worker, but is {_least(cluster)}."
                " Lower it; the result is the same."
            )
        if not asked:
            display.say(f"waiting up to {patience} s for {_least(cluster) * each:g} {resource}s")
            asked = True
        time.sleep(_CAPACITY_SECONDS)


def _cause(error: BaseException) -> Exception:
    """The error of ours that is behind one of Ray's, or one that says what Ray said."""
    failures = getattr(error, "worker_failures", None) or {}
    pending: list[BaseException | None] = [failures[rank] for rank in sorted(failures)]
    pending.append(error)
    while pending:
        one = pending.pop(0)
        if isinstance(one, SwaDistError):
            return one
        if one is not None:
            pending += [getattr(one, "cause", None), one.__cause__]
    return ServiceError(f"the Ray workers must finish, but failed: {error}")
