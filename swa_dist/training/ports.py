"""What a worker is handed: it knows no Ray, MLflow or DALI, only these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch

from swa_dist.config import Recipe
from swa_dist.data.order import Loaders
from swa_dist.errors import Stopped
from swa_dist.storage.store import Store
from swa_dist.training.state import Row
from swa_dist.training.world import World


class Tracker(Protocol):
    """Where a worker reports to. Called on rank 0 unless said otherwise; must neither raise nor wait."""

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        """On every worker: a phase ("train") has come so far, in images."""

    def publish(self, rows: Sequence[Row]) -> None:
        """All metrics so far, each covered by a committed checkpoint. A row that was published before is the same.
        From the thread that writes checkpoints, one call at a time."""

    def warn(self, message: str) -> None: ...


@dataclass(frozen=True)
class Ports:
    """Everything of a run that is not its state. Rank 0 alone uses `store`."""

    recipe: Recipe
    world: World
    loaders: Loaders
    store: Store
    tracker: Tracker
    should_stop: Callable[[], bool]

    @property
    def local(self) -> bool:
        """Whether each worker trains by itself."""
        return self.recipe.average.sync == "local"

    def any_worker(self, *flags: bool) -> list[bool]:
        """Collective: for each flag whether it is set on any worker; the same answers on all."""
        found = self.world.max_(torch.tensor(flags, dtype=torch.uint8, device=self.world.device))
        return [bool(n) for n in found.tolist()]

    def asked_to_stop(self) -> bool:
        """Collective: whether any worker was asked to stop; the same answer on all."""
        return self.any_worker(self.should_stop())[0]

    def stop(self, position: int | None) -> NoReturn:
        """End the run, which has committed what it did."""
        where = "" if position is None else f" at image {position} (epoch {position / self.loaders.num_train:.2f})"
        raise Stopped(f"the run was asked to stop and did{where}; its state is saved. The same command resumes it.")
