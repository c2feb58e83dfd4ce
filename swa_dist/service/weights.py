"""Starting weights of any kind of address, as a verified file on this machine."""

import hashlib
import http.client
import os
import re
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import platformdirs
import rich.progress
import torchvision.models

from swa_dist.config import Model, Recipe
from swa_dist.errors import CheckpointError, ConfigError, ServiceError
from swa_dist.service import versions
from swa_dist.service.identity import is_registered, is_torchvision_name
from swa_dist.storage.files import sha256_file, write_atomic, writing

_TIMEOUT_SECONDS = 60
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


@dataclass(frozen=True)
class LocalWeights:
    path: Path
    sha256: str


def digest_of(recipe: Recipe) -> str:
    """SHA-256 of the starting weights: as the registry states it, or else of the fetched file."""
    if is_registered(recipe.model.weights):
        stated = versions.stated_sha256(recipe.tracking.uri, recipe.model.weights)
        if stated is not None:
            return stated
    return fetch(recipe.model, recipe.tracking.uri).sha256


def fetch(model: Model, registry_uri: str) -> LocalWeights:
    """The file of `model.weights`, downloaded at first use and from the cache after that. `registry_uri`: MLflow's, for
    weights in its registry.

    Raises CheckpointError where its SHA-256 is not the one expected, ConfigError for an address that names nothing, and
    ServiceError where a download fails.
    """
    expected = {"`model.weights_sha256`": model.weights_sha256} if model.weights_sha256 != "auto" else {}
    url = _url(model)
    if is_registered(model.weights):
        version = versions.pinned(registry_uri, model.weights)  # an alias may be moved between two questions
        path = versions.download(registry_uri, version, _cache())
        stated = versions.stated_sha256(registry_uri, version)
        expected |= {"the one in the version's tag": stated} if stated is not None else {}
    elif url:
        path = _download(url)
    else:
        path = Path(model.weights).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(
            f"`model.weights` must be a torchvision weights name, a file, an https:// address or a models:/ one, but"
            f" {model.weights!r} is none: there is no file {path}."
        )
    digest = sha256_file(path)
    if url:
        expected |= _known(path)
    for what, value in expected.items():
        if not digest.startswith(value):
            raise CheckpointError(
                f"SHA-256 of {path} must be {what}, {value}, but is {digest}. Remove the file to fetch it again."
            )
    if url:
        write_atomic(_record(path), f"{digest}\n")
    return LocalWeights(path, digest)


def published_top1(recipe: Recipe) -> float | None:
    """Top-1 in percent that torchvision states for the recipe's weights on ImageNet, where both are of it."""
    if recipe.evaluate.published_top1 != "auto" or recipe.data.kind != "imagenet" or _url(recipe.model) is None:
        return None
    known = torchvision.models.get_model_weights(recipe.model.arch)
    if recipe.model.weights not in known.__members__:
        return None
    return float(known[recipe.model.weights].meta["_metrics"]["ImageNet-1K"]["acc@1"])


def _known(path: Path) -> dict[str, str]:
    """What a cached file's SHA-256 must be, or begin with: by torchvision's name of it, and by what it was before."""
    known = {}
    if _record(path).is_file():
        known["the one at first use"] = _record(path).read_text(encoding="utf-8").strip()
    if prefix := _HASH_IN_NAME.search(path.name):
        known["the one in its name"] = prefix[1]
    return known


def _url(model: Model) -> str | None:
    """Where to download the weights from, or None for a file."""
    if urlparse(model.weights).scheme == "https":
        return model.weights
    if not is_torchvision_name(model.weights):
        return None
    try:
        known = torchvision.models.get_model_weights(model.arch)
    except ValueError:
        raise ConfigError(f"`model.arch` must be a torchvision classifier, but is {model.arch!r}.") from None
    if model.weights not in known.__members__:
        raise ConfigError(
            f"`model.weights` must be one of {model.arch}'s ({', '.join(known.__members__)}), but is {model.weights}."
        )
    url: str = known[model.weights].url
    return url


def _download(url: str) -> Path:
    name = Path(urlparse(url).path).name
    if not name:
        raise ConfigError(f"`model.weights` must be the address of a file, but is {url}.")
    cache = _cache()
    # Other people's files of the same name are other files; torchvision's names hold their hash.
    path = cache / (name if _HASH_IN_NAME.search(name) else f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}")
    if path.is_file():
        return path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            expected = int(answer.headers.get("Content-Length", 0))
            with rich.progress.wrap_file(answer, expected, description=name) as shown, staged.open("wb") as file:
                shutil.copyfileobj(shown, file)
        if expected and staged.stat().st_size != expected:
            raise OSError(f"it ended after {staged.stat().st_size:,} of {expected:,} bytes")
        if (prefix := _HASH_IN_NAME.search(name)) and not sha256_file(staged).startswith(prefix[1]):
            raise CheckpointError(f"{url} must have the SHA-256 that its name begins, {prefix[1]}, but has another.")
        staged.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise ServiceError(
            f"{url} must be reachable, but is not: {error}. Put the file at {path}, or set `model.weights` to one."
        ) from None
    finally:
        staged.unlink(missing_ok=True)
    return path


def _cache() -> Path:
    return platformdirs.user_cache_path("swa_dist") / "weights"


def _record(path: Path) -> Path:
    """Where the SHA-256 of a downloaded file is kept."""
    return path.with_name(path.name + ".sha256")
