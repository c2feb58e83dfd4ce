"""The picture of a run shows what its rows say, whatever they lack."""

import io
import math

import pytest
from matplotlib.image import imread

from swa_dist.service import curves

TOP1 = {"start": 91.2, "last": 97.3, "swa": 97.9}


def rows(count, lr=0.05):
    steps = [
        {"epoch": n / 10, "metrics": {"train/loss": math.exp(-n / 10), "train/lr": lr / n}} for n in range(1, count)
    ]
    return steps + [{"epoch": n / 10, "metrics": {"epoch/loss": 0.5}} for n in range(10, count, 10)]


def pixels(*args):
    return imread(io.BytesIO(curves.draw(*args)), format="png")


def test_the_same_rows_give_the_same_bytes_and_others_do_not():
    first = curves.draw("digits", rows(50), TOP1)
    assert curves.draw("digits", rows(50), TOP1) == first
    others = [("digits", rows(50, lr=0.01), TOP1), ("digits", rows(50), TOP1 | {"swa": 97.8}), ("x", rows(50), TOP1)]
    assert len({first, *(curves.draw(*other) for other in others)}) == 4


@pytest.mark.parametrize(
    ("given", "top1"),
    [
        ([], TOP1),
        (rows(3), TOP1),
        (rows(50), {"start": 50.0}),
        (rows(50), dict.fromkeys(("start", "last", "swa"), 97.5)),
    ],
    ids=["nothing-logged", "no-epoch", "start-alone", "all-the-same"],
)
def test_whatever_a_run_lacks_there_is_a_picture_of_the_same_size(given, top1):
    found = pixels("digits: resnet18", given, top1)
    assert found.shape[:2] == (990, 880)
    assert found[..., :3].min() < 0.1  # and something is on it
