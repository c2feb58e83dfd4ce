"""Killed at every step and every few writes, also again and again, a run ends with the same bits.

`pytest -m faults -rP` prints the figures in docs/operations.md.
"""

import os
import random
import signal
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from swa_dist.storage.store import DiskStore
from tests import small_run, support
from tests.distributed.test_exact_resume import assert_as_if_nothing_happened
from tests.small_run import NUM_TRAIN, STEPS_PER_EPOCH, Result, Trap, WithinAnEpoch, committed

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

SIZES = (1, 2, 3)
EPOCHS = 3
POSITIONS = [epoch * NUM_TRAIN + done for epoch in range(EPOCHS) for done in (0, 48, 96)] + [EPOCHS * NUM_TRAIN]
"""Before each step, and at the end."""
SEED = 20_261_124


@dataclass(unsafe_hash=True)
class Noting(Trap):
    """Notes each batch that rank 0 begins, in a file that outlives it."""

    notes: str = ""

    def at(self, point: str, rank: int) -> None:
        if (point, rank) == ("batch", 0):
            with open(self.notes, "a") as file:
                file.write("b")
        super().at(point, rank)


@dataclass(frozen=True)
class Tried:
    """One run that was killed and let finish."""

    size: int
    what: str
    kills: int
    wrong: str
    """How it ended otherwise than undisturbed; empty: it did not."""
    lost: list[int]
    """Of each kill during the training: images of whole steps that no committed checkpoint had."""
    seconds: float


TRIED: list[Tried] = []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    root = tmp_path_factory.mktemp("undisturbed")
    return {size: small_run.completed(size, root / str(size)) for size in SIZES}


def disturb(size: int, root: Path, trap: Trap, seconds: float | None) -> tuple[bool, int | None]:
    """Run until the trap, or the moment, kills it: whether it did, and the images that it cost where it trained."""
    notes = root.parent / "notes" / f"{root.name}-{time.monotonic_ns()}"
    notes.parent.mkdir(exist_ok=True)
    before = committed(root)
    noting = Noting(trap.point, trap.number, trap.rank, notes=str(notes))
    workers = support.start_workers(small_run.run, size, str(root), {}, noting)
    try:
        workers.processes[trap.rank].join(300 if seconds is None else seconds)
        ended = workers.processes[trap.rank].exitcode
        assert ended is not None or seconds is not None, f"{trap}: it hangs"
        killed = ended in (None, -signal.SIGKILL)
    finally:
        workers.kill()
    begun = notes.stat().st_size if notes.exists() else 0
    if not killed or not begun or committed(root) == POSITIONS[-1]:
        return killed, None
    return killed, max(0, POSITIONS[POSITIONS.index(before) + begun - 1] - committed(root))


def attempt(size: int, root: Path, what: str, ends: Iterable[tuple[Trap, float | None]], wanted: Any) -> Tried:
    began, kills, lost, wrong = time.monotonic(), 0, [], ""
    for trap, seconds in ends:
        killed, cost = disturb(size, root, trap, seconds)
        kills += killed
        lost += [] if cost is None else [cost]
    try:
        assert_as_if_nothing_happened(small_run.completed(size, root), wanted, size)
    except (AssertionError, support.WorkerError) as error:
        wrong = str(error)
    return Tried(size, what, kills, wrong, lost, time.monotonic() - began)


def try_all(
    size: int, plans: dict[str, list[tuple[Trap, float | None]]], folder: Path, undisturbed: Any
) -> list[Tried]:
    """As many at once as there are processors for."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // size)) as pool:
        tried = list(
            pool.map(
                lambda plan: attempt(size, folder / f"run{plan[0]}", plan[1][0], plan[1][1], undisturbed[size]),
                enumerate(plans.items()),
            )
        )
    TRIED.extend(tried)
    wrong = [(one.what, one.wrong) for one in tried if one.wrong]
    assert not wrong, wrong
    return tried


def each(point: str, numbers: Iterable[int], ranks: Iterable[int]) -> dict[str, list[tuple[Trap, float | None]]]:
    return {
        f"{point} {number} on rank {rank}": [(Trap(point, number, rank), None)]
        for number, rank in zip(numbers, ranks, strict=False)
    }


def some_ranks(size: int, count: int) -> list[int]:
    chooser = random.Random(SEED + size)
    return [chooser.randrange(size) for _ in range(count)]


@pytest.mark.parametrize("size", SIZES)
def test_killed_at_every_step(undisturbed: Any, size: int, tmp_path: Path) -> None:
    steps = range(EPOCHS * STEPS_PER_EPOCH)
    tried = try_all(size, each("batch", steps, some_ranks(size, len(steps))), tmp_path, undisturbed)
    assert all(one.kills == 1 for one in tried)


@pytest.mark.parametrize("point", ["commit", "committed", "prune"])
@pytest.mark.parametrize("size", SIZES)
def test_killed_around_commits(undisturbed: Any, size: int, point: str, tmp_path: Path) -> None:
    tried = try_all(size, each(point, range(3), [0] * 3), tmp_path, undisturbed)
    # How much there is to prune depends on how many checkpoints the clock allowed.
    assert all(one.kills == 1 for one in tried if point != "prune")
    assert any(one.kills == 1 for one in tried)


@pytest.mark.parametrize(("size", "first", "every"), [(1, 0, 6), (2, 1, 18), (3, 5, 18)])
def test_killed_at_every_few_writes(undisturbed: Any, size: int, first: int, every: int, tmp_path: Path) -> None:
    numbers = range(first, 126, every)
    tried = try_all(size, each("file", numbers, [0] * len(numbers)), tmp_path, undisturbed)
    assert sum(one.kills for one in tried) > 0.6 * len(numbers)


@pytest.mark.parametrize("size", SIZES)
def test_killed_in_recalibration_and_evaluation(undisturbed: Any, size: int, tmp_path: Path) -> None:
    """A rank has 2 to 7 groups to recalibrate a candidate on, and 1 to 3 to evaluate one on."""
    plans = each("recalibrate", (0, 4, 7), some_ranks(size, 3)) | each("evaluate", (0, 2, 3), some_ranks(size, 3))
    assert all(one.kills == 1 for one in try_all(size, plans, tmp_path, undisturbed))


@pytest.mark.parametrize("size", SIZES)
def test_killed_at_random_moments_again_and_again(undisturbed: Any, size: int, tmp_path: Path) -> None:
    chooser = random.Random(10 * SEED + size)
    longest = undisturbed[size][0].seconds + 0.5
    plans = {}
    for number in range(4 if size < 3 else 3):
        moments = [chooser.uniform(0.1, longest) for _ in range(chooser.choice((2, 3)))]
        plans[f"random {number}"] = [(Trap("nowhere", 0), seconds) for seconds in moments]
        print(f"{size} workers, seed {10 * SEED + size}: killed after {[round(s, 2) for s in moments]} s")
    assert any(one.lost for one in try_all(size, plans, tmp_path, undisturbed))


AS_GOOD_AS_EQUAL = 2e-3
"""Of the distance moved. Another order of sums makes 1e-5; one ReLU that flips for it, as with three workers, 5e-4."""


@pytest.fixture(scope="module")
def fitted(start_weights: Path) -> dict[str, str | float]:
    """Fine-tuning: low rates from fitted weights. Elsewhere a rounding error grows step by step: from random weights,
    undisturbed runs of one and of two workers end half of the distance moved apart."""
    return {
        "model__arch": "resnet18",
        "model__weights": str(start_weights),
        "schedule__max_lr": 1e-3,
        "schedule__min_lr": 1e-4,
    }


@pytest.fixture(scope="module")
def alone(fitted: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One worker, undisturbed."""
    root = tmp_path_factory.mktemp("alone")
    (result,) = small_run.completed(1, root, **fitted)
    return root, result


def weights_of(root: Path, candidate: str) -> dict[str, torch.Tensor]:
    found = safetensors.torch.load_file(DiskStore(root).open(f"candidates/{candidate}") / "model.safetensors")
    return {name: t.double() for name, t in found.items() if "running_" not in name and "num_batches" not in name}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in a) ** 0.5)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 3), (3, 1)])
def test_within_an_epoch_another_number_of_workers_takes_over(
    alone: tuple[Path, Result], fitted: dict[str, Any], first: int, second: int, tmp_path: Path
) -> None:
    small_run.killed(first, tmp_path, WithinAnEpoch("nowhere", 0, root=str(tmp_path)), **fitted)
    position = committed(tmp_path)
    epochs, within = divmod(position, NUM_TRAIN)
    assert epochs >= 1
    assert within > 0
    results = small_run.completed(second, tmp_path, **fitted)
    before = [g for g in alone[1].groups if g[0] < epochs]
    of_epoch = [g for g in alone[1].groups if g[0] == epochs]
    before += of_epoch[: within // 16]
    resumed = sorted(group for result in results for group in result.groups)
    assert resumed == sorted(alone[1].groups[len(before) :])
    for epoch in range(EPOCHS):
        seen = [image for e, ids in before + resumed for image in ids if e == epoch]
        assert sorted(seen) == list(range(NUM_TRAIN))
    assert results[0].iterates == alone[1].iterates == [96, 120, 216, 240, 336, 360]
    assert results[0].world_sizes == [first, second]
    assert [row[0] for row in results[0].rows] == [row[0] for row in alone[1].rows]
    for name in ("swa", "last", "ema"):
        undisturbed, start = weights_of(alone[0], name), weights_of(alone[0], "start")
        apart = distance(weights_of(tmp_path, name), undisturbed) / distance(undisturbed, start)
        print(f"{first} to {second} workers at image {position}: {name} apart by {apart:.1e} of the distance moved")
        assert apart <= AS_GOOD_AS_EQUAL


def test_every_resume_ended_with_the_same_bits() -> None:
    """The figures of the tests before."""
    assert TRIED, "run the whole file"
    kills = sum(one.kills for one in TRIED)
    lost = [images for one in TRIED for images in one.lost] or [0]
    same = [one for one in TRIED if not one.wrong]
    print(
        f"resumes tried {kills} (of {len(TRIED)} runs), bit-identical {sum(one.kills for one in same)}"
        f" (of {len(same)} runs), {statistics.median(one.seconds for one in TRIED):.1f} s in the median for a run with"
        f" its kills, work lost per kill in training (images of {POSITIONS[-1]}, {len(lost)} kills): median"
        f" {statistics.median(lost):.0f}, max {max(lost)}"
    )
    assert len(same) == len(TRIED)
