"""Fresh BatchNorm statistics: which images, how sure they are said to be, and a model that is otherwise as it was."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data.memory import MemoryLoaders
from swa_dist.data.order import Span
from swa_dist.errors import DataError, SwaDistError
from swa_dist.training.recalibrate import Recalibration, recalibrate, recalibrate_as, second_pass
from swa_dist.training.world import SoloWorld

SOLO = SoloWorld()
GROUP = 4
LOOK = 32 * GROUP  # images between two looks at the sampling error
NUM_TRAIN = 4 * LOOK + 30


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(**fields: object) -> Recipe:
    tree = {
        "name": "recalibrate",
        "model": {"arch": "resnet18", "weights": "start.safetensors", "num_classes": 2},
        "data": {
            "name": "noise",
            "train": "train",
            "val": "val",
            "global_batch": 2 * GROUP,
            "group_images": GROUP,
            "image_size": 8,
            "resize_size": 10,
        },
        "optim": {"epochs": 5},
        "schedule": {"name": "constant", "lr": 0.001},
        "registry": {"model": "noise"},
    }
    return config.replace(config.from_tree(tree), **fields)


def pictures(num_images: int, seed: int = 0, size: int = 12) -> Tensor:
    """uint8 [images, 3, size, size]: images differ in colour, and are darker at the rims than in the middle."""
    draw = torch.Generator().manual_seed(seed)
    colour = torch.randn(num_images, 3, 1, 1, generator=draw) * 30
    noise = torch.randn(num_images, 3, size, size, generator=draw) * 20
    across = torch.hann_window(size, periodic=False)
    return (100 + colour + noise + 60 * across[:, None] * across).clamp(0, 255).to(torch.uint8)


def loaders_of(plan: Recipe, num_train: int = NUM_TRAIN) -> MemoryLoaders:
    images, labels = pictures(num_train), torch.zeros(num_train, dtype=torch.int64)
    return MemoryLoaders(images, labels, images[:4], labels[:4], plan.data, plan.seed)


def shallow(seed: int = 0, channels: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels))


def deep(seed: int = 0) -> nn.Sequential:
    """Four BatchNorms; what the later ones see depends on the groups."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [[nn.Conv2d(n, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()] for n in (3, 6, 6, 6)]
        return nn.Sequential(*[module for block in blocks for module in block], nn.Flatten(), nn.Dropout(0.5))


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def facts(model: nn.Module) -> dict[str, Any]:
    """Everything about a model, but for its statistics, that recalibration must leave as it was."""
    modules = dict(model.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "tracking": {n: m.track_running_stats for n, m in modules.items() if hasattr(m, "track_running_stats")},
        "momentum": {n: m.momentum for n, m in modules.items() if hasattr(m, "momentum")},
        "hooks": {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in modules.items()},
        "own": {name: sorted(vars(module)) for name, module in modules.items()},
        "parameters": {name: p.detach().clone().numpy().tobytes() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            n: None if p.grad is None else p.grad.clone().numpy().tobytes() for n, p in model.named_parameters()
        },
    }


def used(model: nn.Module) -> nn.Module:
    """The model in the middle of a life: mixed modes, a frozen weight, gradients, statistics of its own."""
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad = number != 0
        parameter.grad = torch.full_like(parameter, 0.5) if number % 2 else None
    for norm in norms(model):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(7)
    return model


def groups(num_groups: int, size: int = GROUP, seed: int = 0) -> list[Tensor]:
    return list((pictures(num_groups * size, seed).float() / 100 - 1).split(size))


# Which images


@pytest.mark.parametrize(("images", "taken"), [("all", NUM_TRAIN), (50, 50), (2, 2), (NUM_TRAIN + 1, NUM_TRAIN)])
def test_as_many_images_are_taken_as_the_recipe_says_and_there_are(images: str | int, taken: int) -> None:
    plan = recipe(**{"recalibrate.images": images})
    report = recalibrate_as(plan, deep(), loaders_of(plan), SOLO)
    assert (report.num_layers, report.num_images, report.num_groups) == (4, taken, math.ceil(taken / GROUP))


def test_the_statistics_are_the_population_moments_of_what_reaches_the_layer() -> None:
    model, batches = shallow(), groups(9)
    with torch.no_grad():
        seen = model[0](torch.cat(batches)).double()
    report = recalibrate(model, batches, SOLO)
    torch.testing.assert_close(model[1].running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model[1].running_var.double(), seen.var((0, 2, 3), unbiased=False), rtol=1e-6, atol=0)
    assert model[1].num_batches_tracked == report.num_groups == 9


def auto(bound: float) -> tuple[Recalibration, dict[str, Tensor]]:
    plan = recipe(**{"recalibrate.images": "auto", "recalibrate.error_below": bound})
    model = deep()
    return recalibrate_as(plan, model, loaders_of(plan), SOLO), statistics(model)


def first(num_images: int) -> tuple[Recalibration, dict[str, Tensor]]:
    plan = recipe(**{"recalibrate.images": num_images})
    model = deep()
    return recalibrate_as(plan, model, loaders_of(plan), SOLO), statistics(model)


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_auto_stops_at_the_first_look_at_which_the_error_is_below_the_bound(looks: int) -> None:
    bound = first(looks * LOOK)[0].sampling_error * 1.0001
    report, found = auto(bound)
    assert report.num_images == looks * LOOK
    assert report.sampling_error < bound
    if looks > 1:
        assert first((looks - 1) * LOOK)[0].sampling_error >= bound
    assert same(found, first(looks * LOOK)[1])


def test_auto_uses_no_more_images_for_a_looser_bound() -> None:
    taken = [auto(bound)[0].num_images for bound in (0.9, 0.05, 0.035, 0.03, 1e-9)]
    assert taken == sorted(taken)
    assert taken[0] == LOOK
    assert len(set(taken)) >= 3


def test_auto_with_a_bound_that_is_out_of_reach_takes_all_images_and_finds_what_all_find() -> None:
    report, found = auto(1e-9)
    assert report.num_images == NUM_TRAIN
    everything = recalibrate_as(recipe(), model := deep(), loaders_of(recipe()), SOLO)
    assert report == everything
    assert same(found, statistics(model))


def test_progress_only_grows_and_ends_at_all_that_was_wanted() -> None:
    told: list[tuple[int, int]] = []
    plan = recipe(**{"recalibrate.images": 50})
    recalibrate_as(plan, deep(), loaders_of(plan), SOLO, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (50, 50)
    assert {total for _, total in told} == {50}


# Transforms


def normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]


def test_eval_transforms_give_the_moments_of_the_centre_crops() -> None:
    plan, model = recipe(**{"recalibrate.transforms": "eval"}), shallow()
    recalibrate_as(plan, model, loaders_of(plan), SOLO)
    centred = functional.resize(pictures(NUM_TRAIN), [10], antialias=True)[:, :, 1:9, 1:9]
    with torch.no_grad():
        seen = model[0](normalised(centred)).double()
    torch.testing.assert_close(model[1].running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), seen.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


def test_train_transforms_give_the_moments_of_the_random_crops() -> None:
    plan, model = recipe(), shallow()
    loaders = loaders_of(plan)
    recalibrate_as(plan, model, loaders, SOLO)
    crops = torch.cat([group.images for group in loaders.recalibration(Span(0, NUM_TRAIN), "train", {})])
    with torch.no_grad():
        seen = model[0](crops).double()
    torch.testing.assert_close(model[1].running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_random_and_centre_crops_give_different_statistics() -> None:
    found = []
    for transforms in ("train", "eval"):
        plan, model = recipe(**{"recalibrate.transforms": transforms}), shallow()
        recalibrate_as(plan, model, loaders_of(plan), SOLO)
        found.append(model[1].running_mean / model[1].running_var.sqrt())
    assert (found[0] - found[1]).abs().max() > 0.01


# How sure


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize("images", [16, 64])
def test_the_sampling_error_is_how_far_the_means_of_so_many_images_are_from_those_of_all(images: int) -> None:
    subsets = 60
    everything = pictures(subsets * images, seed=3, size=8).float() / 100 - 1
    whole = shallow()
    recalibrate(whole, everything.split(64), SOLO)
    deviations, reported = [], []
    for subset in everything.split(images):
        model = shallow()
        reported.append(recalibrate(model, subset.split(GROUP), SOLO).sampling_error)
        deviations.append((model[1].running_mean - whole[1].running_mean) / whole[1].running_var.sqrt())
    assert rms(torch.stack(deviations)) == pytest.approx(rms(torch.tensor(reported)), rel=0.3)


def test_the_sampling_error_is_that_of_images_however_many_pixels_they_have() -> None:
    """Pixels of an image are alike: counted one by one they would promise too much."""
    small, large = (torch.randn(64, 3, 1, 1).expand(64, 3, size, size) for size in (4, 16))
    errors = [recalibrate(nn.BatchNorm2d(3), images.split(8), SOLO).sampling_error for images in (small, large)]
    assert errors == pytest.approx([1 / 8, 1 / 8], rel=0.05)


def test_the_sampling_error_is_of_the_layer_where_it_is_largest() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sure, self.unsure = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.sure(x - x.mean((2, 3), keepdim=True))
            return self.unsure(x)

    batches = groups(10)
    report = recalibrate(Both(), batches, SOLO)
    assert report.sampling_error == recalibrate(nn.BatchNorm2d(3), batches, SOLO).sampling_error > 0.01


def test_the_halves_differ_by_about_twice_the_sampling_error() -> None:
    ratios = []
    for seed in range(20):
        report = recalibrate(shallow(seed), groups(32, seed=seed), SOLO)
        ratios.append(report.split_half / (2 * report.sampling_error))
    assert rms(torch.tensor(ratios)) == pytest.approx(1, rel=0.4)


def test_one_group_has_no_halves_to_compare() -> None:
    report = recalibrate(shallow(), groups(1), SOLO)
    assert report.split_half == 0
    assert report.sampling_error > 0


def test_a_channel_that_never_varies_is_sure_and_does_not_hide_the_others() -> None:
    batches = groups(8)
    flat = [torch.cat([images, torch.zeros_like(images[:, :1])], dim=1) for images in batches]
    report = recalibrate(nn.BatchNorm2d(4), flat, SOLO)
    assert 0 < report.sampling_error < math.inf
    assert 0 < report.split_half < math.inf


# The second pass


def with_second_pass(what: str, model: nn.Module) -> Recalibration:
    plan = recipe(**{"recalibrate.second_pass": what, "recalibrate.images": 120})
    return recalibrate_as(plan, model, loaders_of(plan), SOLO)


def test_a_second_pass_is_made_only_where_it_is_asked_for() -> None:
    assert with_second_pass("off", deep()).grouping_dependence is None


def test_a_measuring_second_pass_tells_how_far_the_means_depend_on_groups_and_leaves_them() -> None:
    once, measured = deep(), deep()
    report = with_second_pass("off", once)
    again = with_second_pass("measure", measured)
    assert again.grouping_dependence is not None
    assert again.grouping_dependence > 1e-3
    assert vars(again) | {"grouping_dependence": None} == vars(report)
    assert same(statistics(once), statistics(measured))


def test_removing_the_dependence_on_groups_changes_all_but_the_first_layer() -> None:
    once, removed = deep(), deep()
    report = with_second_pass("off", once)
    again = with_second_pass("remove", removed)
    before, after = ([norm.running_mean for norm in norms(model)] for model in (once, removed))
    torch.testing.assert_close(before[0], after[0], rtol=1e-6, atol=1e-7)
    assert all(not torch.equal(b, a) for b, a in zip(before[1:], after[1:], strict=True))
    assert vars(again) | {"grouping_dependence": None} == vars(report)
    assert again.grouping_dependence == pytest.approx(0, abs=1e-5)


def test_once_it_is_removed_no_other_grouping_moves_the_model() -> None:
    model, batches = deep(), groups(20)
    report = second_pass(model, lambda: batches, SOLO, recalibrate(model, batches, SOLO), remove=True)
    regrouped = torch.cat(batches).split(16)
    left = second_pass(model, lambda: regrouped, SOLO, report, remove=False)
    assert left.grouping_dependence == pytest.approx(0, abs=1e-5)


def test_what_is_measured_is_more_than_what_the_statistics_are_wrong_by() -> None:
    measured, distances = [], []
    for seed in range(8):
        model, batches = deep(seed), groups(30, seed=seed)
        first = recalibrate(model, batches, SOLO)
        once = copy.deepcopy(model)
        measured.append(second_pass(model, lambda b=batches: b, SOLO, first, remove=False).grouping_dependence)
        second_pass(model, lambda b=batches: b, SOLO, first, remove=True)
        distances.append(apart(once, model))
    assert 0 < sum(distances) < sum(measured)


def apart(one: nn.Module, other: nn.Module) -> float:
    """Root mean square over channels, in standard deviations, in the layer where it is largest."""
    return max(
        rms((a.running_mean - b.running_mean) / b.running_var.sqrt())
        for a, b in zip(norms(one), norms(other), strict=True)
    )


def test_the_first_layer_does_not_depend_on_groups() -> None:
    model, batches = shallow(), groups(10)
    report = second_pass(model, lambda: batches, SOLO, recalibrate(model, batches, SOLO), remove=False)
    assert report.grouping_dependence == pytest.approx(0, abs=1e-6)


# Models of any kind


@pytest.fixture
def sync() -> Callable[[nn.Module], nn.Module]:
    return lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))


def test_synchronised_batchnorm_gets_the_statistics_of_plain_batchnorm(sync: Callable[..., nn.Module]) -> None:
    plain = used(deep())
    synced = sync(plain)
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(synced))
    reports = []
    for model in (plain, synced):
        report = recalibrate(model, groups(10), SOLO)
        reports.append(second_pass(model, lambda: groups(10), SOLO, report, remove=True))
    assert reports[0] == reports[1]
    assert same(statistics(plain), statistics(synced))


def test_synchronised_batchnorm_has_its_own_forward_again(sync: Callable[..., nn.Module]) -> None:
    synced = sync(deep())
    recalibrate(synced, groups(2), SOLO)
    with pytest.raises(RuntimeError):
        recalibrate(synced, [torch.zeros(2, 5, 8, 8)], SOLO)
    for norm in norms(synced):
        assert "forward" not in vars(norm)
        assert norm.forward.__func__ is nn.SyncBatchNorm.forward


def test_a_layer_that_is_used_twice_gets_the_moments_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)
            self.alias = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.two(self.norm(self.one(x))))

    model = Twice()
    (images,) = groups(1, size=20)
    with torch.no_grad():
        first_use = model.one(images)
        second_use = model.two(F.batch_norm(first_use, None, None, training=True))
    report = recalibrate(model, [images], SOLO)
    seen = torch.cat([use.movedim(1, 0).flatten(1).double() for use in (first_use, second_use)], dim=1)
    assert report.num_layers == 1
    torch.testing.assert_close(model.norm.running_mean.double(), seen.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var.double(), seen.var(1, unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(10, 6), (10, 6, 7)], ids=["vectors", "sequences"])
def test_one_dimensional_batchnorm_is_recalibrated(shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm1d(6)
    batches = [torch.randn(*shape) * 3 + 1 for _ in range(4)]
    report = recalibrate(norm, batches, SOLO)
    seen = torch.cat(batches).movedim(1, 0).flatten(1).double()
    torch.testing.assert_close(norm.running_mean.double(), seen.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), seen.var(1, unbiased=False), rtol=1e-5, atol=0)
    assert (report.num_layers, report.num_images) == (1, 40)


def test_three_dimensional_and_momentum_free_batchnorm_is_recalibrated() -> None:
    norm = nn.BatchNorm3d(2, momentum=None)
    volume = torch.randn(5, 2, 3, 4, 5) + 2
    recalibrate(norm, [volume], SOLO)
    torch.testing.assert_close(norm.running_mean, volume.mean((0, 2, 3, 4)))
    assert norm.momentum is None


def test_a_model_without_batchnorm_passes_through_unchanged_and_says_so() -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(), nn.BatchNorm2d(4, affine=False)))
    del model[3]
    before, state = facts(model), statistics(model)
    plan = recipe(**{"recalibrate.second_pass": "remove", "recalibrate.images": "auto"})
    for report in (recalibrate_as(plan, model, loaders_of(plan), SOLO), recalibrate(model, [], SOLO)):
        assert (report.num_layers, report.sampling_error, report.split_half) == (0, 0, 0)
        assert report.grouping_dependence is None
    assert facts(model) == before
    assert same(state, statistics(model))


def test_a_layer_that_keeps_no_statistics_is_left_without() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = facts(model)
    assert recalibrate(model, groups(3), SOLO).num_layers == 1
    assert model[0].running_mean is None
    assert facts(model) == before


def test_dropout_is_off() -> None:
    with_dropout = nn.Sequential(nn.Dropout(0.5), *shallow(), nn.Dropout2d(0.5), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    with_dropout.train()
    without = nn.Sequential(*[module for module in with_dropout if "Dropout" not in type(module).__name__])
    without = copy.deepcopy(without)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for model in (with_dropout, without):
        recalibrate(model, groups(5), SOLO)
    assert [n.running_mean.tolist() for n in norms(with_dropout)] == [n.running_mean.tolist() for n in norms(without)]
    assert with_dropout[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_batch_counts_for_nothing() -> None:
    batches = groups(3)
    one, other = deep(), deep()
    report = recalibrate(one, batches, SOLO)
    # In the place of a whole pair of groups, so that every other group is still every other.
    empty = batches[0][:0]
    assert recalibrate(other, [*batches[:2], empty, empty, batches[2]], SOLO) == report
    assert same(statistics(one), statistics(other))


def test_autocast_around_it_does_not_change_the_result() -> None:
    plain, inside = deep(), deep()
    report = recalibrate(plain, groups(6), SOLO)
    with torch.autocast("cpu", torch.bfloat16):
        assert recalibrate(inside, groups(6), SOLO) == report
        assert torch.is_autocast_enabled("cpu")
    assert same(statistics(plain), statistics(inside))


def test_two_recalibrations_find_the_same_whatever_the_statistics_were_before() -> None:
    one, other = deep(), used(deep())
    assert recalibrate(one, groups(6), SOLO) == recalibrate(other, groups(6), SOLO)
    assert same(statistics(one), statistics(other))


# All else is as it was


def test_weights_gradients_modes_and_hooks_are_as_they_were() -> None:
    model = used(deep())
    before = facts(model)
    with torch.enable_grad():
        report = recalibrate(model, groups(4), SOLO)
        second_pass(model, lambda: groups(4), SOLO, report, remove=True)
        assert torch.is_grad_enabled()
    assert facts(model) == before
    assert not any(b.requires_grad for b in model.buffers())


def test_a_hook_of_the_models_own_stays() -> None:
    model, calls = deep(), []
    model[1].register_forward_pre_hook(lambda module, inputs: calls.append(1))
    recalibrate(model, groups(2), SOLO)
    model(groups(1)[0])
    assert len(calls) == 3


def test_a_layer_whose_statistics_are_frozen_is_still_frozen_after() -> None:
    """One that has statistics and was told not to track them goes on using them."""
    model = deep()
    model[1].track_running_stats = False
    recalibrate(model, groups(2), SOLO)
    assert model[1].track_running_stats is False


class BrokenError(Exception):
    pass


def lost_in_the_loader() -> Iterator[Tensor]:
    yield from groups(3)
    raise BrokenError


def stopped_in_the_loader() -> Iterator[Tensor]:
    yield from groups(3)
    raise KeyboardInterrupt


class Fragile(nn.Module):
    """Fails at its third images."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise BrokenError
        return x


def not_a_number() -> list[Tensor]:
    batches = groups(5)
    batches[3][0, 0, 0, 0] = math.nan
    return batches


def infinite() -> list[Tensor]:
    batches = groups(5)
    batches[3][0, 0, 0, 0] = math.inf
    return batches


FAILURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Iterable[Tensor]], type[BaseException]]] = {
    "in the loader": (deep, lost_in_the_loader, BrokenError),
    "by an interrupt": (deep, stopped_in_the_loader, KeyboardInterrupt),
    "in the model": (lambda: nn.Sequential(*deep()[:6], Fragile(), *deep(1)[3:6]), lambda: groups(5), BrokenError),
    "for want of images": (deep, list, DataError),
    "for want of images in the batches": (deep, lambda: [torch.zeros(0, 3, 8, 8)], DataError),
    "for images of another shape": (deep, lambda: [torch.zeros(2, 1, 8, 8)], RuntimeError),
    "for one value per channel": (
        lambda: nn.Sequential(nn.BatchNorm2d(3)),
        lambda: [torch.zeros(1, 3, 1, 1)],
        ValueError,
    ),
    "for an image that is not a number": (deep, not_a_number, SwaDistError),
    "for an image that is infinite": (deep, infinite, SwaDistError),
}


@pytest.mark.parametrize(("make", "batches", "error"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("kind", ["plain", "synchronised"])
def test_a_failure_leaves_the_model_bit_for_bit_as_it_was(
    make: Callable[[], nn.Module],
    batches: Callable[[], Iterable[Tensor]],
    error: type[BaseException],
    kind: str,
    sync: Callable[..., nn.Module],
) -> None:
    model = used(make()) if kind == "plain" else used(sync(make()))
    before, state = facts(model), statistics(model)
    grad_enabled = torch.is_grad_enabled()
    with pytest.raises(error):
        recalibrate(model, batches(), SOLO)
    assert same(state, statistics(model))
    assert facts(model) == before
    assert torch.is_grad_enabled() == grad_enabled
    assert not torch.is_autocast_enabled("cpu")


def test_a_failure_in_the_second_pass_leaves_what_the_first_found() -> None:
    model = deep()
    report = recalibrate(model, groups(5), SOLO)
    before, state = facts(model), statistics(model)
    with pytest.raises(BrokenError):
        second_pass(model, lambda: lost_in_the_loader(), SOLO, report, remove=True)
    assert same(state, statistics(model))
    assert facts(model) == before


def test_after_a_failure_the_model_is_recalibrated_as_any_other() -> None:
    one, other = deep(), deep()
    with pytest.raises(BrokenError):
        recalibrate(one, lost_in_the_loader(), SOLO)
    assert recalibrate(one, groups(5), SOLO) == recalibrate(other, groups(5), SOLO)
    assert same(statistics(one), statistics(other))
