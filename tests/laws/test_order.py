"""Order, groups and crops are functions of (seed, epoch, position) alone, and all images come once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from swa_dist.data import order
from swa_dist.data.order import Span, Stream

AREA, RATIO = (0.08, 1.0), (0.75, 4 / 3)


def crops_at(span: Span, height: int = 300, width: int = 400, seed: int = 0, epoch: int = 0) -> order.Crops:
    n = span.stop - span.start
    return order.crops(
        seed, Stream.TRAIN, epoch, span, np.full(n, height), np.full(n, width), area=AREA, ratio=RATIO, flip=True
    )


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 64), st.integers(1, 5))
def test_all_workers_together_run_each_group_once(images: int, batch: int, group: int, workers: int) -> None:
    for span in order.batches_of(images, batch):
        groups = order.groups_of(span, group)
        dealt = [g for rank in range(workers) for g in order.deal(groups, rank, workers)]
        assert sorted((g.start, g.stop) for g in dealt) == [(g.start, g.stop) for g in groups]
    positions = [p for span in order.batches_of(images, batch) for p in range(span.start, span.stop)]
    assert positions == list(range(images))


@given(st.integers(0, 2**63 - 1), st.integers(0, 100), st.integers(1, 500))
def test_an_epoch_is_every_image_once(seed: int, epoch: int, images: int) -> None:
    assert sorted(order.order(seed, Stream.TRAIN, epoch, images)) == list(range(images))


def test_seeds_epochs_and_streams_have_orders_of_their_own() -> None:
    keys = [(s, stream, e) for s in (0, 1) for stream in Stream for e in (0, 1)]
    orders = {tuple(order.order(s, stream, e, 100)) for s, stream, e in keys}
    assert len(orders) == len(keys)


@given(st.integers(0, 900), st.integers(1, 64))
def test_a_crop_depends_on_its_position_alone(start: int, count: int) -> None:
    whole, part = crops_at(Span(0, 1000)), crops_at(Span(start, start + count))
    for field in ("top", "left", "height", "width", "flip"):
        assert np.array_equal(getattr(whole, field)[start : start + count], getattr(part, field))


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_crops_lie_inside_the_image(height: int, width: int) -> None:
    crops = crops_at(Span(0, 50), height, width)
    assert (crops.height >= 1).all()
    assert (crops.width >= 1).all()
    assert (crops.top >= 0).all()
    assert (crops.left >= 0).all()
    assert (crops.top + crops.height <= height).all()
    assert (crops.left + crops.width <= width).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (32, 32), (100, 900)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    n = 4000
    ours = crops_at(Span(0, n), height, width, seed=7)
    torch.manual_seed(7)
    image = torch.empty(3, height, width)
    peer = np.array([RandomResizedCrop.get_params(image, list(AREA), list(RATIO)) for _ in range(n)])
    top, left, h, w = peer.T
    for mine, theirs in [
        (ours.height * ours.width, h * w),
        (ours.width / ours.height, w / h),
        (ours.top, top),
        (ours.left, left),
    ]:
        assert stats.ks_2samp(mine, theirs).pvalue > 1e-3
    assert stats.binomtest(int(ours.flip.sum()), n).pvalue > 1e-3


def test_crops_of_an_order_are_pinned() -> None:
    """A change here changes every run: bump config.NUMERICS_VERSION with it."""
    crops = crops_at(Span(0, 3), seed=42, epoch=3)
    assert order.order(42, Stream.TRAIN, 3, 8).tolist() == PINNED_ORDER
    assert [crops.top.tolist(), crops.left.tolist(), crops.height.tolist(), crops.width.tolist()] == PINNED_CROPS


PINNED_ORDER = [0, 1, 7, 2, 5, 3, 4, 6]
PINNED_CROPS = [[101, 7, 105], [262, 12, 99], [113, 260, 110], [109, 213, 126]]


# Orders by shards


def shards_of(images: int, shards: int, seed: int) -> order.Ints:
    """Which shard each image is in; some shards may have none."""
    return np.random.default_rng(seed).integers(0, shards, images)


SHARDED = (st.integers(0, 400), st.integers(1, 40), st.integers(1, 50), st.integers(0, 1000))


@given(*SHARDED)
def test_an_epoch_by_shards_is_every_image_once(images: int, shards: int, window: int, seed: int) -> None:
    found = order.order_by_shards(seed, Stream.TRAIN, 1, shards_of(images, shards, seed), window)
    assert sorted(found) == list(range(images))


@given(*SHARDED)
def test_an_epoch_by_shards_finishes_with_each_window_before_the_next(
    images: int, shards: int, window: int, seed: int
) -> None:
    """At any position the shards that are begun and not done with are at most a window."""
    numbers = shards_of(images, shards, seed)
    sequence = numbers[order.order_by_shards(seed, Stream.TRAIN, 0, numbers, window)]
    begins = {s: p for p, s in reversed(list(enumerate(sequence.tolist())))}
    ends = {s: p for p, s in enumerate(sequence.tolist())}
    for begin in begins.values():
        assert sum(begins[s] <= begin <= ends[s] for s in begins) <= window


def test_a_window_of_all_shards_mixes_all_of_them_and_one_of_one_none() -> None:
    numbers = np.repeat(np.arange(8), 50)
    whole = numbers[order.order_by_shards(0, Stream.TRAIN, 0, numbers, 8)]
    assert len(set(whole[:50].tolist())) == 8
    single = numbers[order.order_by_shards(0, Stream.TRAIN, 0, numbers, 1)]
    assert (np.diff(single) != 0).sum() == 7


def test_seeds_and_epochs_by_shards_have_orders_of_their_own_of_shards_and_images() -> None:
    numbers = np.repeat(np.arange(20), 5)
    keys = [(s, e) for s in (0, 1, 2) for e in (0, 1, 2)]
    orders = [order.order_by_shards(s, Stream.TRAIN, e, numbers, 4) for s, e in keys]
    assert len({tuple(o) for o in orders}) == len({tuple(sorted(set(numbers[o[:20]]))) for o in orders}) == len(keys)


@pytest.mark.parametrize("window", [1, 4])
def test_batches_of_shards_that_are_random_samples_have_classes_as_in_a_full_shuffle(window: int) -> None:
    """As `data shard` writes them: the images of a batch are a random sample, whatever the window."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(10), 400))  # in the order of the shards
    numbers = np.repeat(np.arange(40), 100)
    seen = np.zeros((2, 51), dtype=np.int64)
    for epoch in range(20):
        by_shards = order.order_by_shards(7, Stream.TRAIN, epoch, numbers, window)
        shuffled = order.order(8, Stream.TRAIN, epoch, len(labels))
        for row, found in enumerate((by_shards, shuffled)):
            counts = np.stack([np.bincount(labels[batch], minlength=10) for batch in found.reshape(-1, 50)])
            seen[row] += np.bincount(counts[:, 0], minlength=51)
    common = seen[:, seen.min(axis=0) >= 5]
    assert stats.chi2_contingency(common).pvalue > 1e-3


def test_the_order_by_shards_is_pinned() -> None:
    """A change here changes every run from shards: bump config.NUMERICS_VERSION with it."""
    assert order.order_by_shards(42, Stream.TRAIN, 3, np.repeat(np.arange(4), 3), 2).tolist() == PINNED_BY_SHARDS


PINNED_BY_SHARDS = [0, 1, 2, 11, 10, 9, 8, 7, 5, 3, 4, 6]
