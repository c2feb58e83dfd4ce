"""The model registry: a run's candidate as a version to load. With tracking.py the only importer of mlflow."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pytorch
import numpy as np
import safetensors.torch
import torch
from mlflow.exceptions import MlflowException

from swa_dist import config, models
from swa_dist.service.tracking import Event
from swa_dist.storage import Store, read_json, write_atomic

CHAMPION = "champion"
REGISTERED = "registered.json"

_EXAMPLE_IMAGES = 2  # an example of one image would fix the exported model's batch at one


@dataclass(frozen=True)
class Registered:
    name: str
    version: str
    champion: bool
    """Whether this version is @champion."""
    why: str


def register(client: mlflow.MlflowClient, run_id: str, event: Event, folder: Path) -> None:
    """Register the candidate of a spooled event, once, and leave `registered.json` in the run's folder.

    The version's tags hold the run key, the weights' SHA-256 and the verdict. The first version of a name becomes
    @champion if the recipe says so; one that is set stays.
    """
    if read_json(folder / REGISTERED) is not None:
        return
    recipe = config.from_tree(event["recipe"])
    name = recipe.registry.model
    version = _existing_version(client, name, run_id) or _create_version(client, run_id, recipe, folder, event)
    registered = _decide(client, recipe, name, version)
    write_atomic(folder / REGISTERED, json.dumps(asdict(registered), indent=1))


def _create_version(client: mlflow.MlflowClient, run_id: str, recipe: config.Recipe, folder: Path, event: Event) -> str:
    name = recipe.registry.model
    weights = Store(folder).open(event["entry"]) / "model.safetensors"
    model = models.build(recipe.model, recipe.seed)
    model.load_state_dict(safetensors.torch.load_file(weights))
    model.eval()  # in train mode logging would run a batch through and change BatchNorm's statistics
    size = recipe.data.image_size
    mlflow.set_tracking_uri(event["uri"])
    mlflow.set_registry_uri(event["uri"])
    with torch.random.fork_rng(devices=[]), mlflow.start_run(run_id=run_id, log_system_metrics=False):
        info = mlflow.pytorch.log_model(
            model,
            name="model",
            input_example=np.zeros((_EXAMPLE_IMAGES, 3, size, size), dtype=np.float32),
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", "torchvision", "numpy"],
            extra_files=[str(weights)],
        )
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        name, source=info.model_uri, run_id=run_id, model_id=info.model_id, tags=_texts(event["tags"])
    )
    return str(created.version)


def _existing_version(client: mlflow.MlflowClient, name: str, run_id: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return str(found[0].version) if found else None


def _decide(client: mlflow.MlflowClient, recipe: config.Recipe, name: str, version: str) -> Registered:
    champion = _champion(client, name)
    if champion == version:
        return Registered(name, version, True, "it is @champion already")
    if champion is not None:
        return Registered(name, version, False, f"@champion stays version {champion}; promotion is a step of its own")
    if recipe.registry.first == "hold":
        return Registered(name, version, False, "the first version, and `registry.first` is hold: a person decides")
    client.set_registered_model_alias(name, CHAMPION, version)
    return Registered(
        name, version, True, "there was no @champion and `registry.first` is promote, whatever the verdict"
    )


def _champion(client: mlflow.MlflowClient, name: str) -> str | None:
    aliases: dict[str, Any] = client.get_registered_model(name).aliases
    return str(aliases[CHAMPION]) if CHAMPION in aliases else None


def _texts(tags: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in tags.items()}
