"""The model registry: a run's candidate as a version to load. With tracking.py the only importer of mlflow."""

import contextlib
import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
import mlflow.pytorch
import numpy as np
import safetensors.torch
import torch
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from swa_dist import config, models
from swa_dist.errors import CheckpointError, ConfigError, ServiceError, SwaDistError
from swa_dist.service import tracking
from swa_dist.service.spool import SPOOL_FILES, Event, Spool
from swa_dist.storage.files import read_json, sha256_file, write_atomic
from swa_dist.storage.folder import Folder
from swa_dist.storage.store import DiskStore

CHAMPION = "champion"
REGISTERED = "registered.json"

_SHA256 = "weights_sha256"
_WEIGHTS = Path("extra_files/model.safetensors")  # in a logged model
_EXAMPLE_IMAGES = 2  # an example of one image would fix the exported model's batch at one


@dataclass(frozen=True)
class Registered:
    name: str
    version: str
    champion: bool
    """Whether this version is @champion."""
    why: str


def spool_of(folder: Folder) -> Spool:
    """The spool of a run, as it is now."""
    folder.pull(*SPOOL_FILES)
    return Spool(folder.local, folder.push, folder.pull)


def send(folder: Folder) -> str:
    """Send what waits in a run's spool, its model among it. Returns the MLflow run's id; raises ServiceError."""
    return tracking.patiently(lambda: _send(folder))


def send_within(folder: Folder, seconds: float) -> bool:
    """Whether `send` ended well within so many seconds; if it takes longer it is left to itself. Raises nothing."""
    sent = threading.Event()

    def attempt() -> None:
        with contextlib.suppress(Exception):
            send(folder)
            sent.set()

    thread = threading.Thread(target=attempt, name="mlflow-last-words", daemon=True)
    thread.start()
    thread.join(seconds)
    return sent.is_set()


def _send(folder: Folder) -> str:
    spool = spool_of(folder)
    for event in spool.waiting():
        if event["kind"] == "model":
            folder.store.open(event["entry"])
            folder.pull(REGISTERED)
    run_id = tracking.send(spool, {"model": register})
    folder.push(REGISTERED)
    return run_id


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
    weights = DiskStore(folder).open(event["entry"]) / "model.safetensors"
    model_id = _logged_model(client, run_id) or _log_model(run_id, recipe, weights, event["uri"])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = _texts(event["tags"]) | {_SHA256: sha256_file(weights)}
    created = client.create_model_version(
        name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=tags
    )
    return str(created.version)


def _logged_model(client: mlflow.MlflowClient, run_id: str) -> str | None:
    """The id of the run's logged model that is whole, if there is one. What an outage left of others is removed."""
    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    whole = [model.model_id for model in found if model.status == LoggedModelStatus.READY]
    for model in found:
        if model.model_id not in whole:
            client.delete_logged_model(model.model_id)
    return str(whole[0]) if whole else None


def _log_model(run_id: str, recipe: config.Recipe, weights: Path, uri: str) -> str:
    model = models.build(recipe.model, recipe.seed)
    model.load_state_dict(safetensors.torch.load_file(weights))
    model.eval()  # in train mode logging would run a batch through and change BatchNorm's statistics
    size = recipe.data.image_size
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with torch.random.fork_rng(devices=[]), mlflow.start_run(run_id=run_id, log_system_metrics=False):
        info = mlflow.pytorch.log_model(
            model,
            name="model",
            input_example=np.zeros((_EXAMPLE_IMAGES, 3, size, size), dtype=np.float32),
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", "torchvision", "numpy"],
            extra_files=[str(weights)],
        )
    return str(info.model_id)


def stated_sha256(uri: str, model: str) -> str | None:
    """SHA-256 of the weights of a version, models:/NAME@ALIAS or models:/NAME/VERSION, by its tag; None without one."""
    tags: dict[str, str] = _version(uri, model).tags
    return tags.get(_SHA256)


def pinned(uri: str, model: str) -> str:
    """models:/NAME@ALIAS as models:/NAME/VERSION, which means the same for good."""
    version = _version(uri, model)
    return f"models:/{version.name}/{version.version}"


def download(uri: str, model: str, cache: Path) -> Path:
    """The weights file of a version, from the cache if it was there before."""
    version = _version(uri, model)
    source = hashlib.sha256(f"{uri} {version.name} {version.version} {version.run_id}".encode()).hexdigest()[:12]
    path = cache / f"{version.name}-v{version.version}-{source}.safetensors"
    if not path.is_file():
        tracking.patiently(lambda: _download(uri, f"models:/{version.name}/{version.version}", path))
    return path


def _download(uri: str, address: str, path: Path) -> None:
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with tempfile.TemporaryDirectory() as scratch, _answering(uri):
        found = mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=scratch, tracking_uri=uri)
        weights = Path(found) / _WEIGHTS
        if not weights.is_file():
            raise CheckpointError(f"{address} must hold {_WEIGHTS}, but does not: another program registered it.")
        write_atomic(path, weights.read_bytes())


def is_aliased(uri: str, run_key: str, run_id: str, registered: tuple[str, str] | None) -> bool:
    """Whether any version of a run, under any name, has an alias. `registered`: the version (name, number) known to be.

    Raises ServiceError where the registry doesn't answer, and CheckpointError where it doesn't know the model.
    """
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).exists():  # MLflow would make an empty one
        raise ServiceError(f"MLflow's database must be at {database}, but is not.")
    versions = set() if registered is None else {registered}
    with _answering(uri):
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        for query in (f"tags.run_key = '{run_key}'", f"run_id = '{run_id}'"):
            versions |= {(found.name, str(found.version)) for found in client.search_model_versions(query)}
        models = {name: _aliases(client, name) for name in sorted({name for name, _ in versions})}
    for name, aliases in models.items():
        if aliases is None:  # an empty registry at the old address knows of no alias either
            raise CheckpointError(
                f"MLflow at {uri} must know the model {name}, of which the run with key {run_key[:12]} is a version,"
                " but does not. The run stays; if the model was deleted, remove its folder."
            )
        if any((name, str(version)) in versions for version in aliases.values()):
            return True
    return False


def _aliases(client: mlflow.MlflowClient, name: str) -> dict[str, Any] | None:
    """The versions of a model that have aliases, by alias; None where there is no such model. The versions that a
    search finds don't tell theirs."""
    try:
        aliases: dict[str, Any] = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return aliases


def _version(uri: str, model: str) -> Any:
    name, separator, which = model.removeprefix("models:/").partition("@" if "@" in model else "/")
    if not name or not separator or not which:
        raise ConfigError(f"`model.weights` must be like models:/NAME@ALIAS or models:/NAME/VERSION, but is {model}.")
    tracking.configure_client()

    def ask() -> Any:
        with _answering(uri):
            client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            try:
                if separator == "@":
                    return client.get_model_version_by_alias(name, which)
                return client.get_model_version(name, which)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise ConfigError(
                        f"`model.weights` must be in the registry at {uri}, but {model} is not."
                    ) from None
                raise

    return tracking.patiently(ask)


@contextlib.contextmanager
def _answering(uri: str) -> Iterator[None]:
    try:
        yield
    except SwaDistError:
        raise
    except Exception as error:  # a database, a driver, a bucket: whatever MLflow is made of
        raise tracking.unanswered(uri, error) from error


def _existing_version(client: mlflow.MlflowClient, name: str, run_id: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return str(min(int(version.version) for version in found)) if found else None


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
