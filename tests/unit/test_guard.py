"""The guard of steps, by itself: what it refuses, what it remembers, what it takes along."""

import math

import pytest
import torch

from swa_dist.config import Guard as Plan
from swa_dist.training.guard import Guard, length_of


def judged(guard: Guard, start: int, length: float, loss: float = 1.0) -> str | None:
    """Of a gradient of two tensors that is so long."""
    gradients = [torch.tensor([0.6 * length]), torch.tensor([0.0, 0.8 * length])]
    return guard.refuses(start, float(length_of(torch.tensor(loss, dtype=torch.float64), gradients)))


@pytest.mark.parametrize(
    ("length", "loss"), [(math.nan, 1), (math.inf, 1), (1, math.nan), (1, math.inf), (1, -math.inf)]
)
def test_what_is_not_finite_is_refused_from_the_first_step_on(length: float, loss: float) -> None:
    guard = Guard(Plan(spike_factor="off"))
    assert judged(guard, 7, length, loss) == "the loss or the gradient is not finite"
    assert guard.skipped == [7]


def test_a_spike_is_refused_once_there_is_something_to_compare_it_with() -> None:
    guard = Guard(Plan(spike_factor=100.0))
    assert judged(guard, 0, 1e6) is None  # the first of all
    for step in range(1, 8):
        assert judged(guard, step, 1.0 + step / 10) is None
    assert judged(guard, 8, 99.0) is None
    assert "times as long as usual" in str(judged(guard, 9, 1e4))
    assert guard.skipped == [9]


def test_what_was_refused_is_no_measure_of_what_is_usual() -> None:
    guard = Guard(Plan(spike_factor=100.0, max_skips_in_a_row=1000))
    for step in range(8):
        judged(guard, step, 1.0)
    for step in range(8, 100):
        assert judged(guard, step, 1e4) is not None
    assert judged(guard, 100, 1.0) is None


def test_only_so_many_in_a_row_are_too_many() -> None:
    guard = Guard(Plan(max_skips_in_a_row=3))
    for step, length in enumerate((math.nan, math.nan, 1.0, math.nan, math.nan)):
        judged(guard, step, length)
        assert not guard.exhausted
    judged(guard, 5, math.nan)
    assert guard.exhausted


def test_a_restored_one_decides_as_the_first_would_have() -> None:
    lengths = [1.0, 2.0, math.nan, 3.0, 1.0, 1.0, 2.0, 2.0, 1e9, 1.0, 1e9, 4.0]
    plan = Plan(spike_factor=1000.0, max_skips_in_a_row=2)
    whole = Guard(plan)
    wanted = [judged(whole, step, length) for step, length in enumerate(lengths)]
    for cut in range(len(lengths)):
        first, second = Guard(plan), Guard(plan)
        found = [judged(first, step, lengths[step]) for step in range(cut)]
        second.restore(first.facts())
        found += [judged(second, step, lengths[step]) for step in range(cut, len(lengths))]
        assert found == wanted
        assert second.facts() == whole.facts()
