"""A weights file by itself, outside a run: what it scores, and fresh BatchNorm statistics for it."""

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.index import Index
from swa_dist.data.order import check_groups
from swa_dist.data.scan import scan
from swa_dist.data.sizes import cores_here, sizes
from swa_dist.errors import ConfigError, DataError, OutputError
from swa_dist.service.progress import Display
from swa_dist.storage.files import check_writable, write_atomic
from swa_dist.storage.folder import absolute
from swa_dist.training.evaluate import Outcomes, evaluate
from swa_dist.training.recalibrate import most_images, recalibrate_as
from swa_dist.training.world import SoloWorld

_RECIPE = "recipe.yaml"


def recipe_beside(weights: Path) -> Path:
    """The recipe of the run whose folder `weights` lies in. Raises ConfigError where it lies in none."""
    for folder in weights.resolve().parents:
        if (folder / _RECIPE).is_file():
            return folder / _RECIPE
    raise ConfigError(f"`--recipe` must be given for weights outside a run's folder, but is not, for {weights}.")


def evaluate_file(weights: Path, data: str, recipe: Recipe, display: Display) -> dict[str, Any]:
    """The metrics of the weights on a folder of class folders, as a run with this recipe would find them."""
    model = loaded(weights, recipe)  # before the images, which may take minutes to list
    outcomes = outcomes_of(model, _scanned(data, recipe, display), recipe, display)
    return {"weights": str(weights), "data": data, "num_images": len(outcomes.ids)} | outcomes.metrics()


def loaded(weights: Path, recipe: Recipe) -> nn.Module:
    """The recipe's network with the weights of a file. Raises ConfigError and CheckpointError."""
    if not weights.is_file():
        raise ConfigError(f"`MODEL` must be a weights file, but {weights} does not exist.")
    local = config.replace(recipe, **{"model.weights": str(weights), "model.head": "keep"})
    model = models.build(local.model, local.seed)
    models.load(model, local.model)
    return model


def outcomes_of(model: nn.Module, images: Index, recipe: Recipe, display: Display) -> Outcomes:
    """What the network makes of each image, as a run with this recipe would find it."""
    world = _world()
    loaders = _loaders(images, recipe, world, display)
    return evaluate(
        model.to(world.device),
        loaders.validation(),
        loaders.num_val,
        recipe,
        world,
        functools.partial(display.progress, "evaluate"),
    )


def recalibrate_file(weights: Path, data: str, out: Path, recipe: Recipe, display: Display) -> dict[str, Any]:
    """Write the weights, with BatchNorm statistics of the images in a folder of class folders, to `out`."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"`--out` must be a .safetensors file, but is {out}.")
    try:
        check_writable(out.parent)
    except OutputError as error:
        raise OutputError(f"`--out` must be where files can be written, but {out} is not: {error}") from None
    world = _world()
    model = loaded(weights, recipe).to(world.device)
    loaders = _loaders(_scanned(data, recipe, display), recipe, world, display)
    check_groups(most_images(recipe.recalibrate, loaders.num_train), recipe.data.group_images)
    report = recalibrate_as(recipe, model, loaders, world, functools.partial(display.progress, "recalibrate"))
    if report.num_layers == 0:
        display.say(f"note: {recipe.model.arch} has no BatchNorm; {out} holds the weights as they were")
    write_atomic(out, safetensors.torch.save({name: t.cpu() for name, t in model.state_dict().items()}))
    return {"weights": str(weights), "data": data, "out": str(out)} | asdict(report)


def _world() -> SoloWorld:
    return SoloWorld(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def _scanned(data: str, recipe: Recipe, display: Display) -> Index:
    return scan(absolute(data), "DATA", functools.partial(display.progress, "index"), labels=recipe.data.val_labels)


def _loaders(images: Index, recipe: Recipe, world: SoloWorld, display: Display) -> DaliLoaders:
    if len(images.classes) != recipe.model.num_classes:
        raise DataError(
            f"`DATA` must have the {recipe.model.num_classes} classes of the model, but {images.root} has"
            f" {len(images.classes)}."
        )
    return DaliLoaders(
        images,
        images,
        recipe.data,
        seed=recipe.seed,
        rank=0,
        world_size=1,
        device=world.device,
        sizes=sizes(
            config.replace(recipe, **{"data.train": images.root, "data.val": images.root}).data, cores_here(), 1
        ),
        warn=lambda message: display.say(f"warning: {message}"),
    )
