"""An average is the mean of its iterates, however it was gathered."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from swa_dist.errors import NumericsError
from swa_dist.method.averaging import WeightAverage

EPS = np.finfo(np.float32).eps
TINY = np.finfo(np.float32).smallest_normal  # below it float32's spacing is the same everywhere


def network(values: np.ndarray) -> nn.Module:
    """A module whose parameters and buffers are these numbers."""
    module = nn.Module()
    module.layer = nn.Linear(len(values), 1)
    module.norm = nn.BatchNorm1d(1)
    with torch.no_grad():
        module.layer.weight.copy_(torch.from_numpy(values.astype(np.float32))[None])
        module.layer.bias.zero_()
    return module


iterates = st.integers(1, 16).flatmap(
    lambda n: st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5).map(np.array), min_size=n, max_size=n
    )
)


def averaged(values: list[np.ndarray], first_id: int = 0) -> WeightAverage:
    average = WeightAverage()
    for number, value in enumerate(values, start=first_id):
        average.collect(network(value), number)
    return average


def errors(average: WeightAverage, values: list[np.ndarray]) -> np.ndarray:
    """Distance of each element from the float64 mean, in eps(float32) of the largest iterate or of `TINY`."""
    exact = np.mean(np.array(values, dtype=np.float64), axis=0)
    scale = np.maximum(np.abs(values).max(axis=0), TINY) * EPS
    mean = average.mean()["layer.weight"].numpy()[0].astype(np.float64)
    return np.abs(mean - exact) / scale


@given(iterates)
def test_mean_is_within_4_eps_of_the_float64_mean(values: list[np.ndarray]) -> None:
    assert errors(averaged(values), values).max() <= 4


def test_the_mean_of_numbers_below_float32s_normal_range_is_within_its_spacing_there() -> None:
    values = [np.zeros(5), np.full(5, 2.0**-149)]
    assert errors(averaged(values), values).max() <= 1


@given(iterates, st.data())
def test_merged_parts_are_the_whole(values: list[np.ndarray], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values)))
    first, second = averaged(values[:cut]), averaged(values[cut:], first_id=cut)
    first.merge(second)
    assert first.count == len(values)
    assert sorted(first.ids) == list(range(len(values)))
    assert errors(first, values).max() <= 4


def test_mean_agrees_with_torch_within_twice_the_bound() -> None:
    generator = np.random.default_rng(3)
    values = [0.05 + 1e-3 * generator.standard_normal(1000) for _ in range(16)]
    peer = AveragedModel(network(values[0]))
    for value in values:
        peer.update_parameters(network(value))
    ours = averaged(values).mean()["layer.weight"].numpy()[0]
    theirs = peer.module.layer.weight.detach().numpy()[0]
    assert (np.abs(ours.astype(np.float64) - theirs) / (np.abs(values).max(axis=0) * EPS)).max() <= 8


def test_sixteen_equal_iterates_are_their_mean_bit_for_bit() -> None:
    value = np.random.default_rng(0).standard_normal(1000)
    assert np.array_equal(averaged([value] * 16).mean()["layer.weight"].numpy()[0], value.astype(np.float32))


def test_an_iterate_is_counted_once() -> None:
    average = averaged([np.ones(3), np.zeros(3)])
    before = average.mean()
    with pytest.raises(NumericsError, match="1 is in already"):
        average.collect(network(np.full(3, 9.0)), 1)
    with pytest.raises(NumericsError, match="0 is in already"):
        average.merge(averaged([np.full(3, 9.0)]))
    assert average.count == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in average.mean().items())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    average = averaged([np.ones(3)])
    before = average.mean()
    with pytest.raises(NumericsError, match=r"`layer\.weight` of iterate 7"):
        average.collect(network(np.array([1.0, bad, 1.0])), 7)
    assert average.ids == [0]
    assert all(torch.equal(before[name], tensor) for name, tensor in average.mean().items())


def test_half_precision_weights_are_averaged_in_float32() -> None:
    values = [0.05 + 1e-3 * np.random.default_rng(i).standard_normal(100) for i in range(10)]
    halves = [network(v).half() for v in values]
    average = WeightAverage()
    for number, half in enumerate(halves):
        average.collect(half, number)
    mean = average.mean()["layer.weight"]
    assert mean.dtype == torch.float32
    exact = np.mean([h.layer.weight.detach().double().numpy() for h in halves], axis=0)
    assert np.abs(mean.numpy() - exact).max() <= 4 * EPS * 0.06


def test_a_saved_average_goes_on_bit_for_bit() -> None:
    values = [np.random.default_rng(i).standard_normal(100) for i in range(8)]
    straight = averaged(values)
    restored = WeightAverage()
    restored.load_state_dict(averaged(values[:5]).state_dict())
    for number, value in enumerate(values[5:], start=5):
        restored.collect(network(value), number)
    assert restored.ids == straight.ids
    assert all(torch.equal(restored.mean()[name], tensor) for name, tensor in straight.mean().items())


def test_the_average_does_not_follow_the_model_it_was_taken_from() -> None:
    model, average = network(np.ones(3)), WeightAverage()
    average.collect(model, 0)
    before = average.mean()
    with torch.no_grad():
        model.layer.weight.add_(1)
        model.norm.running_mean.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in average.mean().items())


def test_buffers_are_the_latest_iterates_and_complete_the_state_dict() -> None:
    first, second = network(np.zeros(3)), network(np.ones(3))
    second.norm.num_batches_tracked.fill_(5)
    average = WeightAverage()
    average.collect(first, 0)
    average.collect(second, 1)
    network(np.zeros(3)).load_state_dict(average.mean())
    assert average.mean()["norm.num_batches_tracked"] == 5


def test_other_parameters_are_refused_by_name() -> None:
    average = averaged([np.ones(3)])
    with pytest.raises(ValueError, match=r"layer\.weight"):
        average.collect(network(np.ones(4)), 1)
    with pytest.raises(ValueError, match="in only one of them"):
        average.collect(nn.Linear(3, 1), 1)
