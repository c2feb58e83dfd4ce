"""Both regimes on a one-parameter quadratic, where SGD and the average have closed forms; then on the real loop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swa_dist import config
from swa_dist.errors import ConfigError
from swa_dist.method.averaging import WeightAverage, buffers_of, parameters_of
from swa_dist.storage.store import DiskStore
from swa_dist.training import replicas
from swa_dist.training.checkpoints import CHECKPOINTS
from swa_dist.training.finetune import finetune
from swa_dist.training.world import World
from tests import support
from tests.distributed.test_results import distance, loaders, small_recipe_of, weights_of

CURVATURE, RATE, START, STEPS = 0.5, 0.3, 4.0, 12
TARGETS = [1.0, -2.0, 7.0]  # the minimum that each worker's data has
SHRINK = 1 - RATE * CURVATURE


class Point(nn.Module):
    """w, with the loss CURVATURE / 2 (w - target)^2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([START], dtype=torch.float64))

    def forward(self, target: float) -> torch.Tensor:
        return CURVATURE / 2 * ((self.w - target) ** 2).sum()


def sgd_on(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE)


def descend(world: World) -> tuple[list[float], float]:
    """DDP on the workers' losses: the iterates, and their average."""
    model = Point()
    network, optimizer, average = world.wrap(model), sgd_on(model), WeightAverage()
    iterates = []
    for step in range(STEPS):
        network(TARGETS[world.rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.collect(model, step)
        iterates.append(model.w.item())
    return iterates, average.mean()["w"].item()


def descend_alone(world: World, every: int | None) -> tuple[list[float], float, float]:
    """Replicas by themselves, which meet every so many steps: this one's iterates, the average, and the last spread."""
    model = Point()
    optimizer, average, spread = sgd_on(model), WeightAverage(), 0.0
    iterates = []
    for step in range(STEPS):
        model(TARGETS[world.rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        iterates.append(model.w.item())
        spread = replicas.spread_of(parameters_of(model), world)
        average.collect_weights(replicas.mean_of(parameters_of(model), world), buffers_of(model), step)
        if every and (step + 1) % every == 0:
            replicas.synchronise_(model, optimizer, world)
    return iterates, average.mean()["w"].item(), spread


def closed_form(start: float, target: float, steps: int) -> float:
    """SGD on the quadratic: w_t = b + (1 - eta a)^t (w_0 - b)."""
    return target + SHRINK**steps * (start - target)


@pytest.mark.parametrize("size", [2, 3])
def test_replicated_follows_the_mean_of_the_losses(size: int) -> None:
    target = sum(TARGETS[:size]) / size
    expected = [closed_form(START, target, step + 1) for step in range(STEPS)]
    # sum over t of (1 - eta a)^t is a geometric series
    mean = target + (START - target) * SHRINK * (1 - SHRINK**STEPS) / (1 - SHRINK) / STEPS
    for iterates, average in support.run_workers(descend, size):
        assert iterates == pytest.approx(expected, rel=1e-12)
        assert average == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_local_replicas_that_never_meet_each_follow_their_own(size: int) -> None:
    results = support.run_workers(descend_alone, size, None)
    for rank, (iterates, average, spread) in enumerate(results):
        assert iterates == pytest.approx([closed_form(START, TARGETS[rank], s + 1) for s in range(STEPS)], rel=1e-12)
        everyones = [i for other, _, _ in results for i in other]
        assert average == pytest.approx(sum(everyones) / len(everyones), rel=1e-6)
        ends = [other[-1] for other, _, _ in results]
        assert spread == pytest.approx(max(ends) - min(ends), rel=1e-12)
        assert average == results[0][1]


@pytest.mark.parametrize("every", [1, 3])
def test_local_replicas_that_meet_go_on_from_their_mean(every: int) -> None:
    results = support.run_workers(descend_alone, 3, every)
    start = START
    for step in range(STEPS):
        local = [closed_form(start, target, step % every + 1) for target in TARGETS]
        for rank, (iterates, _, _) in enumerate(results):
            assert iterates[step] == pytest.approx(local[rank], rel=1e-9)
        if (step + 1) % every == 0:
            start = sum(local) / len(local)


def test_meeting_after_each_step_is_replicated_training() -> None:
    """On equal shares, with plain SGD: the mean of the steps is the step of the mean."""
    met = support.run_workers(descend_alone, 2, 1)
    together = support.run_workers(descend, 2)
    assert met[0][1] == pytest.approx(together[0][1], rel=1e-6)


def local_recipe(digits: str, **fields: Any) -> config.Recipe:
    local = {"average.sync": "local", "average.num_replicas": 2, "cluster.launcher": "ray", "cluster.num_workers": 2}
    return small_recipe_of(digits, **(local | fields))


def run_local(world: World, digits: str, root: str, stop_after: int, fields: dict[str, Any]) -> Any:
    """The real loop with replicas, stopped after so many commits; the candidates' facts."""
    from swa_dist.errors import Stopped

    recipe = local_recipe(digits, **fields)
    tracker = support.Recorder()
    store = DiskStore(Path(root))

    def should_stop() -> bool:
        return len(store.names(CHECKPOINTS)) >= stop_after

    try:
        found = finetune(recipe, world, loaders(recipe, world), store, tracker, should_stop)
    except Stopped:
        return "stopped"
    spreads = [row["metrics"]["average/spread"] for row in tracker.rows if "average/spread" in row["metrics"]]
    return {name: candidate.facts for name, candidate in found.items()}, spreads


@pytest.mark.parametrize("every", ["never", 3])
def test_a_local_run_averages_over_replicas_and_resumes_bit_for_bit(every: Any, digits: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    fields = {"average.sync_every": every}
    facts, spreads = support.run_workers(run_local, 2, str(digits), str(straight), 99, fields)[0]
    assert len(spreads) == 2
    assert min(spreads) > 0
    assert facts["swa"]["average"] == {"iterates": [400, 800], "regime": "local", "spread": max(spreads)}
    assert support.run_workers(run_local, 2, str(digits), str(stopped), 1, fields) == ["stopped", "stopped"]
    support.run_workers(run_local, 2, str(digits), str(stopped), 99, fields)
    for name in ("swa", "last"):
        resumed, undisturbed = weights_of(stopped, name), weights_of(straight, name)
        assert all(torch.equal(resumed[key], undisturbed[key]) for key in undisturbed)
    start = weights_of(straight, "start")
    moved = distance(weights_of(straight, "swa"), start)
    assert math.isfinite(moved)
    assert moved > 0


def test_the_number_of_replicas_is_the_recipes(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(support.WorkerError, match=r"`average.num_replicas` must be the number of workers \(3\)"):
        support.run_workers(run_local, 3, str(digits), str(tmp_path), 99, {})
    with pytest.raises(ConfigError, match=r"`average\.num_replicas` must be"):
        local_recipe(str(digits), **{"average.num_replicas": 3})
