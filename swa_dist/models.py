"""A network from a recipe, and weights from a local file: verified, their class count checked. torchvision's home."""

import difflib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import torchvision.models
from torch import Tensor, nn

from swa_dist.config import Model
from swa_dist.errors import CheckpointError, ConfigError

RANDOM = "random"
"""In place of a weights file: random initial weights, by the seed."""

_DENSENET_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_BUFFER_OF_NEW_TORCH = "num_batches_tracked"


def build(model: Model, seed: int) -> nn.Module:
    """The network of `model`, in train mode on the CPU, with random weights that depend on `seed` alone.

    Raises ConfigError for an unknown architecture.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if model.arch not in names:
        close = difflib.get_close_matches(model.arch, names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"`model.arch` must be a torchvision classifier, but is {model.arch!r}.{hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = torchvision.models.get_model(model.arch, weights=None, num_classes=model.num_classes)
    if getattr(network, "aux_logits", False) or not head_names(network):
        raise ConfigError(
            f"`model.arch` must be a classifier with one output and a linear last layer, but {model.arch} is not."
            " ResNets, DenseNets, EfficientNets, ConvNeXts, ViTs and others are."
        )
    return network


def load(network: nn.Module, model: Model) -> None:
    """Put the weights of the local file `model.weights` into `network`. Raises CheckpointError where they don't fit."""
    if model.weights != RANDOM:
        load_weights(network, read_weights(Path(model.weights)), model)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file or a pickled state_dict, by today's names. Never runs code of the file."""
    try:
        if path.suffix == ".safetensors":
            tensors: object = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} must hold tensors only, but is a pickle that would run code or is damaged."
            " Save `model.state_dict()` alone, best as .safetensors."
        ) from None
    except Exception as error:  # a damaged file fails in whichever way its damage has it
        raise CheckpointError(f"{path} must be a weights file, but can't be read: {error}.") from None
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]
    if (
        not isinstance(tensors, Mapping)
        or not tensors
        or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items())
    ):
        raise CheckpointError(
            f"{path} must be a state_dict, but holds something else. Save `model.state_dict()` alone."
        )
    names = {name: name.removeprefix("module.") for name in tensors}
    return {_DENSENET_OLD_NAME.sub(r"\1\2", names[name]): tensor for name, tensor in tensors.items()}


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], model: Model) -> None:
    """Load `weights`, all of them into all of `network`; with a replaced head, all but the head.

    Raises CheckpointError naming the first thing that doesn't fit, and the setting that mends it.
    """
    expected = network.state_dict()
    head = head_names(network)
    given = dict(weights)
    if model.head == "replace":
        given |= {name: expected[name] for name in head}
    missing = [n for n in expected if n not in given and not n.endswith(_BUFFER_OF_NEW_TORCH)]
    foreign = [n for n in given if n not in expected]
    if missing or foreign:
        name, what = (missing[0], "lacks") if missing else (foreign[0], "adds")
        raise CheckpointError(
            f"`model.weights` must be of a {model.arch}, but {model.weights} {what} `{name}`"
            f" ({len(missing)} names missing, {len(foreign)} foreign). Set `model.arch` to the weights' architecture."
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            if name in head and tensor.ndim:
                raise CheckpointError(
                    f"`model.weights` must be for {model.num_classes} classes, but {model.weights} is for"
                    f" {tensor.shape[0]}. Set `model.head=replace` for a new head, or `model.num_classes`."
                )
            raise CheckpointError(
                f"`model.weights` must be of a {model.arch}, but `{name}` in {model.weights} has shape"
                f" {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}."
                " Set `model.arch` to the weights' architecture."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"`model.weights` must be finite, but `{name}` in {model.weights} is not.")
    # strict=False is for weights older than num_batches_tracked only; all else was checked above.
    network.load_state_dict(given, strict=False)


def head_names(network: nn.Module) -> frozenset[str]:
    """Names of the last linear layer's parameters: fc.weight and fc.bias of a ResNet, classifier.* of a DenseNet."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    return frozenset(name for name, _ in network.named_parameters() for layer in last if name.startswith(f"{layer}."))
