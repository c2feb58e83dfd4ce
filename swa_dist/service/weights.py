"""Starting weights of any kind of address, as a verified file on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import platformdirs
import torch
import torchvision.models

from swa_dist.config import Model
from swa_dist.errors import CheckpointError, ConfigError, ServiceError
from swa_dist.storage import sha256_file, write_atomic, writing

_NAME = re.compile(r"[A-Z0-9_]+")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


@dataclass(frozen=True)
class LocalWeights:
    path: Path
    sha256: str


def fetch(model: Model) -> LocalWeights:
    """The file of `model.weights`, downloaded at first use and from the cache after that.

    Raises CheckpointError where its SHA-256 is not the one expected, ConfigError for an address that names nothing, and
    ServiceError where a download fails.
    """
    url = _url(model)
    path = _download(url) if url else Path(model.weights).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(
            f"`model.weights` must be a torchvision weights name, a file or an https:// address, but"
            f" {model.weights!r} is none: there is no file {path}."
        )
    digest = sha256_file(path)
    expected = {"`model.weights_sha256`": model.weights_sha256} if model.weights_sha256 != "auto" else {}
    recorded = _record(path)
    if url and recorded.is_file():
        expected["the one at first use"] = recorded.read_text(encoding="utf-8").strip()
    for what, value in expected.items():
        if digest != value:
            raise CheckpointError(
                f"SHA-256 of {path} must be {what}, {value}, but is {digest}. Remove the file to fetch it again."
            )
    return LocalWeights(path, digest)


def _url(model: Model) -> str | None:
    """Where to download the weights from, or None for a file."""
    if urlparse(model.weights).scheme == "https":
        return model.weights
    if not _NAME.fullmatch(model.weights):
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
    path: Path = platformdirs.user_cache_path("swa_dist") / "weights" / name
    if path.is_file():
        return path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    prefix = _HASH_IN_NAME.search(name)
    try:
        # Writes aside, checks the start of the SHA-256 that torchvision puts in the name, and renames.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix[1] if prefix else None)
    except RuntimeError as error:
        raise CheckpointError(f"{url} must have the SHA-256 that its name begins, but: {error}.") from None
    except (URLError, OSError) as error:
        raise ServiceError(
            f"{url} must be reachable, but is not: {error}. Put the file at {path}, or set `model.weights` to one."
        ) from None
    write_atomic(_record(path), sha256_file(path) + "\n")
    return path


def _record(path: Path) -> Path:
    """Where the SHA-256 of a downloaded file is kept."""
    return path.with_name(path.name + ".sha256")
