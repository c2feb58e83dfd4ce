"""One worker's life: train, average, recalibrate, evaluate. Phases in order, each resumable.

Knows no Ray, MLflow or DALI: loaders, store, tracker and stop signal are handed in.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from swa_dist import models
from swa_dist.config import PAPER_GLOBAL_BATCH, Constant, Cyclical, Linear, Recipe
from swa_dist.data.order import Loaders
from swa_dist.errors import CheckpointError, ConfigError, NumericsError, Stopped
from swa_dist.method import schedule as schedules
from swa_dist.method.averaging import buffers_of, parameters_of
from swa_dist.method.schedule import Schedule, crosses
from swa_dist.storage import Store
from swa_dist.training import loop, preflight, replicas
from swa_dist.training.averages import Averages, Parts
from swa_dist.training.batchnorm import RunningStatistics
from swa_dist.training.evaluate import Outcomes, evaluate
from swa_dist.training.recalibrate import recalibrate_as
from swa_dist.training.state import Row, TrainState, load_entry, save_entry
from swa_dist.training.world import World, agree, broadcast_tensors, on_rank_zero

CHECKPOINTS = "checkpoints"
CANDIDATES = "candidates"

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
    BatchNorm. swa, swa_5 (after 5 epochs), ema, window: averages, recalibrated."""
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
    by name. Raises Stopped, after a checkpoint was committed, where it was asked to stop, and DataError before any
    training where the starting weights are not what they are known to be.
    """
    run = _Run(recipe, world, loaders, store, tracker, should_stop)
    candidates = {"start": run.score("start", run.fresh_model, recalibrated=False)}
    run.preflight(candidates["start"])
    state = run.resume()
    run.train(state)
    training = {"images": state.position, "seconds": state.seconds, "world_sizes": state.world_sizes}
    candidates["last"] = run.score("last", lambda: run.last_iterate(state), recalibrated=False, training=training)
    candidates["last_fresh"] = run.score("last_fresh", lambda: run.last_iterate(state), recalibrated=True)
    ids = state.averages.ids()
    for name, mean in state.averages.means(state.model).items():
        facts = {"iterates": ids.get(name), "regime": recipe.average.sync}
        make = functools.partial(run.averaged, name, mean)
        candidates[name] = run.score(name, make, recalibrated=True, average=facts)
    return candidates


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


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    world: World
    loaders: Loaders
    store: Store
    tracker: Tracker
    should_stop: Callable[[], bool]

    @property
    def local(self) -> bool:
        """Whether each worker trains by itself."""
        return self.recipe.average.sync == "local"

    def fresh_model(self) -> nn.Module:
        """Collective: the starting weights. Only rank 0 need see their file."""
        model = models.build(self.recipe.model, self.recipe.seed)
        on_rank_zero(self.world, lambda: models.load(model, self.recipe.model))
        model.to(self.world.device)
        model.load_state_dict(broadcast_tensors(self.world, model.state_dict()))
        return model

    def preflight(self, start: Candidate) -> None:
        """Compare the starting weights with what they are known to have, before anything is spent."""
        found = preflight.check(start.outcomes.metrics()["top1"], self.loaders.num_val, self.recipe)
        if found.problem is not None and self.recipe.evaluate.preflight == "stop":
            raise found.problem
        on_rank_zero(self.world, lambda: self.tracker.warn(found.sentence) if found.sentence else None)

    def resume(self) -> TrainState:
        """Collective: the state of the newest valid checkpoint, of the run to be extended, or of the start."""
        if self.local and self.world.size != self.recipe.average.num_replicas:
            raise ConfigError(
                f"`average.num_replicas` must be the number of workers ({self.world.size}) where `average.sync` is"
                f" local, but is {self.recipe.average.num_replicas}. Run it on as many."
            )
        model = self.fresh_model()
        optimizer = loop.sgd(model, models.head_names(model), self.recipe)
        state = TrainState(model=model, optimizer=optimizer, averages=Averages(self.recipe.average))
        found = self._newest_on_rank_zero()
        facts = on_rank_zero(self.world, lambda: found[1] if found else None)
        if facts is not None:
            names = on_rank_zero(self.world, lambda: list(found[0]) if found else [])
            parts = {n: broadcast_tensors(self.world, found[0][n] if found else None) for n in names}
            own = f"replica{self.world.rank}."
            parts |= {n.removeprefix(own): tensors for n, tensors in parts.items() if n.startswith(own)}
            state.restore(parts, facts)
            on_rank_zero(self.world, lambda: self.tracker.publish(state.rows))
        state.world_sizes.append(self.world.size)
        return state

    def train(self, state: TrainState) -> None:
        """Collective: all epochs from where `state` is, a checkpoint at the end of each."""
        recipe, world, num_train = self.recipe, self.world, self.loaders.num_train
        end = recipe.optim.epochs * num_train
        if state.position >= end:
            return
        state.model.train()
        network = state.model if self.local else self._wrapped(state)
        if state.position == 0 and recipe.average.include_start:
            self._collect(state)
        if state.position % num_train == 0:
            state.averages.epoch_ended(state.position // num_train)
        running, tallies = RunningStatistics(state.model, world), _Tallies(world)
        while state.position < end:
            self._epoch(state, network, running, tallies, end)
            self._commit(state)
            if state.position < end and self._asked_to_stop():
                self._stop(state.position)

    def last_iterate(self, state: TrainState) -> nn.Module:
        """Collective: the last iterate; where each worker has its own, rank 0's."""
        model = models.build(self.recipe.model, self.recipe.seed).to(self.world.device)
        model.load_state_dict(broadcast_tensors(self.world, state.model.state_dict()))
        return model

    def averaged(self, name: str, mean: dict[str, Tensor]) -> nn.Module:
        """Collective: a model with an average's weights, which an all-reduce proves to be the same on all workers."""
        model = models.build(self.recipe.model, self.recipe.seed).to(self.world.device)
        model.load_state_dict(mean)
        spread = replicas.spread_of(parameters_of(model), self.world)
        if spread != 0:
            raise NumericsError(
                f"replicas of {name} must be equal, but differ by up to {spread:g}. A worker's memory or arithmetic is"
                " at fault; run again, if need be without that machine."
            )
        return model

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
            report = recalibrate_as(
                self.recipe, model, self.loaders, self.world, functools.partial(self._progress, f"recalibrate {name}")
            )
            if report.num_layers == 0:
                on_rank_zero(self.world, lambda: self.tracker.warn(f"{name} has no BatchNorm to recalibrate."))
            facts["recalibration"] = asdict(report) | {"seconds": time.monotonic() - began}
        began = time.monotonic()
        outcomes = evaluate(
            model,
            self.loaders.validation(),
            self.loaders.num_val,
            self.recipe,
            self.world,
            functools.partial(self._progress, f"evaluate {name}"),
        )
        facts["evaluation"] = {"num_images": self.loaders.num_val, "seconds": time.monotonic() - began}
        candidate = Candidate(name=name, outcomes=outcomes, facts=facts)
        parts = {"model": model.state_dict(), "outcomes": outcomes.tensors()}
        on_rank_zero(self.world, lambda: save_entry(self.store, candidate.entry, parts, facts))
        return candidate

    def _epoch(
        self, state: TrainState, network: nn.Module, running: RunningStatistics, tallies: "_Tallies", end: int
    ) -> None:
        recipe, world, num_train = self.recipe, self.world, self.loaders.num_train
        epoch = state.position // num_train
        batches = self.loaders.train(epoch, state.position - epoch * num_train)
        schedule = learning_rate(recipe, num_train)
        tallies.begin_epoch()
        running.split()
        steps = loop.steps(state, network, running, batches, schedule, recipe, world)
        for number, info in enumerate(steps, start=1):
            tallies.add(info.tally)
            self._average(state, info)
            last = info.stop == (epoch + 1) * num_train
            if last or number % recipe.tracking.log_every_steps == 0:
                self._row(state, tallies.take_steps() | {"train/lr": info.lr})
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
        state.averages.epoch_ended(epoch + 1)
        self._row(state, tallies.take_epoch())

    def _average(self, state: TrainState, info: loop.StepInfo) -> None:
        """Collective: what the averages take from a step, and the meeting of replicas that train by themselves."""
        recipe, num_train = self.recipe, self.loaders.num_train
        after_start = info.stop > recipe.average.start_epoch * num_train
        if after_start:
            state.averages.step(state.model, info.stop, (info.stop - info.start) / recipe.data.global_batch)
        if after_start and crosses(info.start, info.stop, recipe.averaging_epochs * num_train):
            self._collect(state)
        every = recipe.average.sync_every
        if self.local and every != "never" and crosses(info.start, info.stop, every * recipe.data.global_batch):
            replicas.synchronise_(state.model, state.optimizer, self.world)

    def _collect(self, state: TrainState) -> None:
        """Collective: take the weights into the average: the mean over replicas that train by themselves, or else the
        weights of all, once they are proved to be the same."""
        weights = parameters_of(state.model)
        if self.local:
            spread = replicas.spread_of(weights, self.world)
            self._row(state, {"average/spread": spread})
            weights = replicas.mean_of(weights, self.world)
        else:
            agree(self.world, _digest(weights), f"the weights at image {state.position}")
            self._row(state, {"average/spread": 0.0})
        state.averages.collect(weights, buffers_of(state.model), id=state.position)

    def _wrapped(self, state: TrainState) -> nn.Module:
        """Collective. DDP settles its gradient buckets, and so the order of its sums, after a first backward pass: have
        that behind us, so that a resumed run adds up in the order of an undisturbed one."""
        network = self.world.wrap(state.model)
        for _ in range(2):
            loop.take_part(state.model, network, self.recipe, self.world)
        state.optimizer.zero_grad()
        return network

    def _newest_on_rank_zero(self) -> tuple[Parts, dict[str, Any]] | None:
        """Collective: large, so it stays on rank 0; an error there is everyone's."""
        kept: list[tuple[Parts, dict[str, Any]]] = []

        def read() -> None:
            found = self._newest()
            if found is not None:
                kept.append(found)

        on_rank_zero(self.world, read)
        return kept[0] if kept else None

    def _newest(self) -> tuple[Parts, dict[str, Any]] | None:
        self.store.sweep(CHECKPOINTS)
        self.store.sweep(CANDIDATES)
        name = self.store.newest(CHECKPOINTS, self.tracker.warn)
        if name is not None:
            return load_entry(self.store, name)
        if self.recipe.checkpoint.extend_from == "nothing":
            return None
        shorter = Store(Path(self.recipe.checkpoint.extend_from))
        names = shorter.names(CHECKPOINTS)
        if not names:
            raise CheckpointError(
                f"`checkpoint.extend_from` must be the folder of a finished run, but {shorter.root} has no checkpoints."
            )
        return load_entry(shorter, names[-1])

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

    def _commit(self, state: TrainState) -> None:
        """Collective: one checkpoint; then its metrics are out for good, and older checkpoints go."""
        parts = state.parts()
        if self.local:
            for rank in range(self.world.size):
                for part, tensors in state.own_parts().items():
                    sent = broadcast_tensors(self.world, tensors, source=rank)
                    if self.world.rank == 0:
                        parts[f"replica{rank}.{part}"] = {n: t.cpu().clone() for n, t in sent.items()}

        def commit() -> None:
            save_entry(self.store, f"{CHECKPOINTS}/{state.position:012d}", parts, state.facts())
            self.tracker.publish(state.rows)
            for name in self.store.names(CHECKPOINTS)[: -self.recipe.checkpoint.keep_last]:
                self.store.remove(name)

        on_rank_zero(self.world, commit)

    def _row(self, state: TrainState, metrics: dict[str, float]) -> None:
        if not all(math.isfinite(value) for value in metrics.values()):
            raise NumericsError(
                f"the loss must be finite, but is not at image {state.position}"
                f" (epoch {state.position / self.loaders.num_train:.2f}). Lower the learning rate; the last good"
                " checkpoint is kept."
            )
        state.rows.append(
            {
                "position": state.position,
                "epoch": state.position / self.loaders.num_train,
                "time_ms": time.time_ns() // 1_000_000,
                "metrics": metrics,
            }
        )

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


def _digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the weights, 16 digits of it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
