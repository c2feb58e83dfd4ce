"""Which image comes when, and how it is cropped: pure functions of (seed, epoch, position).

Nothing here knows the number of workers, so they see the same images, crops and groups however many they are, and a
restart needs no state of the loader. The generator is numpy's Philox, counter-based: the numbers of any position are
had without those before it. Only its raw bits are used, which numpy promises not to change.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from swa_dist.errors import ConfigError

if TYPE_CHECKING:  # a submitter, which doesn't see the images, need not wait for it
    from torch import Tensor

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_TRIES = 10  # of a random crop, as torchvision's RandomResizedCrop
_DRAWS = 24  # 64-bit numbers per image: 2 per try, 2 for the place, 1 for the flip; a multiple of Philox's 4


class Stream(enum.IntEnum):
    """What an epoch's numbers are for; equal seeds and epochs of two streams are independent."""

    TRAIN = 0
    RECALIBRATE = 1


@dataclass(frozen=True)
class Group:
    """Images that go through the network together. `ids` are their places in the index."""

    images: "Tensor"
    """float32 [images, 3, height, width], normalised, on the worker's device."""
    labels: "Tensor"
    """int64 [images], on the worker's device."""
    ids: Ints
    """int64 [images]."""
    left_out: Mapping[int, str] = field(default_factory=dict)
    """Images of this group that can't be decoded and so are not in it: their places in the index, and why."""


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    num_images: int
    """Images of the whole global batch, over all workers, with those that are left out."""
    num_groups: int
    """Groups of the whole global batch, over all workers."""
    groups: list[Group]
    """This worker's, in order: groups rank, rank + world_size, ... of the batch. May be empty."""


Transforms = Literal["train", "eval"]
Split = Literal["train", "val"]


class Loaders(Protocol):
    """One worker's images. All workers' groups together are each image once, whatever their number."""

    @property
    def num_train(self) -> int: ...

    @property
    def num_val(self) -> int: ...

    def name_of(self, split: Split, i: int) -> str:
        """What people know the image at this place of the index by."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        """The global batches of an epoch, from the one that begins at position `start` of it. `left_out`: images that
        are known to be bad, and are left out. An image that turns out to be bad is left out of its group and named
        there; raises DataError where less than two of a group are good."""

    def recalibration(self, span: "Span", transforms: Transforms, left_out: Mapping[int, str]) -> Iterator[Group]:
        """This worker's groups of the training images at these positions of a fixed order.

        With the random crops of training, or the centre crops of the evaluation. `left_out`: as for `train`.
        """

    def validation(self) -> Iterator[Group]:
        """This worker's groups of the validation images, each image once, or named as one that can't be decoded."""


@dataclass(frozen=True)
class Span:
    """The images at positions [start, stop) of an order."""

    start: int
    stop: int


def groups_of(span: Span, group_images: int) -> list[Span]:
    """A batch's groups; the last may be shorter."""
    return [Span(a, min(a + group_images, span.stop)) for a in range(span.start, span.stop, group_images)]


def check_groups(num_images: int, group_images: int) -> None:
    """Raise ConfigError where so many images end in a group of one, in which BatchNorm has no variance."""
    if num_images % group_images == 1:
        other = group_images - 1 if group_images > 2 else group_images + 1
        raise ConfigError(
            "`data.group_images` must not leave a group of one image, in which BatchNorm has no variance, but does:"
            f" {num_images:,} images in groups of {group_images}. Try {other}."
        )


def batches_of(num_images: int, global_batch: int, start: int = 0) -> list[Span]:
    """An epoch's global batches from position `start` on, which must be where one begins; the last may be shorter."""
    return groups_of(Span(start, num_images), global_batch)


def deal(groups: list[Span], rank: int, world_size: int) -> list[Span]:
    """The groups that the worker `rank` runs."""
    return groups[rank::world_size]


def order(seed: int, stream: Stream, epoch: int, num_images: int) -> Ints:
    """A permutation of the images of the index: the image at each position of an epoch."""
    keys = _generator(seed, stream, epoch, purpose=0).random_raw(num_images)
    return np.argsort(keys, kind="stable").astype(np.int64)


def order_by_shards(seed: int, stream: Stream, epoch: int, shard_numbers: Ints, window: int) -> Ints:
    """A permutation that needs few shards at a time: the shards in random order, `window` of them after the other, and
    the images of each window in random order. `shard_numbers`: of each image, [images], from 0 on."""
    keys = _generator(seed, stream, epoch, purpose=0).random_raw(len(shard_numbers))
    of_shards = _generator(seed, stream, epoch, purpose=2).random_raw(1 + int(shard_numbers.max(initial=-1)))
    places = np.argsort(np.argsort(of_shards, kind="stable"), kind="stable")
    return np.lexsort((keys, places[shard_numbers] // window)).astype(np.int64)


@dataclass(frozen=True)
class Crops:
    """Windows in pixels of the upright image, int64 [images], and whether each is mirrored."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints
    flip: Bools


def crops(
    seed: int,
    stream: Stream,
    epoch: int,
    span: Span,
    heights: Ints,
    widths: Ints,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> Crops:
    """The random crops of the images at the positions `span` of an epoch, whose sizes are given in that order.

    The distribution is that of torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest
    centred window within `ratio`.
    """
    u = _uniforms(seed, stream, epoch, span)
    tries = u[:, : 2 * _TRIES].reshape(-1, _TRIES, 2)
    pixels = (heights * widths)[:, None] * (area[0] + (area[1] - area[0]) * tries[:, :, 0])
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * tries[:, :, 1])
    w = np.rint(np.sqrt(pixels * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(pixels / aspect)).astype(np.int64)
    fits = (0 < w) & (w <= widths[:, None]) & (0 < h) & (h <= heights[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(u))
    any_fits = fits.any(axis=1)
    whole_h, whole_w = _largest_centred(heights, widths, ratio)
    height = np.where(any_fits, h[rows, first], whole_h)
    width = np.where(any_fits, w[rows, first], whole_w)
    top = np.where(any_fits, _below(u[:, 20], heights - height + 1), (heights - height) // 2)
    left = np.where(any_fits, _below(u[:, 21], widths - width + 1), (widths - width) // 2)
    return Crops(top, left, height, width, (u[:, 22] < 0.5) & flip)


@dataclass(frozen=True)
class Centres:
    """What the evaluation sees, in pixels, int64 [images]: how large an upright image is made, and where in that the
    window begins."""

    height: Ints
    width: Ints
    top: Ints
    left: Ints


def centres(heights: Ints, widths: Ints, *, resize_size: int, image_size: int) -> Centres:
    """The windows of images of these sizes. Those of torchvision's Resize, which rounds down, and CenterCrop, which
    rounds half a pixel to the even one: DALI's own are up to a pixel beside them, and weights have their published
    accuracy on torchvision's."""
    shorter = np.minimum(heights, widths)
    height, width = resize_size * heights // shorter, resize_size * widths // shorter
    top, left = (np.rint((side - image_size) / 2).astype(np.int64) for side in (height, width))
    return Centres(height, width, top, left)


def _largest_centred(heights: Ints, widths: Ints, ratio: tuple[float, float]) -> tuple[Ints, Ints]:
    shape = widths / heights
    h = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights)
    w = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths)
    return np.clip(h, 1, heights).astype(np.int64), np.clip(w, 1, widths).astype(np.int64)


def _below(u: npt.NDArray[np.float64], limit: Ints) -> Ints:
    """Uniform whole numbers in [0, limit)."""
    return np.minimum((u * limit).astype(np.int64), limit - 1)


def _uniforms(seed: int, stream: Stream, epoch: int, span: Span) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), shape [positions, draws]."""
    generator = _generator(seed, stream, epoch, purpose=1)
    generator.advance(span.start * _DRAWS // 4)  # the counter moves by one for each four numbers
    raw = generator.random_raw((span.stop - span.start) * _DRAWS)
    uniforms: npt.NDArray[np.float64] = (raw.reshape(-1, _DRAWS) >> np.uint64(11)) * np.float64(2.0**-53)
    return uniforms


def _generator(seed: int, stream: Stream, epoch: int, purpose: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch << 16 | stream << 8 | purpose], dtype=np.uint64))
