"""Fresh BatchNorm statistics for any weights: exact moments over all workers."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swa_dist.errors import DataError
from swa_dist.method.moments import Moments
from swa_dist.training import batchnorm
from swa_dist.training.world import World


@dataclass(frozen=True)
class Recalibration:
    num_layers: int
    num_images: int
    """Over all workers."""
    num_groups: int


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor], world: World) -> Recalibration:
    """Replace the running statistics of `model`, in place, by population moments over the images of all workers.

    `batches`: this worker's images, float32 [images, 3, height, width] on its device; each is normalised by its own
    statistics on the way through, so batches are groups of the recipe. Workers may have unequal numbers or none.
    running_var becomes the population variance M2 / n. Dropout stays off, autocast is off, gradients are not touched.
    Collective. If anything fails the old statistics are still there; in any case each module's mode is.
    """
    layers = batchnorm.layers(model)
    moments = {name: Moments(layer.num_features, world.device) for name, layer in layers.items()}
    counts = torch.zeros(2, dtype=torch.int64, device=world.device)
    modes = {module: module.training for module in model.modules()}
    hooks: list[RemovableHandle] = []
    try:
        model.eval()
        for name, layer in layers.items():
            layer.train()
            hooks.append(layer.register_forward_pre_hook(functools.partial(_observe, moments[name])))
        with batchnorm.unrecorded(model), torch.autocast(world.device.type, enabled=False):
            for images in batches:
                if len(images):
                    model(images)
                    counts += torch.tensor([len(images), 1], device=world.device)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    num_images, num_groups = world.sum_(counts).tolist()
    if num_images == 0:
        raise DataError("BatchNorm must be recalibrated on at least one image, but was given none.")
    _write(layers, _pool(moments, world), num_groups)
    return Recalibration(num_layers=len(layers), num_images=num_images, num_groups=num_groups)


def _observe(moments: Moments, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    moments.observe(inputs[0])


def _pool(moments: dict[str, Moments], world: World) -> dict[str, Moments]:
    """Collective: each layer's moments over all workers, merged in the order of their ranks on every worker."""
    if not moments:
        return {}
    flat = torch.cat([m.values for m in moments.values()], dim=1)
    widths = [m.values.shape[1] for m in moments.values()]
    # One sum of a tensor in which each worker fills its own place is a gather that every backend has.
    places = torch.zeros(world.size, *flat.shape, dtype=flat.dtype, device=flat.device)
    places[world.rank] = flat
    pooled = {name: Moments(width, world.device) for name, width in zip(moments, widths, strict=True)}
    for one in world.sum_(places):
        for merged, values in zip(pooled.values(), one.split(widths, dim=1), strict=True):
            merged.merge(Moments.of(values))
    return pooled


def _write(layers: dict[str, nn.modules.batchnorm._BatchNorm], pooled: dict[str, Moments], num_groups: int) -> None:
    for name, layer in layers.items():
        if pooled[name].count:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(pooled[name].mean)
            layer.running_var.copy_(pooled[name].variance)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(num_groups)
