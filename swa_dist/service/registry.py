"""A run's candidate in the model registry: logged, checked, a version, @challenger, and through the gate. Imports
mlflow."""

import contextlib
import functools
import json
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import safetensors.torch
import torchvision.models
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.data import index
from swa_dist.data.index import Index
from swa_dist.errors import BusyError, CheckpointError, ServiceError, SwaDistError
from swa_dist.service import champion, logged_model, model_card, scored, tracking, versions
from swa_dist.service.champion import CHALLENGER
from swa_dist.service.layout import RECIPE, SUMMARY
from swa_dist.service.progress import Display, Silent
from swa_dist.service.promotion import Gatekeeper, Ruling
from swa_dist.service.spool import SPOOL_FILES, Event, Spool
from swa_dist.service.versions import MODEL_SHA256, WEIGHTS_SHA256
from swa_dist.storage.files import read_json, sha256_file, write_atomic
from swa_dist.storage.folder import Folder, join
from swa_dist.storage.store import DiskStore
from swa_dist.training.evaluate import Outcomes
from swa_dist.training.state import load_entry

REGISTERED = "registered.json"
"""In a run's folder: what became of its version (a `Ruling`)."""

_VAL = "val.parquet"
_DESCRIPTION = (
    "An image classifier, fine-tuned and averaged by swa_dist. @champion: the version to use, by its evidence."
    " @challenger: the newest that is not. @previous: what was @champion before."
)


def spool_of(folder: Folder) -> Spool:
    """The spool of a run, as it is now."""
    folder.pull(*SPOOL_FILES)
    return Spool(folder.local, folder.push, folder.pull)


def send(folder: Folder, display: Display) -> str:
    """Send what waits in a run's spool, its model among it. Returns the MLflow run's id; raises ServiceError."""
    return tracking.patiently(lambda: _send(folder, display))


def send_within(folder: Folder, seconds: float) -> bool:
    """Whether `send` ended well within so many seconds; if it takes longer it is left to itself. Raises nothing."""
    sent = threading.Event()

    def attempt() -> None:
        with contextlib.suppress(Exception):
            send(folder, Silent())
            sent.set()

    thread = threading.Thread(target=attempt, name="mlflow-last-words", daemon=True)
    thread.start()
    thread.join(seconds)
    return sent.is_set()


def _send(folder: Folder, display: Display) -> str:
    spool = spool_of(folder)
    for event in spool.waiting():
        if event["kind"] == "model":
            folder.store.open(event["entry"])
            folder.pull(REGISTERED, SUMMARY, RECIPE, _VAL)
    run_id = tracking.send(spool, {"model": functools.partial(register, display=display)})
    folder.push(REGISTERED)
    return run_id


def register(client: mlflow.MlflowClient, run_id: str, event: Event, folder: Path, *, display: Display) -> None:
    """Register the candidate of a spooled event, once, have the gate decide about it, and leave `registered.json` in
    the run's folder."""
    if read_json(folder / REGISTERED) is not None:
        return
    recipe = config.from_tree(event["recipe"])
    name = recipe.registry.model
    version = _existing_version(client, name, run_id) or _create_version(client, run_id, recipe, folder, event, display)
    _link(client, run_id, name, version)
    found = champion.look(client, name)
    if found.champion != version and int(found.challenger or 0) < int(version):
        client.set_registered_model_alias(name, CHALLENGER, version)
    ruling = _rule(event["uri"], recipe, version, folder, display)
    write_atomic(folder / REGISTERED, json.dumps(ruling.facts(), indent=1))


def _rule(uri: str, recipe: Recipe, version: str, folder: Path, display: Display) -> Ruling:
    """What becomes of the version. Where the gate can't decide, for whichever reason but an outage, it is held."""
    name = recipe.registry.model
    held = functools.partial(Ruling, name, version, "held", over=None, decision=None)
    if recipe.registry.promote == "hold":
        return held(f"`registry.promote` is hold; when you see fit: swa-dist promote {name} --version {version}")
    try:
        return Gatekeeper(uri, name, display, f"the run {recipe.name} in {folder.name}").promote(version)
    except BusyError as error:
        raise ServiceError(str(error)) from None
    except ServiceError:
        raise
    except SwaDistError as error:
        return held(f"it can't be compared: {error}")


def _create_version(
    client: mlflow.MlflowClient, run_id: str, recipe: Recipe, folder: Path, event: Event, display: Display
) -> str:
    name, uri = recipe.registry.model, event["uri"]
    lock = recipe.registry.lock_url
    given = lock != "auto"
    wanted = lock if given else join(recipe.output.dir, f".{name}.registry.lease")
    try:
        client.create_registered_model(name, tags={champion.LOCK: wanted}, description=_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    champion.claim_lock(client, name, wanted, given=given)
    weights = DiskStore(folder).open(event["entry"]) / "model.safetensors"
    contents = _contents(recipe, folder, event, weights)
    display.progress("register", 0, 1, "logging the model and loading it in a fresh process")
    model_id = _logged_model(client, run_id) or logged_model.log(run_id, uri, contents)
    display.progress("register", 1, 1)
    tags = {tag: str(value) for tag, value in event["tags"].items()}
    tags |= {WEIGHTS_SHA256: sha256_file(weights), MODEL_SHA256: _digest(client, uri, model_id)}
    created = client.create_model_version(
        name,
        # Its place: an address models:/ID is looked up at MLflow's global address, whatever is passed.
        source=client.get_logged_model(model_id).artifact_location,
        run_id=run_id,
        model_id=model_id,
        tags=tags,
        description=f"{tags['verdict']}\n\nMore in {logged_model.CARD}, among its files.",
    )
    return str(created.version)


def _contents(recipe: Recipe, folder: Path, event: Event, weights: Path) -> logged_model.Contents:
    summary = read_json(folder / SUMMARY)
    if summary is None:
        raise CheckpointError(f"{folder} must hold {SUMMARY}, since the run is finished, but does not.")
    tensors, _ = load_entry(DiskStore(folder), event["entry"])
    val = index.load(str(folder / _VAL), recipe.data.val)
    network = models.build(recipe.model, recipe.seed)
    network.load_state_dict(safetensors.torch.load_file(weights))
    evidence = scored.scored(recipe, Outcomes.of(tensors["outcomes"]), val, summary)
    classes = _class_names(recipe, val)
    today = datetime.now(UTC).date().isoformat()
    card = model_card.card(summary, recipe, classes, model=recipe.registry.model, date=today)
    return logged_model.Contents(
        network=network,
        classes=classes,
        resize_size=recipe.data.resize_size,
        image_size=recipe.data.image_size,
        files=evidence.files() | {logged_model.WEIGHTS: weights, logged_model.CARD: card.encode()},
    )


def _class_names(recipe: Recipe, val: Index) -> tuple[str, ...]:
    """What people call the classes. ImageNet's folders have numbers for names, in the order of torchvision's names."""
    if recipe.data.kind == "imagenet":
        return tuple(map(str, torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]))
    return val.classes


def _digest(client: mlflow.MlflowClient, uri: str, model_id: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        place = client.get_logged_model(model_id).artifact_location
        return logged_model.digest(versions.download_from(uri, place, Path(scratch)))


def _logged_model(client: mlflow.MlflowClient, run_id: str) -> str | None:
    """The id of the run's logged model that is whole, if there is one. What an outage left of others is removed."""
    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    whole = [model.model_id for model in found if model.status == LoggedModelStatus.READY]
    for model in found:
        if model.model_id not in whole:
            client.delete_logged_model(model.model_id)
    return str(whole[0]) if whole else None


def _link(client: mlflow.MlflowClient, run_id: str, name: str, version: str) -> None:
    """Have MLflow's pages lead from the run and its logged model to the version, as `mlflow.register_model` does."""
    model_id = _logged_model(client, run_id)
    link = json.dumps([{"name": name, "version": int(version)}])
    if model_id and client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS) != link:
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: link})


def _existing_version(client: mlflow.MlflowClient, name: str, run_id: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return str(min(int(version.version) for version in found)) if found else None
