"""Several averages of one run, a longer run from a shorter one, and what never enters an average."""

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import ShuffleNetV2

from swa_dist import config
from swa_dist.data.order import Batch
from swa_dist.storage.store import DiskStore
from swa_dist.training.finetune import finetune
from swa_dist.training.state import load_entry
from swa_dist.training.world import World
from tests import small_run, support
from tests.distributed.test_results import loaders, small_recipe_of, weights_of

ALL = {
    "optim.epochs": 3,
    "average.points": 2,
    "average.include_start": True,
    "average.window": 3,
    "average.keep_iterates": 7,
    "average.ema": {"decay": 0.8},
    "average.also_after_epochs": [1],
    "tracking.log_every_steps": 1,
}


def run(world: World, digits: str, root: str, fields: dict[str, Any]) -> dict[str, Any]:
    recipe = small_recipe_of(digits, **fields)
    found = finetune(recipe, world, loaders(recipe, world), DiskStore(Path(root)), support.Recorder(), lambda: False)
    return {name: candidate.facts for name, candidate in found.items()}


@pytest.fixture(scope="module")
def everything(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("everything")
    return root, support.run_workers(run, 1, str(digits), str(root), ALL)[0]


def iterates_of(root: Path) -> dict[int, dict[str, torch.Tensor]]:
    store = DiskStore(root)
    parts, _ = load_entry(store, store.names("checkpoints")[-1])
    return {int(name.removeprefix("iterate.")): t for name, t in parts.items() if name.startswith("iterate.")}


def mean64(iterates: dict[int, dict[str, torch.Tensor]], ids: list[int]) -> dict[str, np.ndarray]:
    return {name: np.mean([iterates[i][name].double().numpy() for i in ids], axis=0) for name in iterates[ids[0]]}


def test_each_average_is_the_mean_of_the_iterates_it_names(everything: tuple[Path, Any]) -> None:
    root, facts = everything
    # Twice an epoch of 400 images in batches of 96: the steps that reach 200 and 400 images, and the start.
    ids = [0, 288, 400, 688, 800, 1088, 1200]
    assert facts["swa"]["average"]["iterates"] == ids
    assert facts["swa_1"]["average"]["iterates"] == [0, 288, 400]
    assert facts["window"]["average"]["iterates"] == [800, 1088, 1200]
    iterates = iterates_of(root)
    assert list(sorted(iterates)) == ids
    for name in ("swa", "swa_1", "window"):
        found, exact = weights_of(root, name), mean64(iterates, facts[name]["average"]["iterates"])
        for key, value in exact.items():
            scale = max(float(iterates[i][key].abs().max()) for i in ids)
            assert np.abs(found[key].double().numpy() - value).max() <= 4 * np.finfo(np.float32).eps * scale


def test_the_first_iterate_is_the_start_and_the_last_is_last(everything: tuple[Path, Any]) -> None:
    root, _ = everything
    iterates = iterates_of(root)
    for position, name in ((0, "start"), (1200, "last")):
        weights = weights_of(root, name)
        assert all(torch.equal(weights[key], tensor) for key, tensor in iterates[position].items())


def test_every_average_is_scored_with_batchnorm_of_its_own(everything: tuple[Path, Any]) -> None:
    root, facts = everything
    assert set(facts) == {"start", "last", "last_fresh", "swa", "swa_1", "ema", "window"}
    means = [weights_of(root, name)["conv1.1.running_mean"] for name in ("swa", "swa_1", "ema", "window", "last_fresh")]
    assert all(not torch.equal(a, b) for i, a in enumerate(means) for b in means[:i])
    assert all(facts[name]["recalibration"]["num_images"] == 400 for name in ("swa", "swa_1", "ema", "window"))


def test_a_longer_run_from_a_finished_shorter_one_is_the_run_from_scratch(digits: Path, tmp_path: Path) -> None:
    short, long, scratch = (str(tmp_path / name) for name in ("short", "long", "scratch"))
    kept = {"average.ema": {"decay": 0.9}, "average.window": 2}
    more = kept | {"optim.epochs": 2, "average.also_after_epochs": [1]}
    support.run_workers(run, 2, str(digits), short, kept | {"optim.epochs": 1})
    extended = support.run_workers(run, 2, str(digits), long, more | {"checkpoint.extend_from": short})[0]
    straight = support.run_workers(run, 2, str(digits), scratch, more)[0]
    assert extended["swa"]["average"]["iterates"] == straight["swa"]["average"]["iterates"] == [400, 800]
    for name in ("swa", "swa_1", "ema", "window", "last"):
        a, b = weights_of(Path(long), name), weights_of(Path(scratch), name)
        assert all(torch.equal(a[key], b[key]) for key in b), name
    # The shorter run's average is the longer one's after as many epochs.
    first, after = weights_of(Path(short), "swa"), weights_of(Path(long), "swa_1")
    assert all(torch.equal(first[key], after[key]) for key in first)


def test_weights_that_are_not_finite_end_the_run_and_leave_the_last_good_checkpoint(
    digits: Path, tmp_path: Path
) -> None:
    high = {"schedule.max_lr": 10.0, "schedule.min_lr": 10.0, "optim.weight_decay": 1.0, "optim.epochs": 4}
    recipe = small_recipe_of(str(digits), **high)
    with pytest.raises(support.WorkerError, match="NumericsError"):
        support.run_workers(diverge, 1, config.to_tree(recipe), str(tmp_path))
    for name in DiskStore(tmp_path).names("checkpoints"):
        parts, _ = load_entry(DiskStore(tmp_path), name)
        assert all(torch.isfinite(tensor).all() for tensor in parts["swa.sum"].values())


def diverge(world: World, tree: dict[str, Any], root: str) -> None:
    recipe = config.from_tree(tree)
    finetune(recipe, world, loaders(recipe, world), DiskStore(Path(root)), support.Recorder(), lambda: False)


def test_weights_that_went_bad_between_steps_enter_no_average(tmp_path: Path) -> None:
    with pytest.raises(support.WorkerError, match=r"weights must be finite to be averaged, but `.*` on rank 1 is not"):
        support.run_workers(run_with_a_bad_weight, 2, str(tmp_path))
    for name in DiskStore(tmp_path).names("checkpoints"):
        parts, _ = load_entry(DiskStore(tmp_path), name)
        assert all(torch.isfinite(tensor).all() for tensor in parts["swa.sum"].values())


class Spoiling(small_run.TrappedLoaders):
    """A weight of rank 1 is not a number any more before the last batch of the second epoch, whose step is skipped."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for batch in super().train(epoch, start, left_out):
            if (epoch, batch.num_images, self.rank) == (1, 24, 1):
                (model,) = [one for one in gc.get_objects() if isinstance(one, ShuffleNetV2)]
                with torch.no_grad():
                    model.fc.bias[3] = torch.nan
            yield batch


def run_with_a_bad_weight(world: World, root: str) -> None:
    recipe = small_run.recipe_of()
    plain = small_run.loaders_of(recipe, world)
    spoiling = Spoiling(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    finetune(recipe, world, spoiling, DiskStore(Path(root)), support.Recorder(), lambda: False)
