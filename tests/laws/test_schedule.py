"""The learning rate is a function of the position, exact at the ends of cycles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_dist.data.order import batches_of
from swa_dist.method.schedule import Constant, Cyclical, WarmUp, crosses


def steps(num_images: int, global_batch: int, epochs: int) -> list[tuple[int, int]]:
    return [
        (epoch * num_images + span.start, epoch * num_images + span.stop)
        for epoch in range(epochs)
        for span in batches_of(num_images, global_batch)
    ]


@given(st.integers(2, 400), st.integers(2, 64), st.integers(1, 3), st.integers(1, 3))
def test_the_last_step_of_a_cycle_has_exactly_the_lowest_rate(images: int, batch: int, cycle: int, cycles: int) -> None:
    schedule = Cyclical(1e-3, 1e-5, cycle_images=cycle * images)
    rates = [(schedule.rate(*step), crosses(*step, cycle * images)) for step in steps(images, batch, cycle * cycles)]
    assert sum(at_end for _, at_end in rates) == cycles
    assert rates[-1][1]
    assert all((rate == 1e-5) == at_end for rate, at_end in rates)
    assert all(1e-5 <= rate < 1e-3 for rate, _ in rates)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4))
def test_cycles_of_whole_batches_follow_the_papers_formula(steps_per_cycle: int, batch: int, cycles: int) -> None:
    schedule = Cyclical(0.5, 0.125, cycle_images=steps_per_cycle * batch)
    for i in range(1, cycles * steps_per_cycle + 1):
        t = ((i - 1) % steps_per_cycle + 1) / steps_per_cycle
        assert schedule.rate((i - 1) * batch, i * batch) == pytest.approx((1 - t) * 0.5 + t * 0.125, rel=1e-12)


def test_a_boundary_inside_a_batch_belongs_to_the_step_that_crosses_it() -> None:
    schedule = Cyclical(1.0, 0.1, cycle_images=10)
    at = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    assert [schedule.rate(*step) for step in at] == pytest.approx([0.64, 0.28, 0.1, 0.46, 0.1])
    assert [crosses(*step, 10) for step in at] == [False, False, True, False, True]


def test_warm_up_scales_from_zero_and_then_leaves_the_rate_alone() -> None:
    schedule = WarmUp(Constant(0.2), warmup_images=100)
    assert [schedule.rate(p, p + 25) for p in (0, 25, 50, 75, 100)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    assert schedule.rate(500, 525) == 0.2
