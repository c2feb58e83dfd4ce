"""Which run a recipe is: its addresses made absolute, the digests of its images and its weights, and so its key."""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data import index
from swa_dist.data.index import Index
from swa_dist.data.reading import Reader
from swa_dist.data.scan import scan
from swa_dist.errors import ConfigError, DataError
from swa_dist.service.progress import Display
from swa_dist.storage.folder import absolute, join

SCAN = "scan"
_SQLITE = "sqlite:///"
AUTO = "auto"
_LOOKED_AT = 20  # images of a named index that are read


@dataclass(frozen=True)
class Identity:
    run_key: str
    weights_sha256: str
    data_digest: str


def absolute_addresses(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, since workers run elsewhere."""
    fields = {name: absolute(value) for name, value in _addresses(recipe).items()}
    return config.replace(recipe, **fields | {"tracking.uri": tracking_uri(recipe.tracking.uri)})


def tracking_uri(uri: str) -> str:
    """MLflow's address; `auto` as the environment has it, if it does."""
    if uri == AUTO:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or AUTO
    if uri.startswith(_SQLITE):
        uri = f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).resolve()}"
    return uri


def tracking_uri_here(uri: str) -> str:
    """The same; where the environment doesn't say, a database in the folder of the command."""
    found = tracking_uri(uri)
    return f"{_SQLITE}{Path('mlflow.db').resolve()}" if found == AUTO else found


def index_url(recipe: Recipe, split: str) -> str:
    return join(recipe.data.index, f"{split}.parquet")


def indices(recipe: Recipe, display: Display) -> tuple[Index, Index]:
    """The images of the training and the validation split: as the index that the recipe names has them, or as they are
    read here and now. Raises DataError where they are not whole."""
    if recipe.data.index == SCAN:
        train, val = _scanned(recipe, display)
    else:
        train, val = named(recipe)
        for split, found in (("train", train), ("val", val)):
            _check_there(split, found, recipe)
    index.check_pair(train, val, recipe.model.num_classes)
    return train, val


def val_index(recipe: Recipe, display: Display) -> Index:
    """The validation images alone."""
    if recipe.data.index != SCAN:
        return index.load(index_url(recipe, "val"), recipe.data.val)
    progress = functools.partial(display.progress, "index val")
    return scan(recipe.data.val, "data.val", progress, labels=recipe.data.val_labels)


def _scanned(recipe: Recipe, display: Display) -> tuple[Index, Index]:
    """Read the headers of all images of a recipe."""
    train = scan(recipe.data.train, "data.train", functools.partial(display.progress, "index train"))
    return train, val_index(recipe, display)


def named(recipe: Recipe) -> tuple[Index, Index]:
    """The indices that the recipe names. Raises ConfigError where it names none, DataError where they can't be read."""
    if recipe.data.index == SCAN:
        raise ConfigError(
            "`data.index` must be the folder of an index where the images themselves are elsewhere, but is scan. Write"
            " one where they are, with `swa-dist data index --recipe RECIPE --set data.index=FOLDER`, and set it."
        )
    train, val = (
        index.load(index_url(recipe, split), root)
        for split, root in (("train", recipe.data.train), ("val", recipe.data.val))
    )
    return train, val


def identify(recipe: Recipe) -> Identity:
    """The run that a recipe is, told from afar: by the index that it names, without a look at the images."""
    train, val = named(recipe)
    index.check_pair(train, val, recipe.model.num_classes)
    if recipe.model.weights_sha256 != "auto":
        weights_sha256 = recipe.model.weights_sha256
    else:
        from swa_dist.service import weights  # with torch and MLflow, which a small submitter need not wait for

        weights_sha256 = weights.digest_of(recipe)
    data_digest = index.data_digest(train, val)
    return Identity(config.run_key(recipe, weights_sha256, data_digest), weights_sha256, data_digest)


def _addresses(recipe: Recipe) -> dict[str, str]:
    found: dict[str, Any] = {
        "data.train": recipe.data.train,
        "data.val": recipe.data.val,
        "output.dir": recipe.output.dir,
    }
    if recipe.data.val_labels != AUTO:
        found["data.val_labels"] = recipe.data.val_labels
    if recipe.data.cache_dir != AUTO:
        found["data.cache_dir"] = recipe.data.cache_dir
    if recipe.data.index != SCAN:
        found["data.index"] = recipe.data.index
    if recipe.checkpoint.extend_from != "nothing":
        found["checkpoint.extend_from"] = recipe.checkpoint.extend_from
    if recipe.registry.lock_url != AUTO:
        found["registry.lock_url"] = recipe.registry.lock_url
    if not elsewhere(recipe.model.weights):
        found["model.weights"] = recipe.model.weights
    return found


def elsewhere(weights: str) -> bool:
    """Whether the weights are a torchvision name or an address, and no path."""
    return ":" in weights or is_torchvision_name(weights)


def is_torchvision_name(weights: str) -> bool:
    """Whether the weights are named as torchvision names its own, IMAGENET1K_V1."""
    return bool(re.fullmatch(r"[A-Z0-9_]+", weights))


def is_registered(weights: str) -> bool:
    """Whether the weights are those of a version in the model registry, models:/NAME@champion or models:/NAME/3."""
    return weights.startswith("models:/")


def _check_there(split: str, found: Index, recipe: Recipe) -> None:
    """Raise DataError unless some images of a named index, from its first to its last, are where and what it says."""
    reader = Reader(found, None)
    for i in range(0, len(found), max(1, len(found) // _LOOKED_AT)):
        try:
            reader.read(i)
        except DataError as error:
            raise DataError(
                f"`data.index` must be of the images in `data.{split}`, but {index_url(recipe, split)} is not: {error}"
            ) from None
