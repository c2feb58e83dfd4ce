"""An image that turns out to be bad is left out, the same way on any number of workers; too many end the run."""

import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.data import order
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.order import Batch, Group, Span, Stream, Transforms
from swa_dist.data.scan import scan
from swa_dist.data.sizes import Sizes
from swa_dist.errors import DataError, ExitCode
from swa_dist.storage.store import DiskStore
from swa_dist.training import loop, train
from swa_dist.training.checkpoints import CHECKPOINTS
from swa_dist.training.finetune import finetune
from swa_dist.training.state import load_entry
from swa_dist.training.world import World
from tests import small_run, support
from tests.small_run import NOWHERE, Trap

NUM_TRAIN, NUM_VAL, GROUP, BATCH = small_run.NUM_TRAIN, small_run.NUM_VAL, 16, 48
EPOCHS = 2
# In the first epoch: in the second batch, of which two of three workers have one, and in the short group of the last.
BAD_POSITIONS = (50, 70, 118)
BAD_VAL = 17
FIELDS: dict[str, Any] = {
    "model__arch": "resnet18",
    "optim__epochs": EPOCHS,
    "average__ema": "off",
    "checkpoint__interval_seconds": "epoch",
    "schedule__cycle_epochs": 1,
    "schedule__max_lr": 1e-3,
    "schedule__min_lr": 1e-4,
    "data__image_size": 16,
    "data__resize_size": 16,
    "data__max_bad_share": 0.05,
    "tracking__log_every_steps": 1,
}
SIZES = (1, 2, 3)
WEIGHTS = "start.safetensors"
SEED = 0


def damage(path: Path) -> None:
    """The index sees nothing of it: the file's size, its beginning and its end are as they were."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 50 : middle + 50] = b"\x55" * 100
    path.write_bytes(content)


def at(*positions: int) -> list[int]:
    """The images at these positions of the first epoch: their places in the index."""
    return order.order(SEED, Stream.TRAIN, 0, NUM_TRAIN)[list(positions)].tolist()


BAD = at(*BAD_POSITIONS)


@pytest.fixture(scope="session")
def whole(start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits with noise: long enough for a middle that the index doesn't read. And weights that know them, since
    from random ones a rounding error grows step by step."""
    root = tmp_path_factory.mktemp("whole") / "images"
    digits, generator = load_digits(), np.random.default_rng(1)
    for i in range(NUM_TRAIN + NUM_VAL):
        folder = root / ("train" if i < NUM_TRAIN else "val") / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(digits.images[i] * 15, np.ones((10, 10)))[:, :, None] + generator.integers(0, 15, (80, 80, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    shutil.copy(start_weights, root / WEIGHTS)
    return root


def with_bad(whole: Path, to: Path, train: list[int], val: list[int]) -> Path:
    """A copy in which the images at these places of the index are damaged."""
    root = Path(shutil.copytree(whole, to))
    for split, bad in (("train", train), ("val", val)):
        paths = scan(str(root / split), split).paths
        for i in bad:
            damage(root / split / paths[i])
    return root


@pytest.fixture(scope="session")
def damaged(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bad(whole, tmp_path_factory.mktemp("damaged") / "images", BAD, [BAD_VAL])


class Trapped(DaliLoaders):
    trap: Trap = NOWHERE
    rank: int = 0
    left_out: dict[int, list[int]]
    """The images that the training's groups were said to be without, by epoch."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for batch in super().train(epoch, start, left_out):
            self.trap.at("batch", self.rank)
            for group in batch.groups:
                self.left_out.setdefault(epoch, []).extend(group.left_out)
            yield batch

    def recalibration(self, span: Span, transforms: Transforms, left_out: Mapping[int, str]) -> Iterator[Group]:
        for group in super().recalibration(span, transforms, left_out):
            self.trap.at("recalibrate", self.rank)
            yield group


def recipe_of(root: str, fields: Mapping[str, Any]) -> Recipe:
    recipe = small_run.recipe_of(**FIELDS | dict(fields))
    places = {"data.train": f"{root}/train", "data.val": f"{root}/val", "model.weights": f"{root}/{WEIGHTS}"}
    return config.replace(recipe, **places)


def loaders_of(recipe: Recipe, world: World, trap: Trap = NOWHERE) -> Trapped:
    sizes = Sizes(decode_threads=1, read_threads=1, groups_ahead=2, kept_bytes=10**8, cache_dir="unused", cache_bytes=0)
    found = Trapped(
        scan(recipe.data.train, "data.train"),
        scan(recipe.data.val, "data.val"),
        recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        device=torch.device("cpu"),
        sizes=sizes,
    )
    found.trap, found.rank, found.left_out = trap, world.rank, {}
    return found


def run(world: World, images: str, root: str, fields: Mapping[str, Any], trap: Trap = NOWHERE) -> dict[str, Any]:
    """What became of the run on this worker."""
    recipe = recipe_of(images, fields)
    loaders, tracker = loaders_of(recipe, world, trap), support.Recorder()
    try:
        found = finetune(recipe, world, loaders, DiskStore(Path(root)), tracker, lambda: False)
    except Exception as error:
        return {"error": type(error).__name__, "exit": getattr(error, "exit_code", None), "message": str(error)}
    return {
        "warnings": tracker.warnings,
        "rows": [(row["position"], row["metrics"]) for row in tracker.rows],
        "left_out": loaders.left_out,
        "facts": {name: candidate.facts for name, candidate in found.items()},
        "val_ids": {name: candidate.outcomes.ids.tolist() for name, candidate in found.items()},
    }


def completed(size: int, images: Path, root: Path, **fields: Any) -> list[dict[str, Any]]:
    return support.run_workers(run, size, str(images), str(root), fields)


@pytest.fixture(scope="module")
def runs(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    root = tmp_path_factory.mktemp("runs")
    return {size: (root / str(size), completed(size, damaged, root / str(size))) for size in SIZES}


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(DiskStore(folder).open(f"candidates/{name}") / "model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    parameters = [n for n in a if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    return float(sum(((a[n].double() - b[n].double()) ** 2).sum() for n in parameters) ** 0.5)


def assert_close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    """Within what test_results.py allows: a ten-thousandth of the distance moved, BatchNorm to a hundred-thousandth."""
    assert distance(ours, theirs) <= 1e-4 * distance(theirs, start)
    for mean in (n for n in theirs if n.endswith("running_mean")):
        variance = mean.replace("mean", "var")
        assert ((ours[mean] - theirs[mean]).abs() <= 1e-5 * theirs[variance].sqrt()).all(), mean
        torch.testing.assert_close(ours[variance], theirs[variance], rtol=1e-5, atol=0)


def checkpoint_of(folder: Path, position: int) -> dict[str, Any]:
    _, facts = load_entry(DiskStore(folder), f"{CHECKPOINTS}/{position:012d}")
    return facts


def names_of(images: Path, split: str, ids: list[int]) -> list[str]:
    paths = scan(str(images / split), split).paths
    return [paths[i] for i in ids]


# Left out


@pytest.mark.parametrize("size", SIZES)
def test_bad_images_are_named_once_counted_and_in_the_checkpoint(runs: Any, damaged: Path, size: int) -> None:
    folder, results = runs[size]
    assert not [result for result in results if "error" in result]
    for name in names_of(damaged, "train", BAD):
        assert len([line for line in results[0]["warnings"] if name in line and "can't be decoded" in line]) == 1
    assert all(not result["warnings"] for result in results[1:])
    assert [i for i, _ in checkpoint_of(folder, EPOCHS * NUM_TRAIN)["left_out"]] == sorted(BAD)
    counted = {position: m["train/images_left_out"] for position, m in results[0]["rows"] if "train/lr" in m}
    assert counted == {48: 0, 96: 2, 120: 3, 168: 3, 216: 3, 240: 3}


@pytest.mark.parametrize("size", SIZES)
def test_each_epoch_leaves_each_bad_image_out_of_one_group(runs: Any, size: int) -> None:
    for epoch in range(EPOCHS):
        assert sorted(i for result in runs[size][1] for i in result["left_out"].get(epoch, [])) == sorted(BAD)


@pytest.mark.parametrize("size", SIZES)
def test_a_bad_validation_image_is_left_out_of_every_candidate_alike_named_and_in_its_facts(
    runs: Any, damaged: Path, size: int
) -> None:
    (name,) = names_of(damaged, "val", [BAD_VAL])
    others = [i for i in range(NUM_VAL) if i != BAD_VAL]
    results = runs[size][1]
    assert any(name in line for line in results[0]["warnings"])
    for result in results:
        assert set(map(tuple, result["val_ids"].values())) == {tuple(others)}
        for facts in result["facts"].values():
            assert facts["evaluation"]["num_images"] == NUM_VAL - 1
            assert facts["evaluation"]["left_out"] == [name]


@pytest.mark.parametrize("name", ["last", "last_fresh", "swa"])
@pytest.mark.parametrize("size", SIZES[1:])
def test_any_number_of_workers_has_the_same_weights(runs: Any, size: int, name: str) -> None:
    assert_close(weights_of(runs[size][0], name), weights_of(runs[1][0], name), weights_of(runs[1][0], "start"))


def by_hand(world: World, images: str, start: str) -> dict[str, np.ndarray]:
    """The training without those images, in torch alone: their places are dropped from the groups, and each step is on
    the mean over the images of the batch that are left."""
    recipe = recipe_of(images, {})
    model = models.build(recipe.model, recipe.seed)
    model.load_state_dict(safetensors.torch.load_file(start))
    model.train()
    whole = loaders_of(recipe, world)
    optimizer = loop.sgd(model, models.head_names(model), recipe)
    rate = train.learning_rate(recipe, NUM_TRAIN)
    position = 0
    for epoch in range(EPOCHS):
        for batch in whole.train(epoch, 0, {}):
            groups = [(group.images[good], group.labels[good]) for group in batch.groups for good in [_good(group)]]
            num_images = sum(len(labels) for _, labels in groups)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate.rate(position, position + batch.num_images)
            for number, (pixels, labels) in enumerate(groups):
                torch.manual_seed(recipe.seed + position + number)
                (F.cross_entropy(model(pixels), labels, reduction="sum") / num_images).backward()
            optimizer.step()
            optimizer.zero_grad()
            position += batch.num_images
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _good(group: Group) -> torch.Tensor:
    return torch.from_numpy(~np.isin(group.ids, BAD))


def test_it_is_the_training_without_their_places(runs: Any, whole: Path) -> None:
    """From the images before they were damaged, so that nothing but the places tells which are left out."""
    start = DiskStore(runs[1][0]).open("candidates/start") / "model.safetensors"
    (found,) = support.run_workers(by_hand, 1, str(whole), str(start))
    reference = {name: torch.from_numpy(np.asarray(values)) for name, values in found.items()}
    last, before = weights_of(runs[1][0], "last"), weights_of(runs[1][0], "start")
    print(f"apart by {distance(last, reference) / distance(reference, before):.2g} of the distance moved")
    assert_close(last, reference, before)


# Killed


@pytest.mark.parametrize(
    ("size", "trap"),
    [
        (1, Trap("batch", 2)),
        pytest.param(2, Trap("batch", 4, rank=1), marks=pytest.mark.faults),
        pytest.param(2, Trap("batch", 1), marks=pytest.mark.faults),
    ],
)
def test_killed_and_resumed_it_has_the_same_bits(
    runs: Any, damaged: Path, tmp_path: Path, size: int, trap: Trap
) -> None:
    """After the first two were met, after all were met, and before any was."""
    often = {"checkpoint__interval_seconds": 0.001}
    workers = support.start_workers(run, size, str(damaged), str(tmp_path), often, trap)
    try:
        workers.processes[trap.rank].join(60)
        assert workers.processes[trap.rank].exitcode == -signal.SIGKILL
    finally:
        workers.kill()
    results = completed(size, damaged, tmp_path)
    for name in ("last", "last_fresh", "swa"):
        ours, theirs = weights_of(tmp_path, name), weights_of(runs[size][0], name)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs), name
    end = EPOCHS * NUM_TRAIN
    assert checkpoint_of(tmp_path, end)["left_out"] == checkpoint_of(runs[size][0], end)["left_out"]
    assert results[0]["val_ids"] == runs[size][1][0]["val_ids"]


def test_a_resumed_run_does_not_name_again_what_its_checkpoint_has(runs: Any, damaged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs[1][0], tmp_path / "run"))
    store = DiskStore(folder)
    for name in store.names("candidates"):
        if not name.endswith("/start"):
            store.remove(name)
    (result,) = completed(1, damaged, folder)
    assert not [line for line in result["warnings"] for name in names_of(damaged, "train", BAD) if name in line]
    assert weights_of(folder, "swa").keys() == weights_of(runs[1][0], "swa").keys()
    assert distance(weights_of(folder, "swa"), weights_of(runs[1][0], "swa")) == 0


@pytest.mark.faults
def test_an_image_that_is_bad_only_in_the_recalibration_is_left_out_of_it_and_named(
    whole: Path, tmp_path: Path
) -> None:
    """It was damaged after the training had used it for the last time."""
    images, folder = Path(shutil.copytree(whole, tmp_path / "images")), tmp_path / "run"
    workers = support.start_workers(run, 2, str(images), str(folder), {}, Trap("recalibrate", 0))
    workers.processes[0].join(60)
    assert workers.processes[0].exitcode == -signal.SIGKILL
    workers.kill()
    (name,) = names_of(images, "train", [7])
    damage(images / "train" / name)
    results = completed(2, images, folder)
    assert any(name in line for line in results[0]["warnings"])
    for candidate in ("last_fresh", "swa"):
        facts = results[0]["facts"][candidate]["recalibration"]
        assert (facts["num_images"], facts["left_out"]) == (NUM_TRAIN - 1, [name])
    assert checkpoint_of(folder, EPOCHS * NUM_TRAIN)["left_out"] == []


# Too many


def ends(results: list[dict[str, Any]]) -> list[str]:
    """What each worker said, whose run must have ended for its data."""
    assert {(result.get("error"), result.get("exit")) for result in results} == {
        (DataError.__name__, ExitCode.BAD_DATA)
    }, results
    return [result["message"] for result in results]


@pytest.mark.parametrize(("share", "size"), [(0, 1), (0.001, 2), (0.02, 1)])
def test_more_bad_images_than_the_share_end_the_run_on_all_workers(
    damaged: Path, tmp_path: Path, share: float, size: int
) -> None:
    """0: none may be. 0.001: one may, which the second batch has two of. 0.02: two may, and the third is met later."""
    messages = ends(completed(size, damaged, tmp_path, data__max_bad_share=share, evaluate__preflight="warn"))
    named = names_of(damaged, "train", BAD) + names_of(damaged, "val", [BAD_VAL])
    assert all("`data.max_bad_share`" in message and "swa-dist data verify" in message for message in messages)
    assert all(any(name in message for name in named) for message in messages)
    assert len(set(messages)) == 1


@pytest.mark.parametrize(("split", "bad"), [("train", at(50)), ("val", [BAD_VAL])])
def test_a_share_of_0_is_none(whole: Path, tmp_path: Path, split: str, bad: list[int]) -> None:
    images = with_bad(whole, tmp_path / "images", *((bad, []) if split == "train" else ([], bad)))
    (message,) = ends(completed(1, images, tmp_path / "run", data__max_bad_share=0))
    assert names_of(images, split, bad)[0] in message


@pytest.mark.faults
def test_one_bad_image_is_within_any_other_share(whole: Path, tmp_path: Path) -> None:
    images = with_bad(whole, tmp_path / "images", at(50), [BAD_VAL])
    (result,) = completed(1, images, tmp_path / "run", data__max_bad_share=1e-6)
    assert "error" not in result


def test_a_group_with_one_good_image_ends_the_run_and_no_worker_hangs(whole: Path, tmp_path: Path) -> None:
    """All but one of the second group, which the worker 1 of 2 has: the other hears that it is gone."""
    images = with_bad(whole, tmp_path / "images", at(*range(17, 32)), [])
    first, second = completed(2, images, tmp_path / "run", data__max_bad_share=1.0)
    (message,) = ends([second])
    assert "a group of images must have two that can be decoded" in message
    assert any(name in message for name in names_of(images, "train", at(*range(17, 32))))
    assert first["error"]


@pytest.mark.parametrize("transforms", ["train", "eval"])
def test_recalibration_on_a_group_with_one_good_image_ends_the_run_too(
    whole: Path, tmp_path: Path, transforms: str
) -> None:
    """In which BatchNorm has no variance."""
    ids = order.order(SEED, Stream.RECALIBRATE, 0, NUM_TRAIN)[: GROUP - 1].tolist()
    images = with_bad(whole, tmp_path / "images", ids, [])
    found = support.run_workers(recalibrated, 1, str(images), transforms)
    (message,) = ends(found)
    assert "a group of images must have two that can be decoded" in message


def recalibrated(world: World, images: str, transforms: Transforms) -> dict[str, Any]:
    loaders = loaders_of(recipe_of(images, {}), world)
    try:
        list(loaders.recalibration(Span(0, GROUP), transforms, {}))
    except DataError as error:
        return {"error": type(error).__name__, "exit": error.exit_code, "message": str(error)}
    return {}
