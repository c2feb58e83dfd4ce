"""Fresh BatchNorm statistics for any weights: exact moments over all workers, and how far they can be trusted."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from swa_dist.config import Recalibrate, Recipe
from swa_dist.data.order import Loaders, Span
from swa_dist.errors import DataError, NumericsError
from swa_dist.method.moments import Moments
from swa_dist.training import batchnorm
from swa_dist.training.world import World, stacked

_HALVES = 2
_AUTO_GROUPS = 32  # groups between two looks at the sampling error


@dataclass(frozen=True)
class Recalibration:
    """What was done, and how sure the means are. Errors are in standard deviations of the channel: the root mean square
    over a layer's channels, of the layer where it is largest."""

    num_layers: int
    """None: the model has no BatchNorm and is as it was."""
    num_images: int
    """Over all workers."""
    num_groups: int
    sampling_error: float
    """Standard error of the means, from how much images differ."""
    split_half: float
    """Difference of the means of every other group from those of the rest: about twice the sampling error."""
    grouping_dependence: float | None = None
    """How far the means move when each layer sees activations normalised by the fresh statistics instead of by their
    own group's: more than what they are wrong by, since layers' errors add up. None where it was not asked for."""


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor], world: World) -> Recalibration:
    """Replace the running statistics of `model`, in place, by population moments over the images of all workers.

    `batches`: this worker's images, float32 [images, 3, height, width] on its device; each is normalised by its own
    statistics on the way through, so batches are groups of the recipe, dealt in turn. Workers may have unequal numbers
    or none. running_var becomes the population variance M2 / n. Dropout stays off, autocast is off, gradients are not
    touched. Collective. If anything fails the old statistics are still there, bit for bit; in any case each module's
    mode is. Raises DataError where there are no images.
    """
    with Pass(model, world) as one:
        one.observe(batches)
        return one.write()


def recalibrate_as(
    recipe: Recipe,
    model: nn.Module,
    loaders: Loaders,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
    left_out: Mapping[int, str] = MappingProxyType({}),
) -> Recalibration:
    """`recalibrate` on the training images as the recipe has it: how many, which transforms, a second pass or none.

    Collective. `progress` is told images done and wanted, over all workers. `left_out`: images known to be bad.
    """
    plan, size = recipe.recalibrate, recipe.data.group_images
    limit = most_images(plan, loaders.num_train)

    def images(span: Span) -> Iterator[Tensor]:
        done = span.start
        for group in loaders.recalibration(span, plan.transforms, left_out):
            yield group.images
            done += len(group.images) * world.size
            progress(min(done, limit), limit)

    step = _AUTO_GROUPS * size if plan.images == "auto" else limit
    with _restored_on_failure(model):
        with Pass(model, world) as one:
            for first in range(0, limit, step):
                span = Span(first, min(first + step, limit))
                one.observe(images(span), first_group=first // size)
                if plan.images == "auto" and one.sampling_error() < plan.error_below:
                    limit = span.stop
                    break
            report = one.write()
        if plan.second_pass == "off" or report.num_layers == 0:
            return report
        return second_pass(model, lambda: images(Span(0, limit)), world, report, remove=plan.second_pass == "remove")


def most_images(plan: Recalibrate, num_train: int) -> int:
    """How many training images are looked at, at most."""
    return min(plan.images, num_train) if isinstance(plan.images, int) else num_train


@torch.no_grad()
def second_pass(
    model: nn.Module, batches: Callable[[], Iterable[Tensor]], world: World, first: Recalibration, *, remove: bool
) -> Recalibration:
    """Look again with the fresh statistics in place: the model as it will be used, where grouping plays no part.

    `model` must have come from `recalibrate`; `batches` gives its batches once more. Measures how far the means move.
    With `remove` each layer is set to what it then sees, one after the other in the order of the network, and it is
    measured again: a pass for each layer, after which nothing depends on groups. (All at once would be worse than none:
    a layer's correction and those before it would add up.) Collective. A failure leaves the statistics as they were.
    """
    with _restored_on_failure(model):
        moved, order = _dependence(model, batches, world)
        if remove:
            for name in order[1:]:  # the first layer sees images, which no statistics change
                with Pass(model, world, training=False, only=name) as one:
                    one.observe(batches())
                    one.write()
            moved, _ = _dependence(model, batches, world)
    return Recalibration(**(vars(first) | {"grouping_dependence": moved}))


def _dependence(model: nn.Module, batches: Callable[[], Iterable[Tensor]], world: World) -> tuple[float, list[str]]:
    """Collective: how far the means move, and the layers in the order that images pass them."""
    with Pass(model, world, training=False) as one:
        one.observe(batches())
        moved = one.distance_from_written()
        orders = world.gather(list(one.order))
    return moved, max(orders, key=len)  # a worker without images saw no layer


class Pass:
    """One pass over images, in one go or in parts, within a `with` block; hooks and modes are as before after it.

    `training`: whether BatchNorm normalises by the batch, or by its running statistics. `only`: the one layer to look
    at; all if not given.
    """

    def __init__(self, model: nn.Module, world: World, *, training: bool = True, only: str | None = None) -> None:
        self._model = model
        self._world = world
        self._training = training
        self._layers = {n: layer for n, layer in batchnorm.layers(model).items() if only in (None, n)}
        self.order: dict[str, None] = {}
        """The layers as this worker's images passed them first."""
        self._seen = {
            name: [Moments(layer.num_features, world.device) for _ in range(_HALVES)]
            for name, layer in self._layers.items()
        }
        # Means of single images: what an image adds is worth one sample, however many pixels it has.
        self._images = {name: Moments(layer.num_features, world.device) for name, layer in self._layers.items()}
        self._counts = torch.zeros(2, dtype=torch.int64, device=world.device)
        self._group = 0
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> "Pass":
        with contextlib.ExitStack() as stack:
            stack.enter_context(batchnorm.modes_restored(self._model))
            stack.enter_context(batchnorm.unrecorded(self._model))
            stack.enter_context(torch.autocast(self._world.device.type, enabled=False))
            self._model.eval()
            for name, layer in self._layers.items():
                layer.train(self._training)
                hook = functools.partial(self._observe_layer, name)
                stack.callback(layer.register_forward_pre_hook(hook).remove)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    @torch.no_grad()
    def observe(self, batches: Iterable[Tensor], first_group: int = 0) -> None:
        """Run this worker's groups first_group + rank, + world_size, ... through the model."""
        if not self._layers:
            return
        for i, images in enumerate(batches):
            self._group = first_group + self._world.rank + i * self._world.size
            if len(images):
                self._model(images)
                self._counts += torch.tensor([len(images), 1], device=self._world.device)

    @torch.no_grad()
    def sampling_error(self) -> float:
        """Collective: that of the means so far."""
        return self._sampling_error(*self._pooled())

    @torch.no_grad()
    def distance_from_written(self) -> float:
        """Collective: from the means in the model to those seen."""
        total, _, _ = self._pooled()
        return _worst(
            (total[name].mean - layer.running_mean.double()) / total[name].variance.sqrt()
            for name, layer in self._layers.items()
            if layer.running_mean is not None
        )

    @torch.no_grad()
    def write(self) -> Recalibration:
        """Collective: put the moments into the model."""
        num_images, num_groups = self._world.sum_(self._counts.clone()).tolist()
        if self._layers and num_images == 0:
            raise DataError("BatchNorm must be recalibrated on at least one image, but was given none.")
        total, halves, images = self._pooled()
        for name, pooled in total.items():
            if not torch.isfinite(pooled.values).all():
                raise NumericsError(
                    f"activations must be finite for BatchNorm to be recalibrated, but those of `{name}` are not. The"
                    " old statistics are kept; look at the weights and the images."
                )
        report = Recalibration(
            num_layers=len(self._layers),
            num_images=num_images,
            num_groups=num_groups,
            sampling_error=self._sampling_error(total, halves, images),
            split_half=_worst(
                (one.mean - other.mean) / total[name].variance.sqrt() for name, (one, other) in halves.items()
            )
            if num_groups >= _HALVES
            else 0.0,
        )
        for name, layer in self._layers.items():
            if total[name].count:
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.copy_(total[name].mean)
                layer.running_var.copy_(total[name].variance)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(num_groups)
        return report

    def _observe_layer(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        self.order.setdefault(name)
        self._seen[name][self._group % _HALVES].observe(x)  # by its number over all workers, however many they are
        self._images[name].observe(x.flatten(2).double().mean(2) if x.ndim > 2 else x)

    def _pooled(self) -> tuple[dict[str, Moments], dict[str, list[Moments]], dict[str, Moments]]:
        """Collective: over all workers, by layer: all moments, those of each half of the groups, and of image means."""
        flat = [m for name in self._layers for m in (*self._seen[name], self._images[name])]
        pooled = iter(_pool(flat, self._world))
        halves, images, total = {}, {}, {}
        for name in self._layers:
            halves[name] = [next(pooled) for _ in range(_HALVES)]
            images[name] = next(pooled)
            total[name] = Moments.of(halves[name][0].values)
            for half in halves[name][1:]:
                total[name].merge(half)
        return total, halves, images

    def _sampling_error(
        self, total: dict[str, Moments], halves: dict[str, list[Moments]], images: dict[str, Moments]
    ) -> float:
        return _worst(
            (images[name].variance / max(1, images[name].count) / total[name].variance).sqrt() for name in self._layers
        )


def _worst(errors: Iterable[Tensor]) -> float:
    """Of errors per channel of each layer: the largest root mean square. Channels that never vary have none."""
    return max((float(e.nan_to_num(0, 0, 0).square().mean().sqrt()) for e in errors), default=0.0)


def _pool(moments: list[Moments], world: World) -> list[Moments]:
    """Collective: each one's values over all workers, merged in the order of their ranks on every worker."""
    if not moments:
        return []
    flat = torch.cat([m.values for m in moments], dim=1)
    widths = [m.values.shape[1] for m in moments]
    pooled = [Moments(width, world.device) for width in widths]
    for one in stacked(world, flat):
        for merged, values in zip(pooled, one.split(widths, dim=1), strict=True):
            merged.merge(Moments.of(values))
    return pooled


@contextlib.contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, BatchNorm's statistics are as before it, bit for bit."""
    kept = [(b, b.clone()) for layer in batchnorm.layers(model).values() for b in layer.buffers()]
    try:
        yield
    except BaseException:
        for buffer, before in kept:
            buffer.copy_(before)
        raise
