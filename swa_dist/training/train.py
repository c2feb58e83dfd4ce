"""The training phase: epochs of steps, what the averages take from them, a checkpoint at each epoch's end."""

import hashlib
import math
import time
from fractions import Fraction

import torch
from torch import Tensor, nn

from swa_dist.config import PAPER_GLOBAL_BATCH, Constant, Cyclical, Linear, Recipe
from swa_dist.errors import NumericsError
from swa_dist.method import schedule as schedules
from swa_dist.method.averaging import buffers_of, first_non_finite, parameters_of
from swa_dist.method.schedule import Schedule, crosses
from swa_dist.training import loop, replicas
from swa_dist.training.batchnorm import RunningStatistics
from swa_dist.training.checkpoints import Checkpoints
from swa_dist.training.ports import Ports
from swa_dist.training.state import TrainState
from swa_dist.training.world import World, agree


def train(ports: Ports, state: TrainState) -> None:
    """Collective: all epochs from where `state` is. Returns once its last checkpoint is committed."""
    recipe, world, num_train = ports.recipe, ports.world, ports.loaders.num_train
    end = recipe.optim.epochs * num_train
    if state.position >= end:
        return
    state.model.train()
    network = state.model if ports.local else _wrapped(ports, state)
    if state.position == 0 and recipe.average.include_start:
        _collect(ports, state)
    if state.position % num_train == 0:
        state.averages.epoch_ended(state.position // num_train)
    running, tallies = RunningStatistics(state.model, world), _Tallies(world)
    with Checkpoints(ports) as checkpoints:
        while state.position < end:
            _epoch(ports, state, network, running, tallies, checkpoints, end)
            checkpoints.save(state)
            if state.position < end and ports.asked_to_stop():
                checkpoints.settle()
                ports.stop(state.position)
        checkpoints.settle()


def _epoch(
    ports: Ports,
    state: TrainState,
    network: nn.Module,
    running: RunningStatistics,
    tallies: "_Tallies",
    checkpoints: Checkpoints,
    end: int,
) -> None:
    recipe, world, num_train = ports.recipe, ports.world, ports.loaders.num_train
    epoch = state.position // num_train
    begin = epoch * num_train
    batches = ports.loaders.train(epoch, state.position - begin, state.left_out)
    schedule = learning_rate(recipe, num_train)
    _begin(state, running, tallies)
    for info in loop.steps(state, network, running, batches, schedule, recipe, world):
        if info.skipped is None:
            tallies.add(info.tally)
        else:
            _skipped(ports, state, info)
        if info.left_out is not None:
            state.left_out |= ports.note_left_out("train", info.left_out, state.left_out)
        _average(ports, state, info)
        last = info.stop == begin + num_train
        if last or math.ceil((info.stop - begin) / recipe.data.global_batch) % recipe.tracking.log_every_steps == 0:
            _row(ports, state, tallies.take_steps() | _so_far(ports, state, info))
        note = f"epoch {epoch + 1}/{recipe.optim.epochs}, learning rate {info.lr:.2g}, {tallies.loss}"
        ports.tracker.progress("train", info.stop, end, note)
        stop, save, failed = ports.any_worker(ports.should_stop(), checkpoints.due, checkpoints.failed)
        if failed:
            checkpoints.settle()
        if not last and (stop or save):
            state.running, state.tallies = running.parts(), tallies.facts()
            checkpoints.save(state)
        if stop and not last:
            checkpoints.settle()
            ports.stop(state.position)
    running.settle()
    state.seconds += tallies.seconds
    state.running, state.tallies = {}, {}
    state.averages.epoch_ended(epoch + 1)
    _row(ports, state, tallies.take_epoch())


def _begin(state: TrainState, running: RunningStatistics, tallies: "_Tallies") -> None:
    """An epoch, or what a checkpoint within it left of it."""
    tallies.begin_epoch(state.tallies)
    if state.running:
        running.restore(state.running)
    else:
        running.split()


def _so_far(ports: Ports, state: TrainState, info: loop.StepInfo) -> dict[str, float]:
    return {
        "train/epoch": state.position / ports.loaders.num_train,
        "train/lr": info.lr,
        "train/skipped": len(state.guard.skipped),
        "train/images_left_out": len(state.left_out),
    }


def _skipped(ports: Ports, state: TrainState, info: loop.StepInfo) -> None:
    """Collective: say that a step was not taken, and whose loss is to blame; end the run where it is one of many."""
    where = f"at image {info.start} (epoch {info.start / ports.loaders.num_train:.2f})"
    losses = ports.world.gather(bool(torch.isfinite(info.tally[0])))
    blame = [rank for rank, finite in enumerate(losses) if not finite]
    whose = f" The loss is not finite on rank {', '.join(map(str, blame))}." if blame else ""
    if ports.world.rank == 0:
        ports.tracker.warn(f"{where} no step was taken: {info.skipped}.{whose}")
    if state.guard.exhausted:
        raise NumericsError(
            f"gradients must be usable, but {state.guard.in_a_row} in a row were not, up to that {where}:"
            f" {info.skipped}.{whose} The last good checkpoint is kept; lower the learning rate, or look at the images."
        )


def _average(ports: Ports, state: TrainState, info: loop.StepInfo) -> None:
    """Collective: what the averages take from a step, and the meeting of replicas that train by themselves."""
    recipe, num_train = ports.recipe, ports.loaders.num_train
    after_start = info.stop > recipe.average.start_epoch * num_train
    if after_start and info.skipped is None:
        state.averages.step(state.model, info.stop, (info.stop - info.start) / recipe.data.global_batch)
    if after_start and crosses(info.start, info.stop, recipe.averaging_epochs * num_train):
        _collect(ports, state)
    every = recipe.average.sync_every
    if ports.local and every != "never" and crosses(info.start, info.stop, every * recipe.data.global_batch):
        replicas.synchronise_(state.model, state.optimizer, ports.world)


def _collect(ports: Ports, state: TrainState) -> None:
    """Collective: take the weights into the average: the mean over replicas that train by themselves, or else the
    weights of all, once they are proved to be the same."""
    weights = parameters_of(state.model)
    checked = weights | state.averages.sums()
    _refuse_non_finite(ports, checked, state.position)
    if not ports.local:
        agree(ports.world, _digest(checked), f"the weights at image {state.position}")
    _row(ports, state, {"average/spread": replicas.spread_of(weights, ports.world)})
    if ports.local:
        weights = replicas.mean_of(weights, ports.world)
    state.averages.collect(weights, buffers_of(state.model), id=state.position)


def _refuse_non_finite(ports: Ports, weights: dict[str, Tensor], position: int) -> None:
    """Collective: raise NumericsError on every worker, before anything is averaged, where one has a bad weight."""
    for rank, name in enumerate(ports.world.gather(first_non_finite(weights))):
        if name is not None:
            raise NumericsError(
                f"weights must be finite to be averaged, but `{name}` on rank {rank} is not, at image {position} (epoch"
                f" {position / ports.loaders.num_train:.2f}). The average was left as it was; lower the learning rate."
            )


def _wrapped(ports: Ports, state: TrainState) -> nn.Module:
    """Collective. DDP settles its gradient buckets, and so the order of its sums, after a first backward pass: have
    that behind us, so that a resumed run adds up in the order of an undisturbed one."""
    network = ports.world.wrap(state.model)
    for _ in range(2):
        loop.take_part(state.model, network, ports.recipe, ports.world)
    state.optimizer.zero_grad()
    return network


def _row(ports: Ports, state: TrainState, metrics: dict[str, float]) -> None:
    if not all(math.isfinite(value) for value in metrics.values()):
        raise NumericsError(
            f"the loss must be finite, but is not at image {state.position}"
            f" (epoch {state.position / ports.loaders.num_train:.2f}). Lower the learning rate; the last good"
            " checkpoint is kept."
        )
    state.rows.append(
        {
            "position": state.position,
            "epoch": state.position / ports.loaders.num_train,
            "time_ms": time.time_ns() // 1_000_000,
            "metrics": metrics,
        }
    )


def learning_rate(recipe: Recipe, num_train: int) -> Schedule:
    """The recipe's schedule over the images of a run."""
    chosen, run_images = recipe.schedule, recipe.optim.epochs * num_train
    plan: Schedule
    if isinstance(chosen, Cyclical):
        plan = schedules.Cyclical(chosen.max_lr, chosen.min_lr, recipe.cycle_epochs * num_train)
    elif isinstance(chosen, Constant):
        start_lr = chosen.lr if chosen.start_lr == "same" else chosen.start_lr
        plan = schedules.Constant(chosen.lr, start_lr, Fraction(chosen.ramp_epochs) * num_train)
    elif isinstance(chosen, Linear):
        plan = schedules.Linear(chosen.max_lr, chosen.min_lr, run_images)
    else:
        plan = schedules.Cosine(chosen.max_lr, chosen.min_lr, run_images)
    batches = recipe.data.global_batch / PAPER_GLOBAL_BATCH
    factor = {"none": 1.0, "linear": batches, "sqrt": math.sqrt(batches)}[recipe.optim.scale_lr]
    if factor != 1:
        plan = schedules.Scaled(plan, factor)
    warmup_images = Fraction(chosen.warmup_epochs) * num_train
    return schedules.WarmUp(plan, warmup_images) if warmup_images else plan


class _Tallies:
    """Sums of a worker's steps, since the last row and since the epoch began."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.loss = "no loss yet"
        """As of the last row, over all workers; for people."""
        self.begin_epoch({})

    def begin_epoch(self, facts: dict[str, list[float]]) -> None:
        """`facts`: those of the part of the epoch that an earlier attempt did; {} where it begins."""
        mine = facts if self._world.rank == 0 else {}  # they are of all workers together
        steps, epoch = mine.get("steps", [0.0] * 3), facts.get("epoch", [0.0] * 3)
        self._steps = torch.tensor(steps, dtype=torch.float64, device=self._world.device)
        self._epoch = torch.tensor(epoch, dtype=torch.float64, device=self._world.device)
        of_epoch, of_row = facts.get("seconds", [0.0, 0.0])
        now = time.monotonic()
        self._began, self._row_began = now - of_epoch, now - of_row

    def facts(self) -> dict[str, list[float]]:
        """Collective: what `begin_epoch` goes on from."""
        now = time.monotonic()
        return {
            "steps": self._world.sum_(self._steps.clone()).tolist(),
            "epoch": self._epoch.tolist(),
            "seconds": [now - self._began, now - self._row_began],
        }

    @property
    def seconds(self) -> float:
        """Since the epoch began, without what lay between attempts."""
        return time.monotonic() - self._began

    def add(self, tally: Tensor) -> None:
        self._steps += tally

    def take_steps(self) -> dict[str, float]:
        """Collective: metrics of the steps since the last time; none where all of them were skipped."""
        self._world.sum_(self._steps)
        self._epoch += self._steps
        loss, correct, images = self._steps.tolist()
        self._steps.zero_()
        now = time.monotonic()
        seconds, self._row_began = now - self._row_began, now
        if not images:
            return {}
        self.loss = f"loss {loss / images:.3f}"
        return {
            "train/loss": loss / images,
            "train/top1": 100 * correct / images,
            "train/images_per_second": images / seconds,
        }

    def take_epoch(self) -> dict[str, float]:
        """Metrics of the epoch. After `take_steps`."""
        loss, correct, images = self._epoch.tolist()
        if not images:
            return {}
        return {
            "epoch/loss": loss / images,
            "epoch/top1": 100 * correct / images,
            "epoch/images_per_second": images / self.seconds,
        }


def _digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the weights, 16 digits of it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
