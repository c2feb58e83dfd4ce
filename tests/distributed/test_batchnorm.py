"""BatchNorm statistics don't depend on how many workers share the groups."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swa_dist.errors import DataError
from swa_dist.training.batchnorm import RunningStatistics
from swa_dist.training.recalibrate import recalibrate
from swa_dist.training.world import SoloWorld, World
from tests.support import run_workers

GROUPS = [8, 8, 8, 3, 8, 5, 2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


def groups() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [i + torch.randn(n, 3, 9, 9, generator=generator) for i, n in enumerate(GROUPS)]


def recalibrated(world: World) -> dict[str, np.ndarray]:
    model = network()
    report = recalibrate(model, groups()[world.rank :: world.size], world)
    assert report.num_images == sum(GROUPS)
    assert report.num_groups == len(GROUPS)
    return {name: b.numpy() for name, b in model.named_buffers()}


def trained(world: World, num_groups: int) -> dict[str, np.ndarray]:
    """The running statistics after global batches of `num_groups` groups each."""
    model = network().train()
    running = RunningStatistics(model, world)
    everything = groups()
    for first in range(0, len(everything), num_groups):
        batch = everything[first : first + num_groups]
        running.split()
        others = 0
        for number in range(world.rank, len(batch), world.size):
            i = number // world.size
            running.skip(number - i - others)
            others = number - i
            torch.manual_seed(first + number)  # of the dropout, as the loop does
            model(batch[number])
        running.skip(len(batch) - len(range(world.rank, len(batch), world.size)) - others)
        running.settle()
    return {name: b.numpy() for name, b in model.named_buffers()}


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> None:
    for layer in ("1", "5"):
        deviation = np.sqrt(b[f"{layer}.running_var"])
        assert (np.abs(a[f"{layer}.running_mean"] - b[f"{layer}.running_mean"]) <= tolerance * deviation).all()
        np.testing.assert_allclose(a[f"{layer}.running_var"], b[f"{layer}.running_var"], rtol=tolerance)
        assert a[f"{layer}.num_batches_tracked"] == b[f"{layer}.num_batches_tracked"] == len(GROUPS)


@pytest.mark.parametrize("size", [2, 3])
def test_recalibration_is_the_same_for_any_number_of_workers(size: int) -> None:
    alone = recalibrated(SoloWorld())
    results = run_workers(recalibrated, size)
    for one in results:
        close(one, alone, 1e-6)
        assert all(np.array_equal(one[name], results[0][name]) for name in one)


def test_recalibration_is_the_float64_moments_of_what_each_layer_sees() -> None:
    model = network()
    recalibrate(model, groups(), SoloWorld())
    conv, norm = model[0].double(), nn.BatchNorm2d(4).double().train()
    norm.load_state_dict({**model[1].state_dict(), **{k: v.double() for k, v in model[1].named_parameters()}})
    first = torch.cat([conv(g.double()) for g in groups()])
    between = [model[2](norm(conv(g.double()))) for g in groups()]  # each group by its own statistics; no dropout
    second = torch.cat([model[4].double()(x) for x in between])
    for layer, seen in ((model[1], first), (model[5], second)):
        x = seen.movedim(1, 0).flatten(1)
        deviation = x.std(1, correction=0)
        assert ((layer.running_mean.double() - x.mean(1)).abs() <= 1e-5 * deviation).all()
        torch.testing.assert_close(layer.running_var.double(), x.var(1, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_groups", [2, 3, 7])
def test_running_statistics_are_those_of_one_process(size: int, num_groups: int) -> None:
    alone = trained(SoloWorld(), num_groups)
    for one in run_workers(trained, size, num_groups):
        close(one, alone, 1e-5)


def test_running_statistics_of_one_process_are_torchs() -> None:
    plain = network().train()
    for number, group in enumerate(groups()):
        torch.manual_seed(number)
        plain(group)
    for name, buffer in trained(SoloWorld(), 3).items():
        assert np.array_equal(buffer, dict(plain.named_buffers())[name].numpy())


def test_a_failed_recalibration_leaves_the_model_as_it_was() -> None:
    model = network()
    model.train()
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]

    def batches():
        yield groups()[0]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        recalibrate(model, batches(), SoloWorld())
    with pytest.raises(DataError, match="at least one image"):
        recalibrate(model, [], SoloWorld())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(m._forward_pre_hooks for m in model.modules())
