"""A run's candidate in the model registry: logged, checked, a version, @challenger, and through the gate. Imports
mlflow."""

import contextlib
import json
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
from swa_dist.service import champion, logged_model, model_card, scored, tracking
from swa_dist.service.layout import RECIPE, SUMMARY
from swa_dist.service.logged_model import MODEL_SHA256
from swa_dist.service.progress import Display, Silent
from swa_dist.service.promotion import Gatekeeper, Ruling
from swa_dist.service.spool import SPOOL_FILES, Event, Spool
from swa_dist.service.versions import WEIGHTS_SHA256
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

    def handle(client: mlflow.MlflowClient, run_id: str, event: Event, local: Path) -> None:
        if read_json(local / REGISTERED) is None:
            ruling = register(client, run_id, event, folder, display)
            write_atomic(local / REGISTERED, json.dumps(ruling.facts(), indent=1))
        folder.push(REGISTERED)  # before the event counts as sent: nothing would make it again

    return tracking.send(spool, {"model": handle})


def register(client: mlflow.MlflowClient, run_id: str, event: Event, folder: Folder, display: Display) -> Ruling:
    """Register the candidate of a spooled event, once, and have the gate decide about it, once. `folder`: the run's,
    with what it holds pulled."""
    recipe = config.from_tree(event["recipe"])
    name = recipe.registry.model
    version = _existing_version(client, name, run_id)
    if version is None:
        version = _create_version(client, run_id, recipe, folder.local, event, display)
    _link(client, run_id, name, version)
    who = f"the run {recipe.name} in {folder.url.rstrip('/').rpartition('/')[2]}"
    return _rule(event["uri"], recipe, version, who, display)


def _rule(uri: str, recipe: Recipe, version: str, who: str, display: Display) -> Ruling:
    """What becomes of the version. Where the gate can't decide, for whichever reason but an outage, it is held."""
    name = recipe.registry.model
    keeper = Gatekeeper(uri, name, display, who)
    try:
        if (ruling := keeper.ruled(version)) is not None:  # before a crash; a person may have moved @champion since
            return ruling
        keeper.challenge(version)
        if recipe.registry.promote == "hold":
            return keeper.hold(
                version, f"`registry.promote` is hold; when you see fit: swa-dist promote {name} --version {version}"
            )
        return keeper.promote(version)
    except BusyError as error:
        raise ServiceError(str(error)) from None
    except ServiceError:
        raise
    except Exception as error:  # of the comparison: the images, the memory, a GPU
        why = f"it can't be compared: {error}"
    try:
        return keeper.hold(version, why)
    except ServiceError:
        raise
    except SwaDistError:  # as where the place of the lease can't be seen from here
        return Ruling(name, version, "held", why, over=None, decision=None)


def _create_version(
    client: mlflow.MlflowClient, run_id: str, recipe: Recipe, folder: Path, event: Event, display: Display
) -> str:
    name, uri = recipe.registry.model, event["uri"]
    lock = recipe.registry.lock_url
    wanted = join(recipe.output.dir, f".{name}.registry.lease") if lock == "auto" else lock
    try:
        client.create_registered_model(name, tags={champion.LOCK: wanted}, description=_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    kept = champion.claim_lock(client, name, wanted)
    if lock not in ("auto", kept):
        display.say(
            f"warning: the lease of {name} stays at {kept}, where it was first, and not at {lock}, as the recipe's"
            f" `registry.lock_url` has it. To move it, while nothing runs, change the model's tag {champion.LOCK}."
        )
    weights = DiskStore(folder).open(event["entry"]) / "model.safetensors"
    contents = _contents(recipe, folder, event, weights)
    display.progress("register", 0, 1, "logging the model and loading it in a fresh process")
    model_id = _logged_model(client, run_id) or logged_model.log(run_id, uri, contents)
    display.progress("register", 1, 1)
    tags = {tag: str(value) for tag, value in event["tags"].items()}
    logged = client.get_logged_model(model_id)
    tags |= {WEIGHTS_SHA256: sha256_file(weights), MODEL_SHA256: logged.tags[MODEL_SHA256]}
    created = client.create_model_version(
        name,
        # Its place: an address models:/ID is looked up at MLflow's global address, whatever is passed.
        source=logged.artifact_location,
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
    finished = datetime.fromtimestamp(event["time_ms"] / 1000, UTC).date().isoformat()
    card = model_card.card(summary, recipe, classes, model=recipe.registry.model, date=finished)
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


def _logged_model(client: mlflow.MlflowClient, run_id: str) -> str | None:
    """The id of the run's logged model that passed, if there is one. What an outage left of others is removed."""
    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    passed = [m.model_id for m in found if m.status == LoggedModelStatus.READY and MODEL_SHA256 in m.tags]
    for model in found:
        if model.model_id not in passed:
            client.delete_logged_model(model.model_id)
    return str(passed[0]) if passed else None


def _link(client: mlflow.MlflowClient, run_id: str, name: str, version: str) -> None:
    """Have MLflow's pages lead from the run and its logged model to the version, as `mlflow.register_model` does."""
    model_id = _logged_model(client, run_id)
    link = json.dumps([{"name": name, "version": int(version)}])
    if model_id and client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS) != link:
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: link})


def _existing_version(client: mlflow.MlflowClient, name: str, run_id: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return str(min(int(version.version) for version in found)) if found else None
