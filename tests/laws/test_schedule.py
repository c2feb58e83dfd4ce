"""The learning rate is a function of the position, exact at the ends of cycles."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data.order import batches_of
from swa_dist.method.schedule import Constant, Cosine, Cyclical, Linear, Schedule, WarmUp, crosses
from swa_dist.training.train import learning_rate

RECIPE = config.from_tree(
    {
        "name": "laws",
        "model": {"arch": "resnet18", "weights": "start.safetensors"},
        "data": {"name": "images", "train": "train", "val": "val", "global_batch": 64, "group_images": 16},
        "optim": {"epochs": 4},
        "schedule": {"name": "cyclical", "max_lr": 0.5, "min_lr": 0.01},
        "registry": {"model": "laws"},
    }
)

SCHEDULES: list[dict[str, Any]] = [
    {"name": "cyclical", "max_lr": 0.5, "min_lr": 0.01, "cycle_epochs": 0.5},
    {"name": "cyclical", "max_lr": 0.5, "min_lr": 0.01, "cycle_epochs": 2, "warmup_epochs": 0.3},
    {"name": "constant", "lr": 0.1},
    {"name": "constant", "lr": 0.1, "start_lr": 0.4, "ramp_epochs": 1.7},
    {"name": "constant", "lr": 0.1, "start_lr": 0.01, "ramp_epochs": 4, "warmup_epochs": 2},
    {"name": "cosine", "max_lr": 0.5, "min_lr": 0.01},
    {"name": "linear", "max_lr": 0.5, "warmup_epochs": 1},
]


def with_schedule(schedule: dict[str, Any], **fields: Any) -> Recipe:
    return config.replace(RECIPE, schedule=schedule, **fields)


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


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 3), st.integers(1, 9))
def test_several_cycles_an_epoch_each_end_in_one_step_at_exactly_the_lowest_rate(
    images: int, batch: int, epochs: int, cycles_per_epoch: int
) -> None:
    """Their ends are inside batches, and inside images."""
    assume(images >= cycles_per_epoch * batch)  # else a step would end two cycles
    schedule = Cyclical(1e-3, 1e-5, cycle_images=Fraction(images, cycles_per_epoch))
    run = steps(images, batch, epochs)
    lowest = [step for step in run if schedule.rate(*step) == 1e-5]
    assert len(lowest) == epochs * cycles_per_epoch
    assert lowest == [step for step in run if crosses(*step, Fraction(images, cycles_per_epoch))]
    for number, (start, stop) in enumerate(lowest, start=1):
        assert start * cycles_per_epoch < number * images <= stop * cycles_per_epoch


@pytest.mark.parametrize(("written", "cycles"), [(0.333333, 3), (1 / 3, 3), (1.4285714, 0.7), (0.166667, 6)])
@pytest.mark.parametrize("num_train", [1_281_167, 1000, 400])
def test_a_cycle_written_as_a_rounded_fraction_ends_with_its_epoch(
    num_train: int, written: float, cycles: float
) -> None:
    """A length that was off by its rounding would end the last cycle after the last image: it would have no end."""
    epochs, batch = 10, 32
    cyclical = {"name": "cyclical", "max_lr": 1e-3, "min_lr": 1e-5, "cycle_epochs": written}
    recipe = with_schedule(cyclical, **{"optim.epochs": epochs})
    schedule = learning_rate(recipe, num_train)
    run = steps(num_train, batch, epochs) if num_train <= 1000 else [(epochs * num_train - 31, epochs * num_train)]
    lowest = [step for step in run if schedule.rate(*step) == 1e-5]
    assert lowest[-1] == run[-1]
    assert len(lowest) == (round(epochs * cycles) if num_train <= 1000 else 1)


@given(st.integers(1, 400), st.integers(1, 64), st.floats(1e-4, 1), st.floats(1e-4, 1), st.integers(1, 1600))
def test_a_ramp_is_that_of_the_authors_code(images: int, batch: int, start_lr: float, lr: float, ramp: int) -> None:
    """timgaripov/swa, train.py: `schedule(epoch)` with t = epoch / swa_start."""

    def theirs(t: float) -> float:
        lr_ratio = lr / start_lr
        if t <= 0.5:
            factor = 1.0
        elif t <= 0.9:
            factor = 1.0 - (1.0 - lr_ratio) * (t - 0.5) / 0.4
        else:
            factor = lr_ratio
        return start_lr * factor

    schedule = Constant(lr, start_lr, Fraction(ramp))
    for start, stop in steps(images, batch, 4):
        assert schedule.rate(start, stop) == pytest.approx(theirs(stop / ramp), rel=1e-9)
        if stop / ramp <= 0.5:
            assert schedule.rate(start, stop) == start_lr
        if stop / ramp >= 0.9:
            assert schedule.rate(start, stop) == lr


def test_a_ramp_in_a_recipe_is_so_many_epochs_long_and_starts_at_the_rate_that_is_named() -> None:
    schedule = learning_rate(
        with_schedule({"name": "constant", "lr": 0.1, "start_lr": 0.4, "ramp_epochs": 2}), num_train=1000
    )
    at = {1: 0.4, 1000: 0.4, 1400: 0.25, 1800: 0.1, 4000: 0.1}
    assert {stop: schedule.rate(stop - 1, stop) for stop in at} == pytest.approx(at, rel=1e-12)


@pytest.mark.parametrize("ramp_epochs", [0.0, 2.0])
def test_a_constant_rate_that_starts_at_the_same_rate_is_constant(ramp_epochs: float) -> None:
    schedule = learning_rate(with_schedule({"name": "constant", "lr": 0.1, "ramp_epochs": ramp_epochs}), num_train=100)
    assert all(schedule.rate(*step) == pytest.approx(0.1, rel=1e-15) for step in steps(100, 7, 4))


@pytest.mark.parametrize("kind", [Linear, Cosine])
@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 4), st.floats(1e-3, 1), st.floats(0, 1))
def test_a_falling_schedule_ends_exactly_at_its_floor_and_never_rises(
    kind: type[Linear] | type[Cosine], images: int, batch: int, epochs: int, max_lr: float, share: float
) -> None:
    min_lr = share * max_lr
    schedule = kind(max_lr, min_lr, run_images=epochs * images)
    rates = [schedule.rate(*step) for step in steps(images, batch, epochs)]
    assert rates[-1] == min_lr
    allowed = 1e-15 * max_lr  # of rounding
    assert all(later <= earlier + allowed for earlier, later in pairwise(rates))
    assert all(min_lr - allowed <= rate <= max_lr + allowed for rate in rates)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_a_falling_schedule_starts_at_its_highest_rate_and_is_half_way_down_in_the_middle(
    kind: type[Linear] | type[Cosine],
) -> None:
    schedule = kind(0.5, 0.1, run_images=1_000_000)
    assert schedule.rate(0, 1) == pytest.approx(0.5, rel=1e-5)
    assert schedule.rate(499_999, 500_000) == pytest.approx(0.3, rel=1e-9)


def test_a_cosine_is_flatter_than_a_line_at_both_ends() -> None:
    line, cosine = Linear(1.0, 0.0, run_images=1000), Cosine(1.0, 0.0, run_images=1000)
    assert cosine.rate(0, 100) == pytest.approx((1 + math.cos(0.1 * math.pi)) / 2)
    assert cosine.rate(0, 100) > line.rate(0, 100)
    assert cosine.rate(800, 900) < line.rate(800, 900)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: "-".join(map(str, one.values())))
@given(st.integers(1, 2048), st.integers(100, 500))
def test_rates_scale_with_the_batch_or_its_root_or_not_at_all(
    schedule: dict[str, Any], batch: int, num_train: int
) -> None:
    batch = max(2, batch)
    fields: dict[str, Any] = {"data.global_batch": batch, "data.group_images": 2}
    by_rule = {
        rule: learning_rate(with_schedule(schedule, **fields | {"optim.scale_lr": rule}), num_train)
        for rule in ("none", "linear", "sqrt")
    }
    paper = learning_rate(with_schedule(schedule), num_train)  # at 64: `none` is the default
    for step in [(0, 50), (90, 100), (100, 137), (4 * num_train - 3, 4 * num_train)]:
        rate = paper.rate(*step)
        assert by_rule["none"].rate(*step) == rate
        assert by_rule["linear"].rate(*step) == pytest.approx(rate * batch / 256, rel=1e-12)
        assert by_rule["sqrt"].rate(*step) == pytest.approx(rate * math.sqrt(batch / 256), rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: "-".join(map(str, one.values())))
@given(st.data())
def test_a_rate_is_the_same_whatever_was_asked_before(schedule: dict[str, Any], data: st.DataObject) -> None:
    """A run that is resumed anywhere, and by another process, has the rates of an undisturbed one."""
    num_train = data.draw(st.integers(60, 400))
    batch = data.draw(st.integers(1, 30))
    run = steps(num_train, batch, 4)
    undisturbed = learning_rate(with_schedule(schedule), num_train)
    in_order = {step: undisturbed.rate(*step) for step in run}
    for step in data.draw(st.permutations(run)):
        assert learning_rate(with_schedule(schedule), num_train).rate(*step) == in_order[step]
        assert undisturbed.rate(*step) == in_order[step]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: "-".join(map(str, one.values())))
@given(st.integers(60, 400), st.integers(1, 30), st.sampled_from([0.1, 0.5, 1.0, 4.0]))
def test_a_warm_up_scales_from_zero_over_its_epochs_and_then_leaves_the_rate_alone(
    schedule: dict[str, Any], num_train: int, batch: int, warmup: float
) -> None:
    warm = learning_rate(with_schedule(schedule | {"warmup_epochs": warmup}), num_train)
    cold = learning_rate(with_schedule(schedule | {"warmup_epochs": 0.0}), num_train)
    for start, stop in steps(num_train, batch, 4):
        if Fraction(stop) >= Fraction(warmup) * num_train:
            assert warm.rate(start, stop) == cold.rate(start, stop)
        else:
            share = stop / (warmup * num_train)
            assert warm.rate(start, stop) == pytest.approx(cold.rate(start, stop) * share, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: "-".join(map(str, one.values())))
@given(st.integers(2, 400), st.integers(1, 64))
def test_every_rate_of_a_run_is_a_finite_number_that_is_not_negative(
    schedule: dict[str, Any], num_train: int, batch: int
) -> None:
    plan: Schedule = learning_rate(with_schedule(schedule), num_train)
    assert all(0 <= plan.rate(*step) < math.inf for step in steps(num_train, batch, 4))


def test_warm_up_scales_from_zero_and_then_leaves_the_rate_alone() -> None:
    schedule = WarmUp(Constant(0.2), warmup_images=100)
    assert [schedule.rate(p, p + 25) for p in (0, 25, 50, 75, 100)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    assert schedule.rate(500, 525) == 0.2
