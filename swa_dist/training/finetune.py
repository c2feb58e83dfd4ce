"""One worker's life: train, average, recalibrate, evaluate. Phases in order, each resumable.

Knows no Ray, MLflow or DALI: loaders, store, tracker and stop signal are handed in.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from swa_dist import models
from swa_dist.config import Cyclical, Recipe
from swa_dist.data.order import Loaders
from swa_dist.errors import CheckpointError, NumericsError, Stopped
from swa_dist.method import schedule as schedules
from swa_dist.method.averaging import WeightAverage
from swa_dist.method.schedule import Schedule, crosses
from swa_dist.storage import Store
from swa_dist.training import loop
from swa_dist.training.batchnorm import RunningStatistics
from swa_dist.training.evaluate import Outcomes, evaluate
from swa_dist.training.recalibrate import recalibrate
from swa_dist.training.state import Row, TrainState, load_entry, save_entry
from swa_dist.training.world import World, agree, broadcast_tensors, on_rank_zero

Parts = dict[str, dict[str, Tensor]]

CHECKPOINTS = "checkpoints"
CANDIDATES = "candidates"

REPLICATED = "replicated"
"""DDP keeps all workers' weights equal, so an all-reduce of the average adds nothing; it proves that they are equal."""

_STOP_EVERY_STEPS = 10


class Tracker(Protocol):
    """Where a run reports to. Called on rank 0; must neither raise nor wait."""

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        """A phase ("train") has come so far, in images."""

    def publish(self, rows: Sequence[Row]) -> None:
        """All metrics so far, each covered by a committed checkpoint. A row that was published before is the same."""

    def warn(self, message: str) -> None: ...


@dataclass(frozen=True)
class Candidate:
    """Weights that were scored on the validation images."""

    name: str
    """start: as shipped. last: the last iterate with the BatchNorm it trained with. last_fresh: with recalibrated
    BatchNorm. swa: the average, recalibrated."""
    outcomes: Outcomes
    facts: dict[str, Any]
    """What it is made of and how long that took."""

    @property
    def entry(self) -> str:
        return f"{CANDIDATES}/{self.name}"


def finetune(
    recipe: Recipe,
    world: World,
    loaders: Loaders,
    store: Store,
    tracker: Tracker,
    should_stop: Callable[[], bool],
) -> dict[str, Candidate]:
    """Run the recipe, from wherever its store got to. `recipe.model.weights` must be a local file, or models.RANDOM.

    Collective; rank 0 alone uses `store` and `tracker`, and any worker may ask to stop. Returns the scored candidates
    by name. Raises Stopped, after a checkpoint was committed, where it was asked to stop.
    """
    run = _Run(recipe, world, loaders, store, tracker, should_stop)
    candidates = {"start": run.score("start", run.fresh_model, recalibrated=False)}
    state = run.resume()
    run.train(state)
    training = {"images": state.position, "seconds": state.seconds, "world_sizes": state.world_sizes}
    candidates["last"] = run.score("last", lambda: state.model, recalibrated=False, training=training)
    candidates["last_fresh"] = run.score("last_fresh", lambda: state.model, recalibrated=True)
    average = {"iterates": state.average.ids, "regime": REPLICATED}
    candidates["swa"] = run.score("swa", lambda: run.averaged(state), recalibrated=True, average=average)
    return candidates


def learning_rate(recipe: Recipe, num_train: int) -> Schedule:
    chosen = recipe.schedule
    plan: Schedule = (
        schedules.Cyclical(chosen.max_lr, chosen.min_lr, chosen.cycle_epochs * num_train)
        if isinstance(chosen, Cyclical)
        else schedules.Constant(chosen.max_lr)
    )
    warmup_images = chosen.warmup_epochs * num_train
    return schedules.WarmUp(plan, warmup_images) if warmup_images else plan


def averaging_period(recipe: Recipe, num_train: int) -> int:
    """Images between the iterates of the average: a cycle, or an epoch of a schedule without cycles."""
    cycle = recipe.schedule.cycle_epochs if isinstance(recipe.schedule, Cyclical) else 1
    return cycle * num_train


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    world: World
    loaders: Loaders
    store: Store
    tracker: Tracker
    should_stop: Callable[[], bool]

    def fresh_model(self) -> nn.Module:
        """Collective: the starting weights. Only rank 0 need see their file."""
        model = models.build(self.recipe.model, self.recipe.seed)
        on_rank_zero(self.world, lambda: models.load(model, self.recipe.model))
        model.to(self.world.device)
        model.load_state_dict(broadcast_tensors(self.world, model.state_dict()))
        return model

    def resume(self) -> TrainState:
        """Collective: the state of the newest valid checkpoint, or of the start."""
        model = self.fresh_model()
        optimizer = loop.sgd(model, models.head_names(model), self.recipe)
        state = TrainState(model=model, optimizer=optimizer, average=WeightAverage())

        def newest() -> tuple[Parts, dict[str, Any]] | None:
            self.store.sweep(CHECKPOINTS)
            name = self.store.newest(CHECKPOINTS, self.tracker.warn)
            return load_entry(self.store, name) if name else None

        found = newest() if self.world.rank == 0 else None
        facts = on_rank_zero(self.world, lambda: found[1] if found else None)
        if facts is not None:
            names = on_rank_zero(self.world, lambda: list(found[0]) if found else [])
            state.restore({n: broadcast_tensors(self.world, found[0][n] if found else None) for n in names}, facts)
            on_rank_zero(self.world, lambda: self.tracker.publish(state.rows))
        state.world_sizes.append(self.world.size)
        return state

    def train(self, state: TrainState) -> None:
        """Collective: all epochs from where `state` is, a checkpoint at the end of each."""
        recipe, world, num_train = self.recipe, self.world, self.loaders.num_train
        end = recipe.optim.epochs * num_train
        if state.position >= end:
            return
        network = world.wrap(state.model)
        state.model.train()
        # DDP settles its gradient buckets, and so the order of its sums, after a first backward pass: have that behind
        # us, so that a resumed run adds up in the order of an undisturbed one.
        for _ in range(2):
            loop.take_part(state.model, network, recipe, world)
        state.optimizer.zero_grad()
        if recipe.average.include_start and state.position == 0:
            self._collect(state)
        running, tallies = RunningStatistics(state.model, world), _Tallies(world)
        while state.position < end:
            self._epoch(state, network, running, tallies, end)
            self._commit(state)
            if state.position < end and self._asked_to_stop():
                self._stop(state.position)

    def _epoch(
        self, state: TrainState, network: nn.Module, running: RunningStatistics, tallies: "_Tallies", end: int
    ) -> None:
        recipe, world, num_train = self.recipe, self.world, self.loaders.num_train
        epoch = state.position // num_train
        batches = self.loaders.train(epoch, state.position - epoch * num_train)
        schedule = learning_rate(recipe, num_train)
        period = averaging_period(recipe, num_train)
        tallies.begin_epoch()
        running.split()
        for number, info in enumerate(loop.steps(state, network, running, batches, schedule, recipe, world), start=1):
            tallies.add(info.tally)
            if crosses(info.start, info.stop, period) and info.stop > recipe.average.start_epoch * num_train:
                self._collect(state)
            last = info.stop == (epoch + 1) * num_train
            if last or number % recipe.tracking.log_every_steps == 0:
                self._row(state, tallies.take_steps(), info.lr)
            if world.rank == 0:
                note = f"epoch {epoch + 1}/{recipe.optim.epochs}, learning rate {info.lr:.2g}, {tallies.loss}"
                self.tracker.progress("train", info.stop, end, note)
            if not last and number % _STOP_EVERY_STEPS == 0 and self._asked_to_stop():
                running.settle()
                state.seconds += tallies.seconds
                self._commit(state)
                self._stop(state.position)
        running.settle()
        state.seconds += tallies.seconds
        self._row(state, tallies.take_epoch(), None)

    def score(self, name: str, make: Callable[[], nn.Module], *, recalibrated: bool, **facts: Any) -> Candidate:
        """Collective: score the weights that `make` gives and keep both, or read what an earlier attempt kept."""
        found = on_rank_zero(self.world, lambda: self._scored(name))
        if found is not None:
            return found
        if self._asked_to_stop():
            self._stop(None)
        model = make()
        if recalibrated:
            began = time.monotonic()
            num_images = self._recalibration_images()
            report = recalibrate(model, self._reported(f"recalibrate {name}", num_images), self.world)
            facts["recalibration"] = asdict(report) | {"seconds": time.monotonic() - began}
        began = time.monotonic()
        outcomes = evaluate(
            model,
            self.loaders.validation(),
            self.loaders.num_val,
            self.recipe,
            self.world,
            lambda done: self._progress(f"evaluate {name}", min(done, self.loaders.num_val), self.loaders.num_val),
        )
        facts["evaluation"] = {"num_images": self.loaders.num_val, "seconds": time.monotonic() - began}
        candidate = Candidate(name=name, outcomes=outcomes, facts=facts)
        parts = {"model": model.state_dict(), "outcomes": outcomes.tensors()}
        on_rank_zero(self.world, lambda: save_entry(self.store, candidate.entry, parts, facts))
        return candidate

    def averaged(self, state: TrainState) -> nn.Module:
        """Collective: the model with the average's weights, which are proved to be the same on all workers."""
        average = state.average.mean()
        spread = self._spread({name: average[name] for name, _ in state.model.named_parameters()})
        if spread != 0:
            raise NumericsError(
                f"replicas of the average must be equal, but differ by up to {spread:g}. A worker's memory or"
                " arithmetic is at fault; run again, if need be without that machine."
            )
        model = models.build(self.recipe.model, self.recipe.seed).to(self.world.device)
        model.load_state_dict(average)
        return model

    def _scored(self, name: str) -> Candidate | None:
        entry = f"{CANDIDATES}/{name}"
        if not self.store.has(entry):
            return None
        try:
            parts, facts = load_entry(self.store, entry)
        except CheckpointError as error:
            self.tracker.warn(f"{error} It is made again.")
            self.store.remove(entry)
            return None
        return Candidate(name=name, outcomes=Outcomes.of(parts["outcomes"]), facts=facts)

    def _collect(self, state: TrainState) -> None:
        """Collective: take the weights into the average, once they are proved to be the same on all workers."""
        agree(self.world, _digest(state.model), f"the weights at image {state.position}")
        state.average.collect(state.model, id=state.position)

    def _spread(self, tensors: dict[str, Tensor]) -> float:
        """Collective: the largest difference between workers of any element: all-reduced maxima of x and of -x."""
        largest = [self.world.max_(torch.stack([t, -t])).sum(0).max() for t in tensors.values()]
        return float(torch.stack(largest).max())

    def _commit(self, state: TrainState) -> None:
        """Collective: one checkpoint; then its metrics are out for good, and older checkpoints go."""

        def commit() -> None:
            save_entry(self.store, f"{CHECKPOINTS}/{state.position:012d}", state.parts(), state.facts())
            self.tracker.publish(state.rows)
            for name in self.store.names(CHECKPOINTS)[: -self.recipe.checkpoint.keep_last]:
                self.store.remove(name)

        on_rank_zero(self.world, commit)

    def _row(self, state: TrainState, metrics: dict[str, float], lr: float | None) -> None:
        if not all(math.isfinite(value) for value in metrics.values()):
            raise NumericsError(
                f"the loss must be finite, but is not at image {state.position}"
                f" (epoch {state.position / self.loaders.num_train:.2f}). Lower `schedule.max_lr`; the last good"
                " checkpoint is kept."
            )
        state.rows.append(
            {
                "position": state.position,
                "epoch": state.position / self.loaders.num_train,
                "time_ms": time.time_ns() // 1_000_000,
                "metrics": metrics | ({} if lr is None else {"train/lr": lr}),
            }
        )

    def _recalibration_images(self) -> int:
        wanted = self.recipe.recalibrate.images
        return self.loaders.num_train if wanted == "all" else min(wanted, self.loaders.num_train)

    def _reported(self, phase: str, num_images: int) -> Iterator[Tensor]:
        done = 0
        for group in self.loaders.recalibration(num_images):
            yield group.images
            done += len(group.images)
            self._progress(phase, min(done * self.world.size, num_images), num_images)

    def _progress(self, phase: str, done: int, total: int) -> None:
        if self.world.rank == 0:
            self.tracker.progress(phase, done, total)

    def _asked_to_stop(self) -> bool:
        """Collective: whether any worker was asked to stop; the same answer on all."""
        asked = torch.tensor(int(self.should_stop()), device=self.world.device)
        return bool(self.world.max_(asked))

    def _stop(self, position: int | None) -> NoReturn:
        where = "" if position is None else f" at image {position} (epoch {position / self.loaders.num_train:.2f})"
        raise Stopped(f"the run was asked to stop and did{where}; its state is saved. The same command resumes it.")


class _Tallies:
    """Sums of a worker's steps, since the last row and since the epoch began."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.loss = "no loss yet"
        """As of the last row, over all workers; for people."""
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self._steps = torch.zeros(3, dtype=torch.float64, device=self._world.device)
        self._epoch = torch.zeros_like(self._steps)
        self._began = self._row_began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def add(self, tally: Tensor) -> None:
        self._steps += tally

    def take_steps(self) -> dict[str, float]:
        """Collective: metrics of the steps since the last time."""
        self._world.sum_(self._steps)
        self._epoch += self._steps
        loss, correct, images = self._steps.tolist()
        self._steps.zero_()
        now = time.monotonic()
        rate = images / (now - self._row_began)
        self._row_began = now
        self.loss = f"loss {loss / images:.3f}"
        return {"train/loss": loss / images, "train/top1": 100 * correct / images, "train/images_per_second": rate}

    def take_epoch(self) -> dict[str, float]:
        """Metrics of the epoch, or what a restart left of it. After `take_steps`."""
        loss, correct, images = self._epoch.tolist()
        return {
            "epoch/loss": loss / images,
            "epoch/top1": 100 * correct / images,
            "epoch/images_per_second": images / self.seconds,
        }


def _digest(model: nn.Module) -> str:
    """SHA-256 of the parameters, 16 digits of it."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
