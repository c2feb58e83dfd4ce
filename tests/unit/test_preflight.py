"""The starting weights are compared with what they are known to have, and ImageNet with what it is known to be."""

import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data.index import SCHEMA, Index
from swa_dist.errors import DataError, ExitCode
from swa_dist.service import checks
from swa_dist.training.preflight import check

PUBLISHED = 76.13
VAL_IMAGES = 50_000
LAW = settings(deadline=None, derandomize=True, database=None)


def recipe(**fields: object) -> Recipe:
    """That of ResNet-50 on ImageNet, with a published figure, or with these fields."""
    tree = {
        "name": "preflight",
        "model": {"arch": "resnet50", "weights": "IMAGENET1K_V1"},
        "data": {"name": "imagenet", "kind": "imagenet", "train": "train", "val": "val"},
        "optim": {"epochs": 5},
        "schedule": {"name": "constant", "lr": 0.001},
        "evaluate": {"published_top1": PUBLISHED},
        "registry": {"model": "resnet50"},
    }
    return config.replace(config.from_tree(tree), **fields)


def allowed(published: float, num_images: int) -> float:
    """How far below the published figure is still fine: half a point and four standard errors, in percent."""
    return 0.5 + 4 * math.sqrt(published * (100 - published) / num_images)


def problem(top1: float, num_images: int = VAL_IMAGES, **fields: object) -> str:
    found = check(top1, num_images, recipe(**fields))
    assert isinstance(found.problem, DataError)
    assert str(found.problem) == found.sentence
    return found.sentence


# What is let through


@LAW
@given(published=st.floats(1, 100), num_images=st.integers(1, 100_000), beyond=st.floats(1e-6, 50))
def test_only_what_is_below_the_figure_by_more_than_decoding_and_chance_may_explain_is_a_problem(
    published: float, num_images: int, beyond: float
) -> None:
    known = recipe(**{"evaluate.published_top1": published})
    least = published - allowed(published, num_images)
    assert check(least + 1e-6, num_images, known).problem is None
    assert check(published, num_images, known).problem is None
    if least - beyond >= 0:
        assert check(least - beyond, num_images, known).problem is not None


def test_a_figure_above_the_published_one_is_no_problem() -> None:
    found = check(100.0, VAL_IMAGES, recipe())
    assert (found.problem, found.sentence) == (None, "")


def test_few_images_are_given_more_room_than_many() -> None:
    assert check(70.0, 100, recipe()).problem is None
    assert check(70.0, VAL_IMAGES, recipe()).problem is not None


@pytest.mark.parametrize("published", ["auto", "unknown"])
def test_without_a_figure_there_is_nothing_to_say(published: str) -> None:
    found = check(0.0, VAL_IMAGES, recipe(**{"evaluate.published_top1": published}))
    assert (found.problem, found.sentence) == (None, "")


@pytest.mark.parametrize("published", ["auto", PUBLISHED])
def test_a_new_head_is_no_problem_and_the_log_says_that_nothing_was_compared(published: str | float) -> None:
    found = check(0.1, VAL_IMAGES, recipe(**{"model.head": "replace", "evaluate.published_top1": published}))
    assert found.problem is None
    assert "head is a new one" in found.sentence


# What is said


def test_the_message_names_both_figures_the_number_of_images_and_how_to_go_on_all_the_same() -> None:
    message = problem(70.0)
    for said in ("76.13 %", "70.00 %", "50,000 images", "`evaluate.preflight=warn`"):
        assert said in message
    assert config.replace(recipe(), **{"evaluate.preflight": "warn"}).evaluate.preflight == "warn"


@pytest.mark.parametrize(
    ("top1", "cause"),
    [
        (0.0, "another order"),
        (0.1, "another order"),
        (0.4, "another order"),
        (30.0, "class folders"),
        (60.0, "class folders"),
        (62.0, "`data.resize_size`"),
        (74.0, "`data.resize_size`"),
    ],
)
def test_the_likely_cause_is_told_by_how_far_below_it_is(top1: float, cause: str) -> None:
    message = problem(top1)
    assert [said for said in ("another order", "class folders", "`data.resize_size`") if said in message] == [cause]


@pytest.mark.parametrize(("num_classes", "top1"), [(2, 88.0), (2, 75.0), (10, 45.0), (10, 90.0)])
def test_what_is_far_above_chance_is_not_called_near_it_however_few_the_classes(num_classes: int, top1: float) -> None:
    fields = {"model.num_classes": num_classes, "evaluate.published_top1": 97.0}
    assert "near chance" not in problem(top1, **fields)


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_what_is_at_chance_is_called_near_it(num_classes: int) -> None:
    fields = {"model.num_classes": num_classes, "evaluate.published_top1": 97.0}
    assert "near chance" in problem(100 / num_classes, **fields)


@pytest.mark.parametrize("preflight", ["stop", "warn"])
def test_whether_to_stop_is_the_callers_matter(preflight: str) -> None:
    found = check(50.0, VAL_IMAGES, recipe(**{"evaluate.preflight": preflight}))
    assert found.problem is not None
    assert found.problem.exit_code == ExitCode.BAD_DATA == 65


# ImageNet is what it says it is


def index(num_images: int, num_classes: int) -> Index:
    rows = pa.table({field.name: pa.nulls(num_images, field.type) for field in SCHEMA}, schema=SCHEMA)
    return Index("/data", tuple(f"n{i:08d}" for i in range(num_classes)), (), rows, digest="")


TRAIN, VAL = (1_281_167, 1000), (50_000, 1000)


def test_imagenet_as_it_is_passes() -> None:
    assert checks._check_imagenet(index(*TRAIN), index(*VAL)) is None


@pytest.mark.parametrize(
    ("train", "val", "named"),
    [
        ((1_281_166, 1000), VAL, "`data.train` must be ILSVRC 2012's 1,281,167 images of 1,000 classes"),
        ((1_281_167, 999), VAL, "has 1,281,167 of 999"),
        (TRAIN, (49_999, 1000), "`data.val` must be ILSVRC 2012's 50,000 images of 1,000 classes"),
        (TRAIN, (50_000, 1001), "has 50,000 of 1,001"),
        (VAL, TRAIN, "`data.train`"),
    ],
    ids=["an-image-short", "a-class-short", "a-val-image-short", "a-val-class-more", "swapped"],
)
def test_imagenet_with_anything_missing_is_refused_with_what_to_do(
    train: tuple[int, int], val: tuple[int, int], named: str
) -> None:
    with pytest.raises(DataError, match=r"Complete it, or set `data\.kind=other`") as caught:
        checks._check_imagenet(index(*train), index(*val))
    assert named in str(caught.value)
