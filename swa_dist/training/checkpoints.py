"""Where a run goes on from, and what it leaves to go on from, written while the training goes on."""

import contextlib
import math
import threading
import time
from types import TracebackType
from typing import Any

from torch import nn

from swa_dist import models
from swa_dist.config import Recipe
from swa_dist.errors import CheckpointError, ConfigError, OutOfMemoryError, ServiceError
from swa_dist.storage.folder import open_folder
from swa_dist.storage.store import newest
from swa_dist.training import loop
from swa_dist.training.averages import Averages, Parts
from swa_dist.training.guard import Guard
from swa_dist.training.ports import Ports
from swa_dist.training.state import TrainState, load_entry, save_entry
from swa_dist.training.world import broadcast_tensors, on_rank_zero

CANDIDATES = "candidates"
CHECKPOINTS = "checkpoints"

# What `checkpoint.interval_seconds: auto` keeps to, whatever failures cost: training waits for checkpoints a
# two-hundredth of its time at most, and the storage has nine tenths of the time to itself.
_LEAST_PER_WAIT = 200.0
_LEAST_PER_WRITE = 10.0
_LEAST_SECONDS = 10.0
_RETRY_SECONDS = 30.0
_LAST_SECONDS = 20.0


def resume(ports: Ports, model: nn.Module) -> TrainState:
    """Collective: the state of the newest valid checkpoint, of the run to be extended, or of the start: `model`."""
    if ports.local and ports.world.size != ports.recipe.average.num_replicas:
        raise ConfigError(
            f"`average.num_replicas` must be the number of workers ({ports.world.size}) where `average.sync` is"
            f" local, but is {ports.recipe.average.num_replicas}. Run it on as many."
        )
    optimizer = loop.sgd(model, models.head_names(model), ports.recipe)
    averages, guard = Averages(ports.recipe.average), Guard(ports.recipe.guard)
    state = TrainState(model=model, optimizer=optimizer, averages=averages, guard=guard)
    found = _newest_on_rank_zero(ports)
    facts = on_rank_zero(ports.world, lambda: found[1] if found else None)
    if facts is not None:
        names = on_rank_zero(ports.world, lambda: list(found[0]) if found else [])
        parts = {n: broadcast_tensors(ports.world, found[0][n] if found else None) for n in names}
        own = f"replica{ports.world.rank}."
        parts |= {n.removeprefix(own): tensors for n, tensors in parts.items() if n.startswith(own)}
        state.restore(parts, facts)
        on_rank_zero(ports.world, lambda: ports.tracker.publish(state.rows))
    state.world_sizes.append(ports.world.size)
    return state


class Checkpoints:
    """Writes a run's checkpoints, one at a time, in a thread of rank 0. A context manager: at its end, also by an
    error, the one that is being written is waited for, though not for long.

    Storage that doesn't answer is no reason to stop training: the checkpoint is tried again a while later, and only
    `settle`, at the end of training or of the run, raises that. Any other error ends the run at its next step.
    """

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.pace = Pace(ports.recipe)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)

    @property
    def due(self) -> bool:
        """Whether, by rank 0's clock, it is time for another; on other ranks False."""
        return self._ports.world.rank == 0 and not self._writing and self.pace.due

    @property
    def failed(self) -> bool:
        """Whether the run must end for what became of the last one; on ranks other than 0 False."""
        return not self._writing and self._error is not None and not isinstance(self._error, ServiceError)

    def save(self, state: TrainState) -> None:
        """Collective: have the state written. Returns as soon as it is copied; then the caller may change it.

        Waits for the one before. Raises, on all workers, the error that must end the run.
        """
        self._wait(forgiving=True)
        began = time.monotonic()
        parts = _all_parts(self._ports, state)
        if self._ports.world.rank == 0:
            copied = {part: {n: t.detach().to("cpu", copy=True) for n, t in ts.items()} for part, ts in parts.items()}
            name, facts = f"{CHECKPOINTS}/{state.position:012d}", state.facts()
            # A daemon: a process that must end doesn't wait for storage that hangs.
            self._thread = threading.Thread(
                target=self._write, args=(name, copied, facts), name="checkpoint", daemon=True
            )
            self.pace.waited(time.monotonic() - began)
            self._thread.start()

    def settle(self) -> None:
        """Collective: until the last one is committed. Raises, on all workers, whatever kept it from being so."""
        self._wait(forgiving=False)

    @property
    def _writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self, *, forgiving: bool) -> None:
        def finished() -> None:
            if self._thread is not None:
                self._thread.join()
            if self._error is not None and not (forgiving and isinstance(self._error, ServiceError)):
                raise self._error

        on_rank_zero(self._ports.world, finished)

    def _write(self, name: str, parts: Parts, facts: dict[str, Any]) -> None:
        began, self._error = time.monotonic(), None
        try:
            save_entry(self._ports.store, name, parts, facts)
            self._ports.tracker.publish(facts["rows"])
            with contextlib.suppress(ServiceError, OSError):  # what stays too long goes next time
                self._prune()
        except MemoryError:
            self._error = OutOfMemoryError(
                "a copy of the training state must fit into the memory of rank 0's machine, but does not. Give it more,"
                " or keep fewer iterates (`average.keep_iterates`, `average.window`). The checkpoint before it is kept."
            )
        except Exception as error:
            self._error = error
            if isinstance(error, ServiceError):
                self._ports.tracker.warn(f"{error} The training goes on; its state is kept in memory meanwhile.")
                self.pace.failed()
        else:
            self.pace.wrote(time.monotonic() - began)

    def _prune(self) -> None:
        names = self._ports.store.names(CHECKPOINTS)
        for name in set(names) - kept(names, self._ports.recipe, self._ports.loaders.num_train):
            self._ports.store.remove(name)


def kept(names: list[str], recipe: Recipe, num_train: int) -> set[str]:
    """Which of a run's checkpoints, in their order, stay: the last ones, and those of epochs' ends."""
    ends = [name for name in names if int(name.rpartition("/")[2]) % num_train == 0]
    if recipe.checkpoint.keep_epochs != "all":
        ends = ends[len(ends) - min(len(ends), recipe.checkpoint.keep_epochs) :]
    return {*names[-recipe.checkpoint.keep_last :], *ends}


class Pace:
    """When the next checkpoint within an epoch is due, by this process's clock."""

    def __init__(self, recipe: Recipe) -> None:
        self._plan = recipe.checkpoint
        self.wait_seconds = 0.0
        """How long training waited for the last one to be copied."""
        self.write_seconds = 0.0
        """How long it took to be written, beside the training."""
        self._last = time.monotonic()
        self._retry_at = math.inf

    @property
    def due(self) -> bool:
        now = time.monotonic()
        return now >= min(self._last + self.interval_seconds, self._retry_at)

    @property
    def interval_seconds(self) -> float:
        """sqrt(2 * what training waits for a checkpoint * mean time between failures): Young 1974, Daly 2006."""
        if self._plan.interval_seconds == "epoch":
            return math.inf
        if self._plan.interval_seconds != "auto":
            return self._plan.interval_seconds
        between_failures = self._plan.mean_hours_between_failures * 3600
        return max(
            math.sqrt(2 * self.wait_seconds * between_failures),
            _LEAST_PER_WAIT * self.wait_seconds,
            _LEAST_PER_WRITE * self.write_seconds,
            _LEAST_SECONDS,
        )

    def waited(self, seconds: float) -> None:
        """Training waited so long while a checkpoint was copied."""
        self.wait_seconds = seconds
        self._last, self._retry_at = time.monotonic(), math.inf

    def wrote(self, seconds: float) -> None:
        """Writing it, beside the training, took so long."""
        self.write_seconds = seconds

    def failed(self) -> None:
        self._retry_at = time.monotonic() + _RETRY_SECONDS


def _all_parts(ports: Ports, state: TrainState) -> Parts:
    """Collective: on rank 0 also the parts of the other workers, where each trains by itself."""
    parts = state.parts()
    if ports.local:
        for rank in range(ports.world.size):
            for part, tensors in state.own_parts().items():
                sent = broadcast_tensors(ports.world, tensors, source=rank)
                if ports.world.rank == 0:
                    parts[f"replica{rank}.{part}"] = {n: t.cpu().clone() for n, t in sent.items()}
    return parts


def _newest_on_rank_zero(ports: Ports) -> tuple[Parts, dict[str, Any]] | None:
    """Collective: large, so it stays on rank 0; an error there is everyone's."""
    held: list[tuple[Parts, dict[str, Any]]] = []

    def read() -> None:
        found = _newest(ports)
        if found is not None:
            held.append(found)

    on_rank_zero(ports.world, read)
    return held[0] if held else None


def _newest(ports: Ports) -> tuple[Parts, dict[str, Any]] | None:
    ports.store.sweep(CHECKPOINTS)
    ports.store.sweep(CANDIDATES)
    name = newest(ports.store, CHECKPOINTS, ports.tracker.warn)
    if name is not None:
        return load_entry(ports.store, name)
    if ports.recipe.checkpoint.extend_from == "nothing":
        return None
    shorter = open_folder(ports.recipe.checkpoint.extend_from)
    names = shorter.store.names(CHECKPOINTS)
    if not names:
        raise CheckpointError(
            f"`checkpoint.extend_from` must be the folder of a finished run, but {shorter.url} has no checkpoints."
        )
    return load_entry(shorter.store, names[-1])
