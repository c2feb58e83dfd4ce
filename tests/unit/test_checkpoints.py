"""Which checkpoints stay, and how often one is due."""

import math
from typing import Any

import pytest

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.training.checkpoints import Pace, kept
from tests.support import JOBS


def recipe(**checkpoint: Any) -> Recipe:
    return config.replace(
        config.load(JOBS / "digits.yaml"), **{f"checkpoint.{name}": value for name, value in checkpoint.items()}
    )


NAMES = [f"checkpoints/{position:012d}" for position in (100, 130, 200, 250, 260, 290)]


@pytest.mark.parametrize(
    ("last", "ends", "stay"),
    [
        (2, "all", [100, 200, 260, 290]),
        (1, "all", [100, 200, 290]),
        (1, 1, [200, 290]),
        (3, 0, [250, 260, 290]),
        (1, 0, [290]),
        (9, 0, [100, 130, 200, 250, 260, 290]),
    ],
)
def test_the_last_ones_stay_and_those_of_epochs_ends(last: int, ends: Any, stay: list[int]) -> None:
    found = kept(NAMES, recipe(keep_last=last, keep_epochs=ends), num_train=100)
    assert sorted(int(name.rpartition("/")[2]) for name in found) == stay


@pytest.mark.parametrize("wait", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("hours", [0.5, 6.0, 1000.0])
def test_the_automatic_interval_is_youngs_within_what_it_may_cost(wait: float, hours: float) -> None:
    pace = Pace(recipe(mean_hours_between_failures=hours))
    pace.waited(wait)
    pace.wrote(2.0)
    young = math.sqrt(2 * wait * hours * 3600)
    assert pace.interval_seconds == pytest.approx(max(young, 200 * wait, 20.0, 10.0))
    assert wait / pace.interval_seconds <= 0.01 / 2


def test_of_epochs_alone_none_is_due_within_one_and_a_given_interval_is_kept() -> None:
    assert not Pace(recipe(interval_seconds="epoch")).due
    assert Pace(recipe(interval_seconds="epoch")).interval_seconds == math.inf
    pace = Pace(recipe(interval_seconds=45.0))
    pace.waited(30.0)
    assert pace.interval_seconds == 45.0


def test_one_that_failed_is_due_again_before_its_time() -> None:
    pace = Pace(recipe(interval_seconds=3600.0))
    pace.waited(0.1)
    assert not pace.due
    pace.failed()
    pace._retry_at -= 60
    assert pace.due
    pace.waited(0.1)
    assert not pace.due
