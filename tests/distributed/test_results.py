"""Results depend on the recipe, never on the cluster: 1, 2 and 3 workers, and runs that were killed."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.order import Batch
from swa_dist.data.scan import scan
from swa_dist.data.sizes import sizes
from swa_dist.storage.store import DiskStore
from swa_dist.training.checkpoints import CHECKPOINTS
from swa_dist.training.finetune import finetune
from swa_dist.training.state import Row
from swa_dist.training.world import World
from tests import support

# Three groups in a global batch of 96; the last batch of 400 images has one group of 16, so that of three workers two
# have none. Low rates, as in fine-tuning: at high ones a rounding error grows step by step.
FIELDS = {
    "optim.epochs": 2,
    "data.global_batch": 96,
    "data.group_images": 32,
    "data.image_size": 16,
    "data.resize_size": 16,
    "schedule.max_lr": 1e-3,
    "schedule.min_lr": 1e-4,
}
SIZES = (1, 2, 3)


def recipe_of(digits: str, weights: str) -> Recipe:
    return support.digits_recipe(digits, weights, **FIELDS)


def small_recipe_of(digits: str, **fields: Any) -> Recipe:
    """With a small network of random weights, for what holds to the bit: its rounding errors would grow."""
    small = {"model.arch": "shufflenet_v2_x0_5"}
    return config.replace(recipe_of(digits, models.RANDOM), **(small | fields))


class Watched(DaliLoaders):
    """Loaders that note the groups of the training, with a hash of their pixels."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for batch in super().train(epoch, start, left_out):
            for group in batch.groups:
                digest = hashlib.sha256(group.images.numpy().tobytes()).hexdigest()
                SEEN.append((epoch, tuple(group.ids.tolist()), digest))
            yield batch


SEEN: list[tuple[int, tuple[int, ...], str]] = []


def loaders(recipe: Recipe, world: World, kind: type[DaliLoaders] = Watched) -> DaliLoaders:
    train, val = (scan(root, f"data.{split}") for split, root in _roots(recipe))
    return kind(
        train,
        val,
        recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        device=torch.device("cpu"),
        sizes=sizes(recipe.data, 1, world.size),
    )


def _roots(recipe: Recipe) -> list[tuple[str, str]]:
    return [("train", recipe.data.train), ("val", recipe.data.val)]


class Killer(support.Recorder):
    """Kills its process when a given number of rows are covered by a committed checkpoint."""

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self._at = rows

    def publish(self, rows: Sequence[Row]) -> None:
        super().publish(rows)
        if self._at is not None and len(rows) >= self._at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Result:
    groups: list[tuple[int, tuple[int, ...], str]]
    correct: dict[str, int]
    facts: dict[str, Any]
    rows: list[Row]


def run(world: World, digits: str, weights: str, root: str, kill_at: int | None = None) -> Result:
    recipe = recipe_of(digits, weights)
    tracker = Killer(kill_at)
    found = finetune(recipe, world, loaders(recipe, world), DiskStore(Path(root)), tracker, lambda: False)
    correct = {name: int(candidate.outcomes.top1.sum()) for name, candidate in found.items()}
    facts = {name: candidate.facts for name, candidate in found.items()}
    return Result(groups=list(SEEN), correct=correct, facts=facts, rows=tracker.rows)


@pytest.fixture(scope="module")
def runs(digits: Path, start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Any]]:
    """The same recipe on 1, 2 and 3 workers: the run's folder and each worker's result."""
    root = tmp_path_factory.mktemp("runs")
    return {
        size: (root / str(size), support.run_workers(run, size, str(digits), str(start_weights), str(root / str(size))))
        for size in SIZES
    }


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(DiskStore(folder).open(f"candidates/{name}") / "model.safetensors")


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum(((a[n].double() - b[n].double()) ** 2).sum() for n in a if not is_statistic(n)) ** 0.5)


def test_groups_are_the_same_by_id_and_pixel(runs: Any) -> None:
    groups = {size: sorted(g for result in results for g in result.groups) for size, (_, results) in runs.items()}
    assert len(groups[1]) == len(set(groups[1])) == 2 * 13
    assert groups[1] == groups[2] == groups[3]


@pytest.mark.parametrize("name", ["swa", "last"])
@pytest.mark.parametrize("size", [2, 3])
def test_weights_are_within_a_ten_thousandth_of_the_distance_moved(runs: Any, size: int, name: str) -> None:
    start, alone, many = weights_of(runs[1][0], "start"), weights_of(runs[1][0], name), weights_of(runs[size][0], name)
    assert distance(many, alone) <= 1e-4 * distance(alone, start)


@pytest.mark.parametrize("name", ["swa", "last", "last_fresh"])
@pytest.mark.parametrize("size", [2, 3])
def test_batchnorm_is_within_a_hundred_thousandth_of_a_deviation(runs: Any, size: int, name: str) -> None:
    alone, many = weights_of(runs[1][0], name), weights_of(runs[size][0], name)
    for mean in (n for n in alone if n.endswith("running_mean")):
        variance = mean.replace("mean", "var")
        assert ((many[mean] - alone[mean]).abs() <= 1e-5 * alone[variance].sqrt()).all(), mean
        torch.testing.assert_close(many[variance], alone[variance], rtol=1e-5, atol=0)


def test_every_worker_returns_the_same_and_each_validation_image_counts_once(runs: Any) -> None:
    for _, results in runs.values():
        assert all(result.correct == results[0].correct for result in results)
    assert all(97 % size for size in SIZES[1:])  # the number of validation images
    assert len({results[0].correct["start"] for _, results in runs.values()}) == 1


def evaluate_only(world: World, digits: str, weights: str, trained: str) -> int:
    """Correct validation images of one and the same trained weights."""
    from swa_dist.training.evaluate import evaluate

    recipe = recipe_of(digits, weights)
    model = models.build(recipe.model, 0)
    model.load_state_dict(safetensors.torch.load_file(trained))
    of = loaders(recipe, world)
    return int(evaluate(model, of.validation(), of.num_val, recipe, world).top1.sum())


def test_one_and_the_same_weights_have_the_same_number_of_correct_images(
    runs: Any, digits: Path, start_weights: Path
) -> None:
    trained = DiskStore(runs[1][0]).open("candidates/swa") / "model.safetensors"
    found = [support.run_workers(evaluate_only, n, str(digits), str(start_weights), str(trained)) for n in SIZES]
    assert {count for counts in found for count in counts} == {runs[1][1][0].correct["swa"]}


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 3)])
def test_a_killed_run_resumes_at_its_last_committed_epoch(
    runs: Any, first: int, second: int, digits: Path, start_weights: Path, tmp_path: Path
) -> None:
    undisturbed = runs[first][1][0]
    rows_of_first_epoch = sum(row["position"] <= 400 for row in undisturbed.rows)
    workers = support.start_workers(run, first, str(digits), str(start_weights), str(tmp_path), rows_of_first_epoch)
    deadline = time.monotonic() + 120
    while workers.processes[0].is_alive():  # rank 0 kills itself after its first commit
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers.kill()
    assert DiskStore(tmp_path).names(CHECKPOINTS) == [f"{CHECKPOINTS}/{400:012d}"]
    results = support.run_workers(run, second, str(digits), str(start_weights), str(tmp_path))
    assert {epoch for result in results for epoch, _, _ in result.groups} == {1}
    assert results[0].facts["swa"]["average"] == {"iterates": [400, 800], "regime": "replicated", "spread": 0.0}
    assert results[0].facts["last"]["training"]["world_sizes"] == [first, second]
    assert [row["position"] for row in results[0].rows] == [row["position"] for row in undisturbed.rows]
    swa, before = weights_of(tmp_path, "swa"), weights_of(runs[first][0], "swa")
    if first == second:
        assert all(torch.equal(swa[name], before[name]) for name in swa)
    else:
        assert distance(swa, before) <= 1e-4 * distance(before, weights_of(runs[first][0], "start"))


def test_replicas_that_differ_never_enter_the_average(digits: Path, start_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(support.WorkerError, match=r"the weights at image 400 must be the same on all workers"):
        support.run_workers(run_with_a_flipped_bit, 2, str(digits), str(start_weights), str(tmp_path))
    assert DiskStore(tmp_path).names(CHECKPOINTS) == []


def run_with_a_flipped_bit(world: World, digits: str, weights: str, root: str) -> None:
    recipe = config.replace(recipe_of(digits, weights), **{"optim.epochs": 1})

    class Faulty(Watched):
        """On rank 1, one bit of one weight flips before the last batch."""

        def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
            for batch in super().train(epoch, start, left_out):
                if batch.num_images < 96 and world.rank == 1:
                    with torch.no_grad():
                        bits = _model().fc.bias.view(torch.int32)
                        bits[3] ^= 1
                yield batch

    def _model() -> Any:
        import gc

        from torch.nn.parallel import DistributedDataParallel

        (wrapped,) = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
        return wrapped.module

    finetune(recipe, world, loaders(recipe, world, Faulty), DiskStore(Path(root)), support.Recorder(), lambda: False)
