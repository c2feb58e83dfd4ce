"""The loaders of a run: NVIDIA DALI pipelines that are told what to read. The only importer of DALI.

A pipeline is built for one pass and holds no state of its own: what it decodes, in which order and which part of each
image comes from `order.py`, the bytes from `reading.py`. On a GPU it resizes too, on a CPU `resizing.py` does. Either
gives uint8 pixels, which become floats on the device.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from torch import Tensor

from swa_dist.config import Data
from swa_dist.data import order
from swa_dist.data.cache import Cache
from swa_dist.data.index import Index
from swa_dist.data.order import Batch, Crops, Group, Ints, Span, Split, Stream, Transforms
from swa_dist.data.pixels import normalised
from swa_dist.data.reading import Ahead, Bytes, Reader
from swa_dist.data.resizing import Resizer, placements
from swa_dist.data.sizes import Sizes
from swa_dist.errors import DataError

_PREFETCH = 2

Source = Iterator[tuple[Any, ...]]
Windows = Callable[[Span, Ints], Crops]


class DaliLoaders:
    """One worker's loaders over images on disk or on S3. On a GPU images are decoded there, else on the CPU."""

    def __init__(
        self,
        train_index: Index,
        val_index: Index,
        data: Data,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        sizes: Sizes,
        warn: Callable[[str], None] = print,
    ) -> None:
        cache = Cache(Path(sizes.cache_dir), sizes.cache_bytes, warn)
        self._train = Reader(train_index, cache)
        self._val = Reader(val_index, cache)
        self._data = data
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._sizes = sizes
        self._kept = _Kept(sizes.kept_bytes)
        self._ahead = Ahead(sizes.read_threads, sizes.groups_ahead)
        self._resizer = Resizer(sizes.decode_threads)

    @property
    def num_train(self) -> int:
        return len(self._train.index)

    @property
    def num_val(self) -> int:
        return len(self._val.index)

    def name_of(self, split: Split, i: int) -> str:
        return (self._train if split == "train" else self._val).index.name(i)

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        batches = order.batches_of(self.num_train, self._data.global_batch, start)
        groups = [order.groups_of(batch, self._data.group_images) for batch in batches]
        mine = [order.deal(spans, self._rank, self._world_size) for spans in groups]
        wanted = _wanted([span for spans in mine for span in spans], self._order(epoch))
        made = self._made(self._train, wanted, left_out, self._windows(Stream.TRAIN, epoch))
        for batch, every, share in zip(batches, groups, mine, strict=True):
            yield Batch(batch.stop - batch.start, len(every), [self._group(self._train, next(made)) for _ in share])

    def recalibration(self, span: Span, transforms: Transforms, left_out: Mapping[int, str]) -> Iterator[Group]:
        images = order.order(self._seed, Stream.RECALIBRATE, 0, self.num_train)
        windows = self._windows(Stream.RECALIBRATE, 0) if transforms == "train" else None
        return self._from_memory(self._train, transforms, span, images, left_out, windows)

    def validation(self) -> Iterator[Group]:
        return self._from_memory(self._val, "validation", Span(0, self.num_val), np.arange(self.num_val), {}, None)

    def _order(self, epoch: int) -> Ints:
        """The image at each position of an epoch of training."""
        index = self._train.index
        if not index.shards:
            return order.order(self._seed, Stream.TRAIN, epoch, len(index))
        window = self._data.shard_window
        return order.order_by_shards(self._seed, Stream.TRAIN, epoch, index.shard_numbers, window)

    def _windows(self, stream: Stream, epoch: int) -> Windows:
        index, data = self._train.index, self._data

        def windows(span: Span, ids: Ints) -> Crops:
            return order.crops(
                self._seed,
                stream,
                epoch,
                span,
                index.heights[ids],
                index.widths[ids],
                area=data.crop_area,
                ratio=data.crop_ratio,
                flip=data.flip,
            )

        return windows

    def _from_memory(
        self,
        reader: Reader,
        what: str,
        span: Span,
        images: Ints,
        left_out: Mapping[int, str],
        windows: Windows | None,
    ) -> Iterator[Group]:
        """This worker's groups of a span: from memory, or decoded, and kept in it if there is room."""
        spans = order.deal(order.groups_of(span, self._data.group_images), self._rank, self._world_size)
        wanted = _wanted(spans, images)
        made = self._made(reader, [one for one in wanted if (what, one.span) not in self._kept], left_out, windows)
        for one in wanted:
            decoded = self._kept.get((what, one.span)) or next(made)
            self._kept.put((what, one.span), decoded)
            yield self._group(reader, decoded)

    def _group(self, reader: Reader, decoded: "_Decoded") -> Group:
        labels = torch.from_numpy(reader.index.labels[decoded.ids]).to(self._device)
        images = normalised(decoded.images.to(self._device, non_blocking=True))
        return Group(images=images, labels=labels, ids=decoded.ids, left_out=decoded.left_out)

    def _made(
        self, reader: Reader, wanted: "Sequence[_Wanted]", left_out: Mapping[int, str], windows: Windows | None
    ) -> "Iterator[_Decoded]":
        """Each group decoded. Where an image turns out to be bad, the pipeline, which is then of no more use, is built
        anew at its group, without it."""
        _trim_heap()
        bad = dict(left_out)
        done = 0
        while done < len(wanted):
            rest = [one.without(bad) for one in wanted[done:]]
            pipeline = self._pipeline(reader, [one for one in rest if len(one.ids)], windows)
            for number, one in enumerate(rest):
                try:
                    images = self._run(pipeline) if len(one.ids) else torch.empty(0, *self._shape, dtype=torch.uint8)
                except RuntimeError as error:
                    bad |= self._bad_of(reader, rest[number : number + _PREFETCH + 1], error)
                    break
                # In training and in recalibration, whatever their windows: BatchNorm has no variance of one.
                if reader is self._train and len(one.ids) < min(2, len(one.images)):
                    raise DataError(
                        f"a group of images must have two that can be decoded, but of {len(one.images)} only"
                        f" {len(one.ids)} can: {reader.index.name(one.left_out[0])}: {bad[one.left_out[0]]}."
                        " Look at the images with `swa-dist data verify`."
                    )
                done += 1
                yield _Decoded(images, one.ids, {i: bad[i] for i in one.left_out})

    @property
    def _gpu(self) -> int | None:
        """The number of the GPU that decodes; None: the CPU does."""
        return self._device.index if self._device.type == "cuda" else None

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self._data.image_size, self._data.image_size, 3

    def _pipeline(self, reader: Reader, wanted: "Sequence[_Wanted]", windows: Windows | None) -> Pipeline:
        contents = self._ahead.read(reader, (one.ids for one in wanted))
        source = (
            self._centred_inputs(reader, one, content)
            if windows is None
            else one.inputs(content, windows, self._data.image_size)
            for one, content in zip(wanted, contents, strict=True)
        )
        pipeline = (_centred if windows is None else _random_cropped)(
            source,
            self._data,
            on_gpu=self._gpu is not None,
            batch_size=self._data.group_images,
            num_threads=self._sizes.decode_threads,
            device_id=self._gpu,
            prefetch_queue_depth=_PREFETCH,
        )
        pipeline.build()
        return pipeline

    def _centred_inputs(self, reader: Reader, one: "_Wanted", contents: list[Bytes]) -> tuple[Any, ...]:
        index, data = reader.index, self._data
        centres = order.centres(
            index.heights[one.ids], index.widths[one.ids], resize_size=data.resize_size, image_size=data.image_size
        )
        return contents, placements(centres.height, centres.width, centres.top, centres.left, False)

    def _run(self, pipeline: Pipeline) -> Tensor:
        # The next run writes these buffers again: what is wanted of them must be done, not only begun.
        outputs = pipeline.run()
        if self._gpu is None:
            images, places = outputs
            # By numpy, which looks at DALI's bytes where they are; DLPack copies them.
            pixels = [np.asarray(image) for image in images]
            return self._resizer.fit(pixels, places.as_array(), self._data.image_size)
        copied = torch.utils.dlpack.from_dlpack(outputs[0].as_tensor()).clone()
        torch.cuda.current_stream(self._device).synchronize()
        return copied

    def _bad_of(self, reader: Reader, groups: "Sequence[_Wanted]", error: RuntimeError) -> dict[int, str]:
        """The images of the first of these groups that has any that can't be decoded."""
        for group in groups:
            ids = group.ids.tolist()
            if found := undecodable([reader.read(i) for i in ids], self._sizes.decode_threads, self._gpu):
                return {ids[number]: why for number, why in found.items()}
        raise DataError(f"a batch of images could not be decoded, though each by itself can: {_sentence(error)}")


def _trim_heap() -> None:
    """Give back to the machine what the pass before has left between what is in use.

    Large tensors that come and go in turn with small things leave holes, and glibc's heap would grow for some twenty
    passes, to twice its size.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def undecodable(contents: Sequence[Bytes], num_threads: int, gpu: int | None = None) -> dict[int, str]:
    """Which of these encoded images can't be decoded, by their numbers, and why. `gpu`: that of this number decodes."""
    try:
        if contents:
            _decode_once(contents, num_threads, gpu)
    except RuntimeError as error:
        if len(contents) == 1:
            return {0: _sentence(error)}
    else:
        return {}
    half = len(contents) // 2
    later = undecodable(contents[half:], num_threads, gpu)
    return undecodable(contents[:half], num_threads, gpu) | {half + number: why for number, why in later.items()}


def _decode_once(contents: Sequence[Bytes], num_threads: int, gpu: int | None) -> None:
    # Not pipelined, so that an error is one of these images'. A pipeline is of no more use after one.
    pipeline = _decoded(
        iter([(list(contents),)]),
        on_gpu=gpu is not None,
        batch_size=len(contents),
        num_threads=num_threads,
        device_id=gpu,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
    )
    pipeline.build()
    pipeline.run()


@dataclass(frozen=True)
class _Wanted:
    """A group to be made."""

    span: Span
    """Its positions of an order."""
    images: Ints
    """The images there, with those that are left out."""
    left_out: tuple[int, ...] = ()

    @functools.cached_property
    def ids(self) -> Ints:
        return self.images[self._good]

    @functools.cached_property
    def _good(self) -> npt.NDArray[np.bool_]:
        return ~np.isin(self.images, self.left_out)

    def without(self, bad: Mapping[int, str]) -> "_Wanted":
        return _Wanted(self.span, self.images, tuple(i for i in self.images.tolist() if i in bad)) if bad else self

    def inputs(self, contents: list[Bytes], windows: Windows, side: int) -> tuple[Any, ...]:
        """What a pipeline of random crops is fed for it."""
        crops = windows(self.span, self.images)
        starts = np.stack([crops.top, crops.left], axis=1)[self._good].astype(np.int32)
        shapes = np.stack([crops.height, crops.width], axis=1)[self._good].astype(np.int32)
        return contents, starts, shapes, placements(side, side, 0, 0, crops.flip[self._good])


@dataclass(frozen=True)
class _Decoded:
    """A group before it is normalised: what is kept in memory."""

    images: Tensor
    """uint8 [images, height, width, 3]."""
    ids: Ints
    left_out: Mapping[int, str]


class _Kept:
    """Decoded groups that stay in memory, as many as there is room for."""

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._groups: dict[tuple[str, Span], _Decoded] = {}

    def __contains__(self, key: tuple[str, Span]) -> bool:
        return key in self._groups

    def get(self, key: tuple[str, Span]) -> _Decoded | None:
        return self._groups.get(key)

    def put(self, key: tuple[str, Span], decoded: _Decoded) -> None:
        size = decoded.images.numel()
        if key not in self._groups and size <= self._room:
            self._room -= size
            self._groups[key] = dataclasses.replace(decoded, images=decoded.images.cpu())


def _wanted(spans: Sequence[Span], images: Ints) -> list[_Wanted]:
    return [_Wanted(span, images[span.start : span.stop]) for span in spans]


def _sentence(error: RuntimeError) -> str:
    """What DALI says, without its stack trace."""
    _, _, said = str(error).rpartition("encountered:")
    lines = [line.strip(" :") for line in said.splitlines() if line.strip()]
    return lines[0].replace(" sample #0", "") if lines else str(error)


@pipeline_def  # type: ignore[untyped-decorator]
def _random_cropped(source: Source, data: Data, *, on_gpu: bool) -> Any:
    encoded, start, shape, placement = fn.external_source(
        source=source, num_outputs=4, batch=True, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32]
    )
    window = fn.decoders.image_slice(
        encoded,
        start,
        shape,
        axis_names="HW",
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=True,
    )
    return _placed(window, placement, data.image_size) if on_gpu else (window, placement)


@pipeline_def  # type: ignore[untyped-decorator]
def _decoded(source: Source, *, on_gpu: bool) -> Any:
    (encoded,) = fn.external_source(source=source, num_outputs=1, batch=True, dtype=[types.UINT8])
    return fn.decoders.image(
        encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=True
    )


@pipeline_def  # type: ignore[untyped-decorator]
def _centred(source: Source, data: Data, *, on_gpu: bool) -> Any:
    encoded, placement = fn.external_source(source=source, num_outputs=2, batch=True, dtype=[types.UINT8, types.INT32])
    image = fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=True,
    )
    return _placed(image, placement, data.image_size) if on_gpu else (image, placement)


def _placed(image: Any, placement: Any, side: int) -> Any:
    """What `Resizer.fit` does, by DALI, for a GPU."""
    flip = fn.cast(placement[4], dtype=types.FLOAT)
    # A part that is resized from its right edge to its left comes out mirrored, which costs nothing.
    from_corner = fn.stack(flip * 0, flip)
    resized = fn.resize(
        image,
        size=fn.cast(placement[0:2], dtype=types.FLOAT),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        roi_start=from_corner,
        roi_end=1 - from_corner,
        roi_relative=True,
    )
    return fn.slice(resized, start=placement[2:4], shape=[side, side], axis_names="HW")
