"""Moments are those of the concatenated data, for any split into batches and workers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swa_dist.method.moments import Moments

CHANNELS = 3


@st.composite
def batches(draw: st.DrawFn) -> list[torch.Tensor]:
    """Batches of any size, empty ones too, with means from far below to a thousand times above their spread."""
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    offset, scale = draw(st.sampled_from([(0, 1), (1e3, 1), (-50, 1e-2), (0, 1e4)]))
    return [offset + scale * torch.randn(size, CHANNELS, 2, 2, generator=generator) for size in sizes]


def check(moments: Moments, parts: list[torch.Tensor]) -> None:
    x = torch.cat(parts).double().movedim(1, 0).flatten(1)
    assert moments.count == x.shape[1]
    if x.shape[1]:
        deviation = x.std(1, correction=0)
        assert ((moments.mean - x.mean(1)).abs() <= 1e-9 * deviation + 1e-12 * x.mean(1).abs()).all()
        torch.testing.assert_close(moments.variance, x.var(1, correction=0), rtol=1e-9, atol=1e-300)


@given(batches())
def test_any_split_into_batches(parts: list[torch.Tensor]) -> None:
    moments = Moments(CHANNELS)
    for part in parts:
        moments.observe(part)
    check(moments, parts)


@given(batches(), st.integers(1, 4))
def test_any_split_into_workers(parts: list[torch.Tensor], size: int) -> None:
    workers = [Moments(CHANNELS) for _ in range(size)]
    for i, part in enumerate(parts):
        workers[i % size].observe(part)
    pooled = Moments(CHANNELS)
    for worker in workers:
        pooled.merge(Moments.of(worker.values))
    check(pooled, parts)


def test_no_data_is_no_mean_and_no_variance() -> None:
    moments = Moments(CHANNELS)
    moments.merge(Moments(CHANNELS))
    moments.observe(torch.empty(0, CHANNELS, 4))
    assert moments.count == 0
    assert moments.variance.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_activations_are_summed_in_float64(dtype: torch.dtype) -> None:
    x = (100 + torch.randn(64, CHANNELS, 8, 8)).to(dtype)
    moments = Moments(CHANNELS)
    moments.observe(x)
    np.testing.assert_allclose(moments.variance, x.double().var((0, 2, 3), correction=0), rtol=1e-9)


def test_the_mean_of_batch_variances_is_another_number() -> None:
    noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    parts = [noise, 5 + noise]
    moments = Moments(1)
    for part in parts:
        moments.observe(part)
    assert moments.variance.item() > 3 * float(np.mean([part.var().item() for part in parts]))
