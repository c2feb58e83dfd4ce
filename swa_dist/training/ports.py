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
    """Where a run reports to. Called on rank 0; must neither raise nor wait."""

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        """A phase ("train") has come so far, in images."""

    def publish(self, rows: Sequence[Row]) -> None:
        """All metrics so far, each covered by a committed checkpoint. A row that was published before is the same."""

    def warn(self, message: str) -> None: ...


@dataclass(frozen=True)
class Ports:
    """Everything of a run that is not its state. Rank 0 alone uses `store` and `tracker`."""

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

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        if self.world.rank == 0:
            self.tracker.progress(phase, done, total, note)

    def asked_to_stop(self) -> bool:
        """Collective: whether any worker was asked to stop; the same answer on all."""
        asked = torch.tensor(int(self.should_stop()), device=self.world.device)
        return bool(self.world.max_(asked))

    def stop(self, position: int | None) -> NoReturn:
        """End the run, which has committed what it did."""
        where = "" if position is None else f" at image {position} (epoch {position / self.loaders.num_train:.2f})"
        raise Stopped(f"the run was asked to stop and did{where}; its state is saved. The same command resumes it.")
