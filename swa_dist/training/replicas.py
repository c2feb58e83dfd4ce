"""Workers that train by themselves: the mean of their weights, and setting them all to it.

With `average.sync: local` there is no DDP: each worker, a replica, steps on its own share of each global batch. The
average of an averaging point is over the replicas too, by an all-reduce. Every `average.sync_every` batches the
weights and momentum of the replicas are set to their mean (post-local SGD, Lin et al. 2020); with `never` they meet in
the average alone (SWAP, Gupta et al. 2020). BatchNorm's running statistics are pooled as with DDP; each average is
recalibrated.
"""

import torch
from torch import Tensor

from swa_dist.training.world import World


@torch.no_grad()
def mean_of(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Collective: the mean over the workers of each tensor, the same on all; float32. The tensors stay as they are."""
    return {name: world.sum_(t.detach().float().clone()).div_(world.size) for name, t in tensors.items()}


@torch.no_grad()
def spread_of(tensors: dict[str, Tensor], world: World) -> float:
    """Collective: the largest difference between workers of any element, by all-reduced maxima of x and of -x."""
    largest = [world.max_(torch.stack([t, -t])).sum(0).max() for t in tensors.values()]
    return float(torch.stack(largest).max())


@torch.no_grad()
def synchronise_(model: torch.nn.Module, optimizer: torch.optim.SGD, world: World) -> None:
    """Collective: set the parameters and the momentum of all workers to their means."""
    for parameter in model.parameters():
        parameter.copy_(world.sum_(parameter.detach().clone()).div_(world.size))
        momentum = optimizer.state[parameter].get("momentum_buffer")
        # A worker that has not stepped yet has none; the others need its part in the sum.
        summed = world.sum_(torch.zeros_like(parameter) if momentum is None else momentum.clone())
        optimizer.state[parameter]["momentum_buffer"] = summed.div_(world.size)
