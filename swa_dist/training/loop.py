"""Training: one optimizer step on one screen. What happens between steps is the caller's `for`."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swa_dist.config import Recipe
from swa_dist.data.order import Batch
from swa_dist.method.schedule import Schedule
from swa_dist.training import batchnorm
from swa_dist.training.batchnorm import RunningStatistics
from swa_dist.training.guard import length_of
from swa_dist.training.state import TrainState
from swa_dist.training.world import World


@dataclass(frozen=True)
class StepInfo:
    start: int
    """Position of the run before the step, in images."""
    stop: int
    """Position after it."""
    lr: float
    tally: Tensor
    """This worker's [sum of losses, correct, images] of the step, float64, on its device."""
    left_out: dict[int, str] | None
    """This worker's images of the step that could not be decoded, by their places in the index; None where no worker
    has any."""
    skipped: str | None
    """Why the step was not taken: the weights, the momentum and BatchNorm are as before it. None: it was."""


def steps(
    state: TrainState,
    network: nn.Module,
    running: RunningStatistics,
    batches: Iterable[Batch],
    schedule: Schedule,
    recipe: Recipe,
    world: World,
) -> Iterator[StepInfo]:
    """Train on `batches`, one optimizer step for each. `network` is `state.model` as `world.wrap` gave it.

    With `average.sync: local` it is `state.model` itself: each worker steps on the mean over its own share of
    the batch, or not at all if it has none; in any case collective. `running` must be split; the caller settles it
    before BatchNorm's running statistics are read.
    """
    local = recipe.average.sync == "local"
    for batch in batches:
        start, stop = state.position, state.position + batch.num_images
        lr = schedule.rate(start, stop)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = lr * parameters["lr_multiplier"]
        tally = torch.zeros(3, dtype=torch.float64, device=world.device)
        running.remember()
        if local:
            weight = 1 / max(1, sum(len(group.labels) for group in batch.groups))
        else:
            # DDP takes the workers' mean, whatever their shares: this makes it the mean over the images, but for those
            # that are left out, whose number is not known yet.
            weight = world.size / batch.num_images
        others = 0  # groups of this batch that other workers run and `running` has decayed for
        for i, group in enumerate(batch.groups):
            number = world.rank + i * world.size  # of the group in the global batch
            running.skip(number - i - others)
            others = number - i
            torch.manual_seed(recipe.seed + start + number)  # dropout depends on the group, not on who runs it
            with contextlib.nullcontext() if i == len(batch.groups) - 1 else unsynchronised(network):
                with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    logits = network(group.images).float()
                losses = F.cross_entropy(
                    logits, group.labels, reduction="none", label_smoothing=recipe.optim.label_smoothing
                )
                torch.autograd.backward(losses.sum() * weight)
            with torch.no_grad():
                correct = logits.argmax(1) == group.labels
                tally += torch.stack(
                    [losses.sum().double(), correct.sum().double(), torch.ones_like(losses).sum().double()]
                )
        running.skip(batch.num_groups - len(batch.groups) - others)
        if not batch.groups and not local:
            take_part(state.model, network, recipe, world)
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        left_out = {i: why for group in batch.groups for i, why in group.left_out.items()}
        some = torch.tensor(bool(left_out), dtype=torch.float64, device=world.device)
        length, any_left_out = world.max_(torch.stack([length_of(tally[0], gradients), some])).tolist()
        if any_left_out and not local:
            torch._foreach_mul_(gradients, batch.num_images / float(world.sum_(tally[2].clone())))
        skipped = state.guard.refuses(start, length)
        if skipped is not None:
            running.undo()
        elif gradients:
            state.optimizer.step()
        state.optimizer.zero_grad()
        state.position = stop
        yield StepInfo(
            start=start, stop=stop, lr=lr, tally=tally, left_out=left_out if any_left_out else None, skipped=skipped
        )


def take_part(model: nn.Module, network: nn.Module, recipe: Recipe, world: World) -> None:
    """Collective: a backward pass that adds nothing, for a worker that has no group while the others have."""
    size = recipe.data.image_size
    with batchnorm.unrecorded(model):
        (network(torch.zeros(2, 3, size, size, device=world.device)).sum() * 0.0).backward()


def unsynchronised(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block gradients add up on this worker alone."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def sgd(model: nn.Module, head: frozenset[str], recipe: Recipe) -> torch.optim.SGD:
    """Plain SGD with momentum; `steps` sets the learning rate. `head`: the names that `head_lr_multiplier` is for."""
    named = list(model.named_parameters())
    return torch.optim.SGD(
        [
            {"params": [p for n, p in named if n not in head], "lr_multiplier": 1.0},
            {"params": [p for n, p in named if n in head], "lr_multiplier": recipe.optim.head_lr_multiplier},
        ],
        lr=0.0,
        momentum=recipe.optim.momentum,
        weight_decay=recipe.optim.weight_decay,
    )
