"""What a worker is handed: it knows no Ray, MLflow or DALI, only these."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch

from swa_dist.config import Recipe
from swa_dist.data.order import Loaders, Split
from swa_dist.errors import DataError, Stopped
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

    def note_left_out(self, split: Split, mine: Mapping[int, str], known: Mapping[int, str]) -> dict[int, str]:
        """Collective: all workers' images that could not be decoded and are not `known` to be so, by their places.

        They are named on rank 0. Raises DataError where they and those known are more than `data.max_bad_share`.
        """
        every = {i: why for one in self.world.gather(dict(mine)) for i, why in one.items()}
        new = {i: why for i, why in sorted(every.items()) if i not in known}
        if self.world.rank == 0:
            for i, why in new.items():
                self.tracker.warn(f"{self.loaders.name_of(split, i)} can't be decoded and is left out: {why}")
        share, of = self.recipe.data.max_bad_share, self.loaders.num_train if split == "train" else self.loaders.num_val
        bad, last = len(new) + len(known), next(reversed(new), -1)
        if new and bad > (max(1, math.floor(share * of)) if share else 0):
            raise DataError(
                f"`data.max_bad_share` must be the share of images that can't be decoded, at most, but is {share:g},"
                f" and {bad:,} of {of:,} {split} images can't: {self.loaders.name_of(split, last)} is the last."
                " Look at all of them with `swa-dist data verify`, which can leave them out."
            )
        return new

    def stop(self, position: int | None) -> NoReturn:
        """End the run, which has committed what it did."""
        where = "" if position is None else f" at image {position} (epoch {position / self.loaders.num_train:.2f})"
        raise Stopped(f"the run was asked to stop and did{where}; its state is saved. The same command resumes it.")
