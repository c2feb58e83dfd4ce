"""How others' averages and BatchNorm passes go wrong, run beside ours on the same inputs.

The figures in docs/numerics.md are what `pytest -rP tests/distributed/test_peers.py` prints.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from swa_dist.errors import NumericsError
from swa_dist.method.averaging import ExponentialAverage, WeightAverage
from swa_dist.method.moments import Moments
from swa_dist.method.schedule import Cyclical
from swa_dist.training.recalibrate import recalibrate
from swa_dist.training.world import SoloWorld, World
from tests.support import run_workers


def norm(channels: int = 1) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels)


def batches() -> list[Tensor]:
    """Ten batches of 96 and a short one of 40, whose images are of another kind."""
    generator = torch.Generator().manual_seed(0)
    return [1 + 2 * torch.randn(96, 1, generator=generator) for _ in range(10)] + [
        6 + 2 * torch.randn(40, 1, generator=generator)
    ]


def shifting() -> list[Tensor]:
    """Equal batches, each with a mean of its own."""
    generator = torch.Generator().manual_seed(1)
    return [shift + 2 * torch.randn(32, 1, generator=generator) for shift in (-1.5, -0.5, 0.5, 1.5)]


def ours(x: list[Tensor]) -> tuple[float, float]:
    model = norm()
    recalibrate(model, x, SoloWorld())
    return model.running_mean.item(), model.running_var.item()


def torchs(x: list[Tensor]) -> tuple[float, float]:
    model = norm()
    update_bn(x, model)
    return model.running_mean.item(), model.running_var.item()


def truth(x: list[Tensor]) -> tuple[float, float]:
    everything = torch.cat(x).double()
    return everything.mean().item(), everything.var(correction=0).item()


def test_update_bn_weighs_a_short_last_batch_like_a_full_one() -> None:
    mean, _ = truth(batches())
    assert ours(batches())[0] == pytest.approx(mean, rel=1e-6)
    print(f"mean: true {mean:.4f}, torch {torchs(batches())[0]:.4f}, ours {ours(batches())[0]:.4f}")
    assert torchs(batches())[0] - mean > 0.2


def test_update_bn_takes_the_mean_of_batch_variances_and_misses_how_batches_differ() -> None:
    _, variance = truth(shifting())
    assert ours(shifting())[1] == pytest.approx(variance, rel=1e-6)
    print(f"variance: true {variance:.4f}, torch {torchs(shifting())[1]:.4f}, ours {ours(shifting())[1]:.4f}")
    assert torchs(shifting())[1] < 0.85 * variance


def on_ddp(world: World) -> tuple[float, float]:
    """Running means of torch's pass and of ours, each worker on its own half."""
    mine = shifting()[world.rank :: world.size]
    peer = DistributedDataParallel(norm())
    update_bn(mine, peer)
    model = norm()
    recalibrate(model, mine, world)
    return peer.module.running_mean.item(), model.running_mean.item()


def test_update_bn_under_ddp_leaves_each_worker_with_its_own_images() -> None:
    (peer0, ours0), (peer1, ours1) = run_workers(on_ddp, 2)
    mean, _ = truth(shifting())
    assert ours0 == ours1 == pytest.approx(mean, abs=1e-6)
    print(f"mean: true {mean:.4f}, torch {peer0:.4f} and {peer1:.4f}, ours {ours0:.4f} and {ours1:.4f}")
    assert abs(peer0 - peer1) > 0.5


def failing() -> list[Tensor]:
    return [*shifting(), torch.zeros(4, 3)]  # three channels where there is one


def test_update_bn_leaves_the_model_broken_after_an_exception() -> None:
    fitted = {"running_mean": torch.tensor([7.0]), "running_var": torch.tensor([3.0])}
    peer, model = norm(), norm()
    for each in (peer, model):
        each.load_state_dict(fitted, strict=False)
    with pytest.raises((RuntimeError, ValueError)):
        update_bn(failing(), peer)
    with pytest.raises((RuntimeError, ValueError)):
        recalibrate(model, failing(), SoloWorld())
    assert model.running_mean.item() == 7.0
    assert model.running_var.item() == 3.0
    assert model.momentum == 0.1
    assert peer.running_mean.item() != 7.0
    assert peer.momentum is None
    print(f"running mean of 7 after the exception: torch {peer.running_mean.item():.4f}, ours 7.0000")


def test_update_bn_does_not_take_what_dalis_iterators_give() -> None:
    peer = norm()
    with pytest.raises(AttributeError):
        update_bn([[{"data": x, "label": None}] for x in shifting()], peer, device=torch.device("cpu"))
    assert peer.running_mean.item() == 0.0


@pytest.mark.parametrize(("dtype", "at_least"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_averaged_model_averages_in_the_models_precision(dtype: torch.dtype, at_least: float) -> None:
    generator = torch.Generator().manual_seed(2)
    iterates = [1.3 + 0.02 * torch.randn(1000, generator=generator) for _ in range(10)]
    models = [nn.Linear(1000, 1, bias=False).to(dtype) for _ in iterates]
    for model, weights in zip(models, iterates, strict=True):
        with torch.no_grad():
            model.weight.copy_(weights[None])
    peer, average = AveragedModel(models[0]), WeightAverage()
    for number, model in enumerate(models):
        peer.update_parameters(model)
        average.collect(model, number)
    exact = np.mean([m.weight.detach().double().numpy() for m in models], axis=0)
    mine = np.sqrt(np.mean((average.mean()["weight"].numpy() - exact) ** 2))
    theirs = np.sqrt(np.mean((peer.module.weight.detach().double().numpy() - exact) ** 2))
    print(f"root mean square error of the mean of 10 iterates in {dtype}: torch {theirs:.1e}, ours {mine:.1e}")
    assert mine < 1e-7
    assert theirs > at_least


def test_an_ema_in_bfloat16_stands_still_and_ours_does_not() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    peer = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    ema = ExponentialAverage(0.999)
    for step in range(1000):
        peer.update_parameters(model)
        ema.collect(model, step)
        with torch.no_grad():
            model.weight.fill_(2.0)
    assert peer.module.weight.item() == 1.0
    mine = ema.mean()["weight"].item()
    print(
        f"EMA 0.999 of one 1 and then 999 times 2, in bfloat16: torch {peer.module.weight.item():.4f}, ours {mine:.4f}"
    )
    assert mine > 1.9


def test_swalr_never_reaches_its_rate_in_five_epochs_and_ours_ends_on_it() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    peer = SWALR(optimizer, swa_lr=1e-5)
    for _ in range(5):
        optimizer.step()
        peer.step()
    print(f"last rate of 5 epochs from 1e-3 to 1e-5: torch {optimizer.param_groups[0]['lr']:.2e}, ours 1.00e-05")
    assert optimizer.param_groups[0]["lr"] > 40e-5
    assert Cyclical(1e-3, 1e-5, cycle_images=500).rate(400, 500) == 1e-5


def test_the_difference_of_squares_in_float32_cancels_and_merging_moments_does_not() -> None:
    x = 100 + 0.1 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(3))
    exact = x.double().var(correction=0).item()
    naive = (x.square().mean() - x.mean() ** 2).item()
    moments = Moments(1)
    for part in x.split(7):
        moments.observe(part)
    assert moments.variance.item() == pytest.approx(exact, rel=1e-9)
    print(f"variance: true {exact:.5f}, E[x^2] - E[x]^2 in float32 {naive:.5f}, ours {moments.variance.item():.5f}")
    assert abs(naive - exact) > 0.1 * exact


def test_include_start_by_hand() -> None:
    """Start 1, iterates 2, 4, 6: 4 without the start, 13 / 4 with it."""

    def at(value: float) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(value)
        return model

    without, including = WeightAverage(), WeightAverage()
    including.collect(at(1.0), 0)
    for number, value in enumerate((2.0, 4.0, 6.0), start=1):
        without.collect(at(value), number)
        including.collect(at(value), number)
    assert without.mean()["weight"].item() == 4.0
    assert including.mean()["weight"].item() == 3.25


def test_an_ema_by_hand() -> None:
    """Decay 1/2, iterates 1, 2, 4: (1/4 * 1 + 1/2 * 2 + 4) / (1/4 + 1/2 + 1) = 3; of one iterate, itself."""
    ema = ExponentialAverage(0.5)
    model = nn.Linear(1, 1, bias=False)
    means = []
    for number, value in enumerate((1.0, 2.0, 4.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.collect(model, number)
        means.append(ema.mean()["weight"].item())
    assert means == pytest.approx([1.0, 5 / 3, 3.0])
    restored = ExponentialAverage(0.5)
    restored.load_state_dict(ema.state_dict())
    assert restored.mean()["weight"].item() == ema.mean()["weight"].item()
    with pytest.raises(NumericsError, match="more than that of the last iterate"):
        restored.collect(model, 2)
