"""The loaders of a run: NVIDIA DALI pipelines that are told what to read. The only importer of DALI.

A pipeline is built for one pass and holds no state of its own: what it reads, in which order and which part of each
image comes from `order.py` through an external source.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image

from swa_dist.config import Data
from swa_dist.data import order
from swa_dist.data.index import Index
from swa_dist.data.order import Batch, Group, Ints, Span, Stream, Transforms
from swa_dist.errors import DataError

_PREFETCH = 2

Source = Iterator[tuple[Any, ...]]


@dataclass(frozen=True)
class DaliLoaders:
    """One worker's loaders over images on disk. On a GPU images are decoded there, else on the CPU."""

    train_index: Index
    val_index: Index
    data: Data
    seed: int
    rank: int
    world_size: int
    device: torch.device
    num_threads: int

    @property
    def num_train(self) -> int:
        return len(self.train_index)

    @property
    def num_val(self) -> int:
        return len(self.val_index)

    def train(self, epoch: int, start: int) -> Iterator[Batch]:
        batches = order.batches_of(self.num_train, self.data.global_batch, start)
        groups = [order.groups_of(batch, self.data.group_images) for batch in batches]
        mine = [self._deal(spans) for spans in groups]
        images = self._cropped(Stream.TRAIN, epoch, [span for spans in mine for span in spans])
        for batch, every, share in zip(batches, groups, mine, strict=True):
            yield Batch(
                num_images=batch.stop - batch.start, num_groups=len(every), groups=[next(images) for _ in share]
            )

    def recalibration(self, span: Span, transforms: Transforms) -> Iterator[Group]:
        spans = self._deal(order.groups_of(span, self.data.group_images))
        if transforms == "train":
            return self._cropped(Stream.RECALIBRATE, 0, spans)
        images = order.order(self.seed, Stream.RECALIBRATE, 0, self.num_train)
        return self._centred(self.train_index, [images[one.start : one.stop] for one in spans])

    def validation(self) -> Iterator[Group]:
        spans = self._deal(order.groups_of(Span(0, self.num_val), self.data.group_images))
        return self._centred(self.val_index, [np.arange(span.start, span.stop) for span in spans])

    def _centred(self, index: Index, ids: list[Ints]) -> Iterator[Group]:
        def source() -> Source:
            for group in ids:
                yield (index.path_bytes(group),)

        return self._run(_centred, source, index, ids)

    def _deal(self, groups: list[Span]) -> list[Span]:
        return order.deal(groups, self.rank, self.world_size)

    def _cropped(self, stream: Stream, epoch: int, spans: list[Span]) -> Iterator[Group]:
        index = self.train_index
        images = order.order(self.seed, stream, epoch, len(index))
        ids = [images[span.start : span.stop] for span in spans]

        def source() -> Source:
            for span, group in zip(spans, ids, strict=True):
                windows = order.crops(
                    self.seed,
                    stream,
                    epoch,
                    span,
                    index.heights[group],
                    index.widths[group],
                    area=self.data.crop_area,
                    ratio=self.data.crop_ratio,
                    flip=self.data.flip,
                )
                starts = np.stack([windows.top, windows.left], axis=1).astype(np.int32)
                shapes = np.stack([windows.height, windows.width], axis=1).astype(np.int32)
                yield index.path_bytes(group), list(starts), list(shapes), list(windows.flip.astype(np.int32))

        return self._run(_random_cropped, source, index, ids)

    def _run(
        self, define: Callable[..., Pipeline], source: Callable[[], Source], index: Index, ids: list[Ints]
    ) -> Iterator[Group]:
        """One pass of a pipeline: a group for each of `ids`."""
        if not ids:
            return
        pipeline = define(
            source(),
            self.data,
            on_gpu=self.device.type == "cuda",
            batch_size=self.data.group_images,
            num_threads=self.num_threads,
            device_id=self.device.index if self.device.type == "cuda" else None,
            prefetch_queue_depth=_PREFETCH,
        )
        pipeline.build()
        for number, group in enumerate(ids):
            try:
                (images,) = pipeline.run()
            except RuntimeError as error:
                raise _blame(index, ids[number : number + _PREFETCH + 1], error) from error
            copied = torch.utils.dlpack.from_dlpack(images.as_tensor()).clone()
            if copied.is_cuda:
                # DALI writes its buffer again on a stream of its own: the copy must be done, not only begun.
                torch.cuda.current_stream(self.device).synchronize()
            yield Group(
                images=copied,
                labels=torch.from_numpy(index.labels[group]).to(self.device),
                ids=group,
            )


@pipeline_def  # type: ignore[untyped-decorator]
def _random_cropped(source: Source, data: Data, *, on_gpu: bool) -> Any:
    path, start, shape, mirror = fn.external_source(
        source=source, num_outputs=4, batch=True, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32]
    )
    window = fn.decoders.image_slice(
        fn.io.file.read(path),
        start,
        shape,
        axis_names="HW",
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=True,
    )
    size = data.image_size
    resized = fn.resize(window, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
    return _normalised(resized, data, mirror=mirror)


@pipeline_def  # type: ignore[untyped-decorator]
def _centred(source: Source, data: Data, *, on_gpu: bool) -> Any:
    (path,) = fn.external_source(source=source, num_outputs=1, batch=True, dtype=[types.UINT8])
    image = fn.decoders.image(
        fn.io.file.read(path),
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=True,
    )
    resized = fn.resize(image, resize_shorter=data.resize_size, interp_type=types.INTERP_LINEAR, antialias=True)
    return _normalised(resized, data, mirror=0)


def _normalised(images: Any, data: Data, mirror: Any) -> Any:
    return fn.crop_mirror_normalize(
        images,
        crop=(data.image_size, data.image_size),
        mirror=mirror,
        mean=[255 * m for m in order.MEAN],
        std=[255 * s for s in order.STD],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _blame(index: Index, groups: list[Ints], error: RuntimeError) -> DataError:
    """Name the image that DALI, which says no more than its place in a batch, could not decode."""
    for image in np.concatenate(groups):
        path = index.root / index.paths[image]
        try:
            with Image.open(path) as opened:
                opened.load()
        except OSError as reason:
            return DataError(f"every image must be whole, but {path} is not: {reason}. Replace or remove it.")
    return DataError(f"a batch of images could not be decoded: {error}")
