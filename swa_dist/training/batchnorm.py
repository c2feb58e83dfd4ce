"""BatchNorm in train mode: running statistics for any number of workers, and passes that leave none."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swa_dist.training.world import World, stacked


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by name; one that is used in several places once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


class RunningStatistics:
    """The running statistics of one worker's BatchNorm layers, as its part of those of all workers.

    One process that ran all groups in order would have r <- (1 - m) r + m s for each group's statistics s. That is
    linear, so each worker runs it over its own groups and decays for the groups of the others; the workers' sum is what
    the one process has. Between `split` and `settle` the buffers are parts, of no use by themselves; train mode doesn't
    read them.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._decaying: dict[float, list[Tensor]] = {}
        self._counts: list[Tensor] = []
        for layer in layers(model).values():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            if layer.momentum is None:
                raise ValueError("BatchNorm's `momentum` must be a number, but is None (a cumulative average).")
            self._decaying.setdefault(layer.momentum, []).extend([layer.running_mean, layer.running_var])
            assert layer.num_batches_tracked is not None
            self._counts.append(layer.num_batches_tracked)
        self._buffers = [b for group in self._decaying.values() for b in group]
        self._before = [b.clone() for b in self._buffers + self._counts]

    @torch.no_grad()
    def split(self) -> None:
        """Begin: rank 0 keeps what all workers have, the others' parts are nothing."""
        if self._world.rank != 0:
            torch._foreach_zero_(self._buffers + self._counts)

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step: what `undo` goes back to."""
        if self._before:
            torch._foreach_copy_(self._before, self._buffers + self._counts)

    @torch.no_grad()
    def undo(self) -> None:
        """As it was at `remember`, bit for bit."""
        if self._before:
            torch._foreach_copy_(self._buffers + self._counts, self._before)

    @torch.no_grad()
    def skip(self, num_groups: int) -> None:
        """Decay for groups that other workers run."""
        if num_groups:
            for momentum, buffers in self._decaying.items():
                torch._foreach_mul_(buffers, (1 - momentum) ** num_groups)

    @torch.no_grad()
    def settle(self) -> None:
        """Collective: end; every worker has the statistics of all."""
        if self._buffers and self._world.size > 1:
            self._write(self._world.sum_(self._flat()), self._world.sum_(torch.stack(self._counts)))

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """Collective: all workers' parts, between `split` and `settle`: "statistics" float32 [workers, values] and
        "counts" int64 [workers, layers], on the CPU. The sum in another order has other bits, so it won't do."""
        if not self._buffers:
            return {}
        own = {"statistics": self._flat(), "counts": torch.stack(self._counts)}
        return {name: stacked(self._world, values).cpu() for name, values in own.items()}

    @torch.no_grad()
    def restore(self, parts: dict[str, Tensor]) -> None:
        """In place of `split`: go on from `parts`. For another number of workers rank 0 gets all of it."""
        if not self._buffers:
            return
        statistics, counts = parts["statistics"], parts["counts"]
        if len(statistics) == self._world.size:
            self._write(statistics[self._world.rank], counts[self._world.rank])
        else:
            self._write(statistics.sum(0), counts.sum(0))
            self.split()

    def _flat(self) -> Tensor:
        return torch.cat([b.flatten() for b in self._buffers])

    def _write(self, statistics: Tensor, counts: Tensor) -> None:
        for buffer, values in zip(
            self._buffers, torch.split(statistics, [b.numel() for b in self._buffers]), strict=True
        ):
            buffer.copy_(values.view_as(buffer))
        for count, value in zip(self._counts, counts, strict=True):
            count.copy_(value)


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """After the block each module is in train or evaluation mode as it was before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """Within the block BatchNorm in train mode normalises by its batch and leaves the running statistics alone.

    So does SyncBatchNorm: it doesn't look at the other workers' batches, which may not be there.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers(model).values():
            stack.callback(setattr, layer, "track_running_stats", layer.track_running_stats)
            layer.track_running_stats = False
            if isinstance(layer, nn.SyncBatchNorm):
                layer.forward = functools.partial(_normalised_alone, layer)  # type: ignore[method-assign]
                stack.callback(layer.__dict__.pop, "forward")
        yield


def _normalised_alone(layer: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    if layer.training:
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
