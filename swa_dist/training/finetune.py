"""One worker's life: train, average, recalibrate, evaluate. Phases in order, each resumable."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from swa_dist import models
from swa_dist.config import Recipe
from swa_dist.data.order import Batch, Group, Loaders, Span, Split, Transforms
from swa_dist.errors import CheckpointError, NumericsError
from swa_dist.method.averaging import parameters_of
from swa_dist.storage.store import Store
from swa_dist.training import checkpoints, preflight, replicas, train
from swa_dist.training.checkpoints import CANDIDATES
from swa_dist.training.evaluate import Outcomes, evaluate
from swa_dist.training.ports import Ports, Tracker
from swa_dist.training.recalibrate import recalibrate_as
from swa_dist.training.state import TrainState, load_entry, save_entry
from swa_dist.training.world import World, broadcast_tensors, on_rank_zero

_LOOK_EVERY_GROUPS = 8


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

    Collective; rank 0 alone uses `store`, and any worker may ask to stop. Returns the scored candidates
    by name. Raises Stopped, after a checkpoint was committed, where it was asked to stop, and DataError before any
    training where the starting weights are not what they are known to be.
    """
    ports = Ports(recipe, world, loaders, store, tracker, should_stop)
    bad: dict[Split, dict[int, str]] = {"train": {}, "val": {}}
    score = functools.partial(_score, ports, bad)
    candidates = {"start": score("start", lambda: _start(ports))}
    _preflight(ports, candidates["start"])
    state = checkpoints.resume(ports, _start(ports))
    train.train(ports, state)
    bad["train"] |= state.left_out
    training = {"images": state.position, "seconds": state.seconds, "world_sizes": state.world_sizes}
    candidates["last"] = score("last", lambda: _last_iterate(ports, state), training=training)
    candidates["last_fresh"] = score("last_fresh", lambda: _last_iterate(ports, state), recalibrated=True)
    ids = state.averages.ids()
    spread = max((row["metrics"].get("average/spread", 0.0) for row in state.rows), default=0.0)
    if len(ids.get("window", [])) < recipe.average.window and world.rank == 0:
        tracker.warn(
            f"`average.window` asks for {recipe.average.window} iterates, but there are only {len(ids['window'])}."
        )
    for name, mean in state.averages.means(state.model).items():
        facts = {"iterates": ids.get(name), "regime": recipe.average.sync, "spread": spread}
        make = functools.partial(_averaged, ports, name, mean)
        candidates[name] = score(name, make, recalibrated=True, average=facts)
    return candidates


@dataclass(frozen=True)
class _Watched:
    """The loaders of a phase that is done anew if it is interrupted: they look whether the run is to stop, and note
    which images this worker could not decode."""

    ports: Ports
    left_out: dict[Split, dict[int, str]] = field(default_factory=lambda: {"train": {}, "val": {}})

    @property
    def num_train(self) -> int:
        return self.ports.loaders.num_train

    @property
    def num_val(self) -> int:
        return self.ports.loaders.num_val

    def name_of(self, split: Split, i: int) -> str:
        return self.ports.loaders.name_of(split, i)

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        return self.ports.loaders.train(epoch, start, left_out)

    def recalibration(self, span: Span, transforms: Transforms, left_out: Mapping[int, str]) -> Iterator[Group]:
        groups = self.ports.loaders.recalibration(span, transforms, left_out)
        return self._looking("train", groups, span.stop - span.start)

    def validation(self) -> Iterator[Group]:
        return self._looking("val", self.ports.loaders.validation(), self.num_val)

    def _looking(self, split: Split, groups: Iterator[Group], num_images: int) -> Iterator[Group]:
        """Collective, at groups that every worker has: some have one more than others."""
        everyones = num_images // self.ports.recipe.data.group_images // self.ports.world.size
        for number, group in enumerate(groups):
            if number < everyones and number % _LOOK_EVERY_GROUPS == 0 and self.ports.asked_to_stop():
                self.ports.stop(None)
            self.left_out[split].update(group.left_out)
            yield group


def _start(ports: Ports) -> nn.Module:
    """Collective: the starting weights. Only rank 0 need see their file."""
    model = models.build(ports.recipe.model, ports.recipe.seed)
    on_rank_zero(ports.world, lambda: models.load(model, ports.recipe.model))
    model.to(ports.world.device)
    model.load_state_dict(broadcast_tensors(ports.world, model.state_dict()))
    return model


def _preflight(ports: Ports, start: Candidate) -> None:
    """Compare the starting weights with what they are known to have, before anything is spent."""
    found = preflight.check(start.outcomes.metrics()["top1"], ports.loaders.num_val, ports.recipe)
    if found.problem is not None and ports.recipe.evaluate.preflight == "stop":
        raise found.problem
    on_rank_zero(ports.world, lambda: ports.tracker.warn(found.sentence) if found.sentence else None)


def _score(
    ports: Ports,
    bad: dict[Split, dict[int, str]],
    name: str,
    make: Callable[[], nn.Module],
    *,
    recalibrated: bool = False,
    **facts: Any,
) -> Candidate:
    """Collective: score the weights that `make` gives and keep both, or read what an earlier attempt kept.

    `bad`: the images that are known not to be decodable, by their places, to which those are added that turn out so.
    """
    found = on_rank_zero(ports.world, lambda: _scored(ports, name))
    if found is not None:
        return found
    if ports.asked_to_stop():
        ports.stop(None)
    model, loaders = make(), _Watched(ports)
    if recalibrated:
        began = time.monotonic()
        report = recalibrate_as(
            ports.recipe,
            model,
            loaders,
            ports.world,
            functools.partial(ports.tracker.progress, f"recalibrate {name}"),
            bad["train"],
        )
        bad["train"] |= ports.note_left_out("train", loaders.left_out["train"], bad["train"])
        if report.num_layers == 0:
            on_rank_zero(ports.world, lambda: ports.tracker.warn(f"{name} has no BatchNorm to recalibrate."))
        facts["recalibration"] = asdict(report) | {
            "seconds": time.monotonic() - began,
            "left_out": _names(ports, "train", bad["train"]),
        }
    began = time.monotonic()
    outcomes = evaluate(
        model,
        loaders.validation(),
        ports.loaders.num_val,
        ports.recipe,
        ports.world,
        functools.partial(ports.tracker.progress, f"evaluate {name}"),
    )
    bad["val"] |= ports.note_left_out("val", loaders.left_out["val"], bad["val"])
    facts["evaluation"] = {
        "num_images": len(outcomes.ids),
        "seconds": time.monotonic() - began,
        "left_out": _names(ports, "val", bad["val"]),
    }
    candidate = Candidate(name=name, outcomes=outcomes, facts=facts)
    parts = {"model": model.state_dict(), "outcomes": outcomes.tensors()}
    on_rank_zero(ports.world, lambda: save_entry(ports.store, candidate.entry, parts, facts))
    return candidate


def _names(ports: Ports, split: Split, left_out: Mapping[int, str]) -> list[str]:
    return [ports.loaders.name_of(split, i) for i in sorted(left_out)]


def _last_iterate(ports: Ports, state: TrainState) -> nn.Module:
    """Collective: the last iterate; where each worker has its own, rank 0's."""
    model = models.build(ports.recipe.model, ports.recipe.seed).to(ports.world.device)
    model.load_state_dict(broadcast_tensors(ports.world, state.model.state_dict()))
    return model


def _averaged(ports: Ports, name: str, mean: dict[str, Tensor]) -> nn.Module:
    """Collective: a model with an average's weights, which an all-reduce proves to be the same on all workers."""
    model = models.build(ports.recipe.model, ports.recipe.seed).to(ports.world.device)
    model.load_state_dict(mean)
    spread = replicas.spread_of(parameters_of(model), ports.world)
    if spread != 0:
        raise NumericsError(
            f"replicas of {name} must be equal, but differ by up to {spread:g}. A worker's memory or arithmetic is"
            " at fault; run again, if need be without that machine."
        )
    return model


def _scored(ports: Ports, name: str) -> Candidate | None:
    entry = f"{CANDIDATES}/{name}"
    if not ports.store.has(entry):
        return None
    try:
        parts, facts = load_entry(ports.store, entry)
    except CheckpointError as error:
        ports.tracker.warn(f"{error} It is made again.")
        ports.store.remove(entry)
        return None
    return Candidate(name=name, outcomes=Outcomes.of(parts["outcomes"]), facts=facts)
