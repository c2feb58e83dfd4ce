"""The same loaders over images that are in memory: for tests, and for machines without DALI."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from swa_dist.config import Data
from swa_dist.data import order
from swa_dist.data.order import Batch, Group, Ints, Span, Split, Stream, Transforms
from swa_dist.data.pixels import normalised


@dataclass(frozen=True)
class MemoryLoaders:
    """One worker's loaders over images held as uint8 [images, 3, height, width], labels int64 [images].

    They are whole: whatever is said to be left out, nothing is.
    """

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    data: Data
    seed: int
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def num_train(self) -> int:
        return len(self.train_images)

    @property
    def num_val(self) -> int:
        return len(self.val_images)

    def name_of(self, split: Split, i: int) -> str:
        return f"{split} image {i}"

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        images = order.order(self.seed, Stream.TRAIN, epoch, self.num_train)
        for batch in order.batches_of(self.num_train, self.data.global_batch, start):
            groups = order.groups_of(batch, self.data.group_images)
            yield Batch(
                num_images=batch.stop - batch.start,
                num_groups=len(groups),
                groups=[self._cropped(Stream.TRAIN, epoch, images, span) for span in self._deal(groups)],
            )

    def recalibration(self, span: Span, transforms: Transforms, left_out: Mapping[int, str]) -> Iterator[Group]:
        images = order.order(self.seed, Stream.RECALIBRATE, 0, self.num_train)
        for one in self._deal(order.groups_of(span, self.data.group_images)):
            if transforms == "train":
                yield self._cropped(Stream.RECALIBRATE, 0, images, one)
            else:
                yield self._centred(self.train_images, self.train_labels, images[one.start : one.stop])

    def validation(self) -> Iterator[Group]:
        for span in self._deal(order.groups_of(Span(0, self.num_val), self.data.group_images)):
            yield self._centred(self.val_images, self.val_labels, np.arange(span.start, span.stop))

    def _centred(self, images: Tensor, labels: Tensor, ids: Ints) -> Group:
        resized = functional.resize(images[torch.from_numpy(ids)], [self.data.resize_size], antialias=True)
        size = [self.data.image_size, self.data.image_size]
        return self._group(functional.center_crop(resized, size), labels, ids)

    def _deal(self, groups: list[Span]) -> list[Span]:
        return order.deal(groups, self.rank, self.world_size)

    def _cropped(self, stream: Stream, epoch: int, images: Ints, span: Span) -> Group:
        ids = images[span.start : span.stop]
        height, width = self.train_images.shape[-2:]
        windows = order.crops(
            self.seed,
            stream,
            epoch,
            span,
            np.full(len(ids), height),
            np.full(len(ids), width),
            area=self.data.crop_area,
            ratio=self.data.crop_ratio,
            flip=self.data.flip,
        )
        size = [self.data.image_size, self.data.image_size]
        cropped = [
            functional.resized_crop(self.train_images[i], top, left, high, wide, size, antialias=True)
            for i, top, left, high, wide in zip(
                ids.tolist(),
                windows.top.tolist(),
                windows.left.tolist(),
                windows.height.tolist(),
                windows.width.tolist(),
                strict=True,
            )
        ]
        upright = torch.stack(cropped)
        mirrored = torch.from_numpy(windows.flip)[:, None, None, None].to(upright.device)
        return self._group(torch.where(mirrored, upright.flip(-1), upright), self.train_labels, ids)

    def _group(self, images: Tensor, labels: Tensor, ids: Ints) -> Group:
        pixels = normalised(images.permute(0, 2, 3, 1).to(self.device))
        return Group(images=pixels, labels=labels[torch.from_numpy(ids)].to(self.device), ids=ids)
