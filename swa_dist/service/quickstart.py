"""The first run of a newcomer: real digits, a network trained from nothing, then the service's main job on it."""

import json
from pathlib import Path

import safetensors.torch
import torch

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.data import digits
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.scan import scan
from swa_dist.data.sizes import cores_here, sizes
from swa_dist.method.schedule import Linear
from swa_dist.service import launch
from swa_dist.service.progress import Display
from swa_dist.service.run import Finished
from swa_dist.storage.files import read_json, write_atomic, writing
from swa_dist.training import loop
from swa_dist.training.averages import Averages
from swa_dist.training.batchnorm import RunningStatistics
from swa_dist.training.guard import Guard
from swa_dist.training.state import TrainState
from swa_dist.training.world import SoloWorld

_START_EPOCHS = 15
_START_MAX_LR = 0.05
_START_MIN_LR = 0.01
_MAKES_START = ("seed", "precision", "model.arch", "data.", "optim.momentum", "optim.weight_decay")


def quickstart(recipe: Recipe, display: Display, *, again: bool = False) -> Finished:
    """Write the images, train the starting weights by plain SGD, and run the recipe on both."""
    data = Path(recipe.data.train).parent
    with writing(data):
        data.parent.mkdir(parents=True, exist_ok=True)
    digits.write(data)
    start = Path(recipe.model.weights)
    made_for = start.with_suffix(".json")
    wanted = {n: v for n, v in config.flatten(config.to_tree(recipe)).items() if n.startswith(_MAKES_START)}
    if not start.is_file() or read_json(made_for) != wanted:
        display.say(f"training a {recipe.model.arch} from nothing by plain SGD, to have somewhere to start: {start}")
        train_start(recipe, digits_loaders(recipe), start, display)
        write_atomic(made_for, json.dumps(wanted, indent=1))
    return launch.finetune(recipe, display, again=again)


def digits_loaders(recipe: Recipe) -> DaliLoaders:
    """The recipe's images for this process alone."""
    train, val = scan(recipe.data.train, "data.train"), scan(recipe.data.val, "data.val")
    return DaliLoaders(
        train,
        val,
        recipe.data,
        seed=recipe.seed,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        sizes=sizes(recipe.data, cores_here(), 1),
    )


def train_start(
    recipe: Recipe, loaders: DaliLoaders, path: Path, display: Display, epochs: int = _START_EPOCHS
) -> None:
    """Train from random weights, the learning rate falling linearly from 0.05 to 0.01, and save them at `path`."""
    world = SoloWorld()
    model = models.build(recipe.model, recipe.seed)
    optimizer = loop.sgd(model, models.head_names(model), recipe)
    state = TrainState(model=model, optimizer=optimizer, averages=Averages(recipe.average), guard=Guard(recipe.guard))
    images = epochs * loaders.num_train
    schedule = Linear(_START_MAX_LR, _START_MIN_LR, run_images=images)
    running = RunningStatistics(model, world)
    for epoch in range(epochs):
        for info in loop.steps(state, model, running, loaders.train(epoch, 0, {}), schedule, recipe, world):
            display.progress("start", info.stop, images, f"epoch {epoch + 1}/{epochs}")
    write_atomic(path, safetensors.torch.save(model.state_dict()))
