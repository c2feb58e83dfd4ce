"""Weights files of every kind that is met: what loads, equal to the last bit, and what is refused and why."""

import copy
import functools
import os
import pickle
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

from swa_dist import config, models
from swa_dist.config import Model
from swa_dist.errors import CheckpointError, ConfigError, ExitCode

JOBS = Path(__file__).parents[2] / "jobs"
OLD_DENSENET = {"norm1.": "norm.1.", "norm2.": "norm.2.", "conv1.": "conv.1.", "conv2.": "conv.2."}


def model_of(arch="resnet18", weights="unused", num_classes=10, head="keep"):
    return Model(arch=arch, weights=str(weights), num_classes=num_classes, head=head)


@pytest.fixture(scope="module")
def source():
    """A ResNet-18's weights, with BatchNorm statistics that are not those of a new one."""
    weights = new_network(model_of(), seed=7).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 2, generator=generator)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(123)
    return weights


@functools.cache
def built(arch, num_classes, seed):
    return models.build(model_of(arch, num_classes=num_classes), seed)


def new_network(model, seed=1):
    """A network of one's own; drawing its weights is what takes long."""
    return copy.deepcopy(built(model.arch, model.num_classes, seed))


def loaded(path, seed=1, **fields):
    """The weights of a new network that those of the file `path` were loaded into."""
    model = model_of(weights=path, **fields)
    network = new_network(model, seed)
    models.load(network, model)
    return network.state_dict()


def refusal(path, **fields):
    """The message of the CheckpointError that loading ends with."""
    with pytest.raises(CheckpointError) as caught:
        loaded(path, **fields)
    return str(caught.value)


def misfit(weights, **fields):
    """The message of the CheckpointError that loading `weights` into a network ends with."""
    model = model_of(weights="the file", **fields)
    with pytest.raises(CheckpointError) as caught:
        models.load_weights(new_network(model), weights, model)
    return str(caught.value)


def unreadable(path):
    """The message of the CheckpointError that reading ends with."""
    with pytest.raises(CheckpointError) as caught:
        models.read_weights(path)
    return str(caught.value)


def assert_equal(weights, expected, but=()):
    assert weights.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert sorted(different) == sorted(but)


# Networks


def test_a_network_depends_on_its_seed_alone(source):
    torch.manual_seed(99)
    one = models.build(model_of(), seed=7).state_dict()
    torch.manual_seed(100)
    torch.rand(5)
    other = models.build(model_of(), seed=7).state_dict()
    assert_equal(one, other)
    assert not torch.equal(models.build(model_of(), seed=8).state_dict()["conv1.weight"], one["conv1.weight"])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    models.build(model_of(), seed=7)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("arch", "head"),
    [("resnet18", "fc"), ("densenet121", "classifier"), ("mobilenet_v3_small", "classifier.3")],
)
def test_the_head_is_the_last_layer_and_has_the_recipes_classes(arch, head):
    network = new_network(model_of(arch, num_classes=7))
    assert models.head_names(network) == {f"{head}.weight", f"{head}.bias"}
    assert network.get_submodule(head).out_features == 7


@pytest.mark.parametrize(("misspelt", "meant"), [("resnet5O", "resnet50"), ("densenet_161", "densenet161")])
def test_an_unknown_architecture_gives_the_likely_one(misspelt, meant):
    """Whether the recipe refuses it or the building of the network does."""
    with pytest.raises(ConfigError, match=rf"`model\.arch`.*'{misspelt}'\. Did you mean {meant}\?"):
        models.build(config.load(JOBS / "digits.yaml", [f"model.arch={misspelt}"]).model, seed=0)


def test_a_network_that_is_no_classifier_is_refused():
    with pytest.raises(ConfigError, match="must be a torchvision classifier"):
        models.build(model_of("fcn_resnet50"), seed=0)


# What loads


def save_pth(weights, path):
    torch.save(weights, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def save_legacy(weights, path):
    """As torch before 1.6 wrote it, and as older files of torchvision are."""
    torch.save(weights, path.with_suffix(".pt"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pt")


def save_safetensors(weights, path):
    safetensors.torch.save_file(weights, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def save_with_prefix(weights, path):
    return save_pth({f"module.{name}": tensor for name, tensor in weights.items()}, path)


def save_safetensors_with_prefix(weights, path):
    return save_safetensors({f"module.{name}": tensor for name, tensor in weights.items()}, path)


def save_nested(weights, path):
    return save_pth({"epoch": 90, "arch": "resnet18", "state_dict": dict(weights)}, path)


def save_nested_with_prefix(weights, path):
    return save_pth({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)


@pytest.mark.parametrize(
    "save",
    [
        save_pth,
        save_legacy,
        save_safetensors,
        save_with_prefix,
        save_safetensors_with_prefix,
        save_nested,
        save_nested_with_prefix,
    ],
    ids=lambda save: save.__name__,
)
def test_weights_in_any_form_load_equal_to_the_last_bit(source, tmp_path, save):
    assert_equal(loaded(save(source, tmp_path / "weights")), source)


def test_weights_older_than_num_batches_tracked_load_and_the_rest_is_equal(source, tmp_path):
    without = {name: tensor for name, tensor in source.items() if not name.endswith("num_batches_tracked")}
    assert len(without) < len(source)
    weights = loaded(save_pth(without, tmp_path / "weights"))
    assert_equal(weights, source, but=source.keys() - without.keys())
    assert all(weights[name] == 0 for name in source.keys() - without.keys())


def test_a_densenet_with_the_names_of_old_torchvision_loads_equal(tmp_path):
    expected = new_network(model_of("densenet121"), seed=5).state_dict()
    old = {}
    for name, tensor in expected.items():
        for new_part, old_part in OLD_DENSENET.items():
            if "denselayer" in name and f".{new_part}" in name:
                name = name.replace(f".{new_part}", f".{old_part}")
        old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.denseblock1.denselayer1.norm1.weight" not in old
    assert_equal(loaded(save_pth(old, tmp_path / "weights"), arch="densenet121"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("save", [save_pth, save_safetensors], ids=lambda save: save.__name__)
def test_a_file_in_half_precision_loads_to_float32(source, tmp_path, dtype, save):
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in source.items()}
    weights = loaded(save(half, tmp_path / "weights"))
    assert {t.dtype for t in weights.values()} == {torch.float32, torch.int64}
    assert_equal(weights, {name: t.to(source[name].dtype) for name, t in half.items()})


def test_random_weights_need_no_file():
    model = model_of(weights=models.RANDOM)
    network = models.build(model, seed=7)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    models.load(network, model)
    assert_equal(network.state_dict(), before)


def test_loading_leaves_the_given_weights_alone(source, tmp_path):
    network = new_network(model_of())
    given = {name: tensor.clone() for name, tensor in source.items()}
    models.load_weights(network, given, model_of())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert_equal(given, source)


# Another head


def test_another_number_of_classes_names_the_setting_that_mends_it(source, tmp_path):
    path = save_pth(source, tmp_path / "weights")
    message = refusal(path, num_classes=5)
    for part in ("`model.head=replace`", "5 classes", "is for 10", str(path)):
        assert part in message


@pytest.mark.parametrize("num_classes", [5, 10])
def test_with_a_replaced_head_everything_but_the_head_is_loaded(source, tmp_path, num_classes):
    path = save_pth(source, tmp_path / "weights")
    weights = loaded(path, num_classes=num_classes, head="replace")
    assert weights["fc.weight"].shape == (num_classes, 512)
    assert_equal(weights, source, but=("fc.weight", "fc.bias"))


def test_a_replaced_head_needs_none_in_the_file(source, tmp_path):
    headless = {name: tensor for name, tensor in source.items() if not name.startswith("fc.")}
    path = save_pth(headless, tmp_path / "weights")
    assert_equal(loaded(path, head="replace"), source, but=("fc.weight", "fc.bias"))
    assert "lacks `fc.weight`" in refusal(path, head="keep")


def test_a_replaced_head_depends_on_the_seed_alone(source, tmp_path):
    doubled = {name: tensor * 2 for name, tensor in source.items()}
    paths = [save_pth(source, tmp_path / "one"), save_safetensors(doubled, tmp_path / "other")]
    heads = []
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        heads.append(loaded(path, seed=3, num_classes=5, head="replace")["fc.weight"])
    assert torch.equal(*heads)
    assert not torch.equal(loaded(paths[0], seed=4, num_classes=5, head="replace")["fc.weight"], heads[0])


# What is refused


def test_a_checkpoint_error_has_exit_code_65():
    assert CheckpointError.exit_code == ExitCode.BAD_DATA == 65


@pytest.mark.parametrize("arch", ["resnet34", "mobilenet_v3_small"])
@pytest.mark.parametrize("head", ["keep", "replace"])
def test_weights_of_another_architecture_name_the_setting(source, tmp_path, arch, head):
    path = save_pth(source, tmp_path / "weights")
    message = refusal(path, arch=arch, head=head)
    assert f"must be of a {arch}" in message
    assert str(path) in message
    assert "`model.arch`" in message


def test_weights_of_an_architecture_with_equal_names_and_other_shapes_name_the_setting(source):
    narrower = source | {"conv1.weight": source["conv1.weight"][:32]}
    message = misfit(narrower)
    assert "has shape" in message
    assert "`model.arch`" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer2.0.conv1.weight", float("nan")), ("bn1.running_var", float("inf")), ("fc.bias", float("-inf"))],
)
def test_weights_that_are_not_finite_are_refused_by_name(source, name, value):
    damaged = {n: t.clone() for n, t in source.items()}
    damaged[name].view(-1)[-1] = value
    message = misfit(damaged)
    assert "must be finite" in message
    assert f"`{name}`" in message


def test_one_missing_and_one_foreign_name_are_named(source):
    lacking = {name: tensor for name, tensor in source.items() if name != "layer3.1.bn2.bias"}
    assert "lacks `layer3.1.bn2.bias`" in misfit(lacking)
    adding = source | {"layer9.weight": torch.ones(1)}
    assert "adds `layer9.weight`" in misfit(adding)


@pytest.mark.parametrize(("name", "shape"), [("fc.weight", ()), ("fc.bias", ()), ("fc.weight", (10, 512, 1))])
def test_a_head_of_an_impossible_shape_is_refused(source, name, shape):
    assert "`model.weights`" in misfit(source | {name: torch.ones(shape)})


class Canary:
    """What pickle makes of it is a call that makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_was_run(source, tmp_path, new):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    torch.save(source | {"fc.extra": Canary(canary)}, path, _use_new_zipfile_serialization=new)
    assert str(path) in unreadable(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["evil.pth", "evil.safetensors", "evil"])
def test_a_bare_pickle_that_would_run_code_is_refused_and_nothing_was_run(tmp_path, name):
    canary, path = tmp_path / "canary", tmp_path / name
    path.write_bytes(pickle.dumps(Canary(canary)))
    assert str(path) in unreadable(path)
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists()  # it would have


def test_a_whole_pickled_network_is_refused_with_the_remedy(tmp_path):
    torch.save(models.build(model_of(), seed=0), tmp_path / "network.pth")
    assert "`model.state_dict()` alone" in unreadable(tmp_path / "network.pth")


@pytest.mark.parametrize("save", [save_pth, save_legacy, save_safetensors], ids=lambda save: save.__name__)
def test_a_truncated_file_is_refused_by_name(source, tmp_path, save):
    path = save({name: source[name] for name in ("conv1.weight", "bn1.weight", "fc.bias")}, tmp_path / "weights")
    size, cuts = path.stat().st_size, random.Random(0)
    lengths = [0, 1, 7, 8, 100, size - 1, size // 2, *(cuts.randrange(size) for _ in range(40))]
    for length in sorted(set(lengths), reverse=True):
        os.truncate(path, length)
        assert str(path) in unreadable(path)


@pytest.mark.parametrize(
    "content",
    [{}, [torch.ones(2)], torch.ones(2), 3, {"state_dict": {}}, {"fc.weight": [1.0]}, {3: torch.ones(2)}],
    ids=repr,
)
def test_a_file_that_holds_no_state_dict_is_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in unreadable(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_of_anything_else_is_refused_by_name(tmp_path, name):
    for content in (
        b"",
        b"<html>not found</html>",
        bytes(100),
        b"PK\x03\x04" + bytes(100),
        random.Random(0).randbytes(999),
    ):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in unreadable(tmp_path / name)


def test_a_folder_and_a_missing_file_are_refused_by_name(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pth", tmp_path / "absent.safetensors"):
        assert str(path) in unreadable(path)
