"""What the model registry holds: versions, their aliases, their files. Asks only; changes nothing. Imports mlflow."""

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
from mlflow.exceptions import MlflowException

from swa_dist.errors import CheckpointError, ConfigError, ServiceError
from swa_dist.service import logged_model, tracking
from swa_dist.storage.files import write_atomic

WEIGHTS_SHA256 = "weights_sha256"
"""Tag of a version: SHA-256 of its weights."""

_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)


def stated_sha256(uri: str, model: str) -> str | None:
    """SHA-256 of the weights of a version, models:/NAME@ALIAS or models:/NAME/VERSION, by its tag; None without one."""
    tags: dict[str, str] = version_of(uri, model).tags
    return tags.get(WEIGHTS_SHA256)


def pinned(uri: str, model: str) -> str:
    """models:/NAME@ALIAS as models:/NAME/VERSION, which means the same for good."""
    version = version_of(uri, model)
    return f"models:/{version.name}/{version.version}"


def download(uri: str, model: str, cache: Path) -> Path:
    """The weights file of a version, from the cache if it was there before."""
    version = version_of(uri, model)
    source = hashlib.sha256(f"{uri} {version.name} {version.version} {version.run_id}".encode()).hexdigest()[:12]
    path = cache / f"{version.name}-v{version.version}-{source}.safetensors"
    if not path.is_file():
        tracking.patiently(lambda: _download(uri, version.name, version.version, path))
    return path


def _download(uri: str, name: str, version: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        weights = _fetch(uri, name, version, Path(scratch)) / logged_model.FILES / logged_model.WEIGHTS
        if not weights.is_file():
            raise CheckpointError(
                f"models:/{name}/{version} must hold {logged_model.WEIGHTS}, but does not: another program made it."
            )
        write_atomic(path, weights.read_bytes())


def verified(uri: str, name: str, version: str, into: Path) -> Path:
    """The folder with the files of a version. Raises CheckpointError where they are not those its tag states."""
    address = f"models:/{name}/{version}"
    stated = version_of(uri, address, "the version").tags.get(logged_model.MODEL_SHA256)
    if stated is None:
        raise CheckpointError(
            f"{address} must have the tag {logged_model.MODEL_SHA256}, but has not: another program registered it, or"
            " a version of this one that knew no promotion. Register a version with `swa-dist finetune`; if this one"
            f" is @champion, put that in its place: swa-dist rollback {name} --to VERSION --reason WHY."
        )
    folder = tracking.patiently(lambda: _fetch(uri, name, version, into))
    found = logged_model.digest(folder)
    if found != stated:
        raise CheckpointError(
            f"the files of {address} must have the SHA-256 in its tag, {stated[:12]}, but have {found[:12]}: they were"
            " changed since they were registered. It is not promoted; if it is @champion, `swa-dist rollback`."
        )
    return folder


def _fetch(uri: str, name: str, version: str, into: Path) -> Path:
    """The folder with the files of a version, downloaded."""
    with tracking.answering(uri):
        # By its place: an address models:/... is looked up at MLflow's global address, whatever is passed.
        return download_from(uri, client_of(uri).get_model_version_download_uri(name, version), into)


def download_from(uri: str, place: str, into: Path) -> Path:
    """The folder at a place of MLflow's artifacts, downloaded."""
    with tracking.answering(uri):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=place, dst_path=str(into), tracking_uri=uri))


def is_aliased(uri: str, run_key: str, run_id: str, registered: tuple[str, str] | None) -> bool:
    """Whether any version of a run, under any name, has an alias. `registered`: the version (name, number) known to be.

    Raises ServiceError where the registry doesn't answer, and CheckpointError where it doesn't know the model.
    """
    check_database(uri)
    versions = set() if registered is None else {registered}
    with tracking.answering(uri):
        client = client_of(uri)
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


def check_database(uri: str) -> None:
    """Raise ServiceError where an address is of a file that isn't there: MLflow would make an empty one."""
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).exists():
        raise ServiceError(f"MLflow's database must be at {database}, but is not. Set MLFLOW_TRACKING_URI to yours.")


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


def version_of(uri: str, model: str, what: str = "`model.weights`") -> Any:
    """MLflow's record of models:/NAME@ALIAS or models:/NAME/VERSION. Raises ConfigError, about `what`, where there is
    none."""
    name, separator, which = model.removeprefix("models:/").partition("@" if "@" in model else "/")
    if not name or not separator or not which:
        raise ConfigError(f"{what} must be like models:/NAME@ALIAS or models:/NAME/VERSION, but is {model}.")
    if separator == "@" and _RESERVED_ALIAS.fullmatch(which):
        raise ConfigError(
            f"{what} must not name an alias that MLflow reserves, latest or v and a number, but is {model}."
            f" Write models:/{name}/NUMBER for a version, models:/{name}@champion for the promoted one."
        )
    tracking.configure_client()

    def ask() -> Any:
        with tracking.answering(uri):
            client = client_of(uri)
            try:
                if separator == "@":
                    return client.get_model_version_by_alias(name, which)
                return client.get_model_version(name, which)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise ConfigError(
                        f"{what} must be in the registry at {uri}, but {model} is not. See `swa-dist history {name}`."
                    ) from None
                raise

    return tracking.patiently(ask)


def client_of(uri: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
