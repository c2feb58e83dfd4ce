"""A run of a second or two on real digits in memory, the same in any number of forked workers, and faults in it."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from sklearn.datasets import load_digits

from swa_dist import models
from swa_dist.config import Recipe
from swa_dist.data.memory import MemoryLoaders
from swa_dist.data.order import Batch, Group, Span, Transforms
from swa_dist.errors import Stopped
from swa_dist.storage.store import DiskStore
from swa_dist.training.checkpoints import CHECKPOINTS
from swa_dist.training.finetune import finetune
from swa_dist.training.world import World
from tests import support

# 120 images in batches of 48 in groups of 16: three steps an epoch, the last of a whole group and a half one.
FIELDS: dict[str, Any] = {
    "model.arch": "shufflenet_v2_x0_5",
    "model.weights": models.RANDOM,
    "optim.epochs": 3,
    "data.global_batch": 48,
    "data.group_images": 16,
    "data.image_size": 32,
    "schedule.cycle_epochs": 0.5,
    "average.ema": {"decay": 0.8},
    "tracking.log_every_steps": 2,
    "checkpoint.interval_seconds": 0.001,  # within an epoch, wherever the clock has them fall
}
NUM_TRAIN, NUM_VAL = 120, 40
STEPS_PER_EPOCH = 3


def recipe_of(**fields: Any) -> Recipe:
    """`fields`: with "__" for dots."""
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return support.digits_recipe("unused", models.RANDOM, **FIELDS | named)


@dataclass(unsafe_hash=True)
class Trap:
    """Kills its process, as `kill -9` does, when it comes by `point` for the `number`th time on `rank`.

    Points: "batch", "recalibrate", "evaluate" (a group of them), "commit", "committed", "prune" (of the store), "file"
    (Python is about to open, rename, make or remove a file in the run's folder).
    """

    point: str
    number: int
    rank: int = 0
    _seen: int = field(default=0, init=False, hash=False)

    def at(self, point: str, rank: int) -> None:
        if (point, rank) == (self.point, self.rank):
            self._seen += 1
            if self._seen > self.number:
                os.kill(os.getpid(), signal.SIGKILL)


NOWHERE = Trap("nowhere", 0)


@dataclass(unsafe_hash=True)
class WithinAnEpoch(Trap):
    """Kills rank 0 at the first batch at which the newest checkpoint is one within the second epoch, or later.

    Each batch leaves the thread that writes checkpoints some time, so that one is surely done within an epoch.
    """

    root: str = ""

    def at(self, point: str, rank: int) -> None:
        if (point, rank) == ("batch", 0):
            time.sleep(0.4)
            newest = committed(Path(self.root))
            if newest > NUM_TRAIN and newest % NUM_TRAIN:
                os.kill(os.getpid(), signal.SIGKILL)


def committed(root: Path) -> int:
    """Position of the newest checkpoint, 0 without one."""
    return max((int(name.rpartition("/")[2]) for name in DiskStore(root).names(CHECKPOINTS)), default=0)


@dataclass(frozen=True)
class TrappedLoaders(MemoryLoaders):
    trap: Trap = NOWHERE
    seen: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """The groups of the training, by epoch and ids."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for batch in super().train(epoch, start, left_out):
            self.trap.at("batch", self.rank)
            self.seen.extend((epoch, tuple(group.ids.tolist())) for group in batch.groups)
            yield batch

    def recalibration(self, span: Span, transforms: Transforms, left_out: Mapping[int, str]) -> Iterator[Group]:
        for group in super().recalibration(span, transforms, left_out):
            self.trap.at("recalibrate", self.rank)
            yield group

    def validation(self) -> Iterator[Group]:
        for group in super().validation():
            self.trap.at("evaluate", self.rank)
            yield group


class TrappedStore(DiskStore):
    def __init__(self, root: Path, trap: Trap) -> None:
        super().__init__(root)
        self._trap = trap
        if trap.point == "file":
            sys.addaudithook(self._watch)

    def commit(self, name: str, fill: Callable[[Path], None]) -> None:
        self._trap.at("commit", 0)
        super().commit(name, fill)
        self._trap.at("committed", 0)

    def remove(self, name: str) -> None:
        self._trap.at("prune", 0)
        super().remove(name)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        written = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
            event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if written and str(arguments[0]).startswith(str(self.root)):
            self._trap.at("file", 0)


def loaders_of(recipe: Recipe, world: World, trap: Trap = NOWHERE) -> TrappedLoaders:
    found = load_digits()
    pixels = torch.from_numpy((found.images * 15.9).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
    images, labels = pixels[: NUM_TRAIN + NUM_VAL], torch.from_numpy(found.target[: NUM_TRAIN + NUM_VAL]).long()
    return TrappedLoaders(
        images[:NUM_TRAIN],
        labels[:NUM_TRAIN],
        images[NUM_TRAIN:],
        labels[NUM_TRAIN:],
        recipe.data,
        recipe.seed,
        world.rank,
        world.size,
        trap=trap,
    )


@dataclass(frozen=True)
class Result:
    digests: dict[str, str]
    """SHA-256 of each candidate's weights, BatchNorm's statistics among them."""
    iterates: list[int]
    rows: list[tuple[int, dict[str, float]]]
    """Of each row the position and the metrics, without those of the clock. On rank 0."""
    groups: list[tuple[int, tuple[int, ...]]]
    world_sizes: list[int]
    seconds: float


def run(world: World, root: str, fields: dict[str, Any], trap: Trap = NOWHERE, stop_after: float = 1e9) -> Result | str:
    """The small run, from wherever its folder got to; what it says where it was asked to stop."""
    recipe = recipe_of(**fields)
    loaders, tracker = loaders_of(recipe, world, trap), support.Recorder()
    began = time.monotonic()
    store = TrappedStore(Path(root), trap)
    try:
        found = finetune(recipe, world, loaders, store, tracker, lambda: time.monotonic() - began > stop_after)
    except Stopped as stopped:
        return str(stopped)
    return Result(
        digests={} if world.rank else {name: digest_of(store, f"candidates/{name}") for name in found},
        iterates=found["swa"].facts["average"]["iterates"],
        rows=[
            (row["position"], {n: v for n, v in row["metrics"].items() if "per_second" not in n})
            for row in tracker.rows
        ],
        groups=loaders.seen,
        world_sizes=found["last"].facts["training"]["world_sizes"],
        seconds=time.monotonic() - began,
    )


def digest_of(store: DiskStore, entry: str) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(safetensors.torch.load_file(store.open(entry) / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def killed(size: int, root: Path, trap: Trap, **fields: Any) -> None:
    """The run, until the trap kills one of its workers; then the others are killed too."""
    workers = support.start_workers(run, size, str(root), fields, trap)
    try:
        workers.processes[trap.rank].join(120)
        assert workers.processes[trap.rank].exitcode == -signal.SIGKILL, f"{trap} was not come by"
    finally:
        workers.kill()


def completed(size: int, root: Path, **fields: Any) -> list[Result]:
    return support.run_workers(run, size, str(root), fields)
