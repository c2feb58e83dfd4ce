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
from swa_dist.errors import ConfigError, DataError
from swa_dist.service.progress import Display
from swa_dist.storage.folder import absolute, join

SCAN = "scan"
_LOOKED_AT = 20  # images of a named index whose files are looked for


@dataclass(frozen=True)
class Identity:
    run_key: str
    weights_sha256: str
    data_digest: str


def absolute_addresses(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, since workers run elsewhere."""
    fields = {name: absolute(value) for name, value in _addresses(recipe).items()}
    uri = recipe.tracking.uri
    if uri == "auto" and os.environ.get("MLFLOW_TRACKING_URI"):
        uri = os.environ["MLFLOW_TRACKING_URI"]
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return config.replace(recipe, **fields | {"tracking.uri": uri})


def index_url(recipe: Recipe, split: str) -> str:
    return join(recipe.data.index, f"{split}.parquet")


def indices(recipe: Recipe, display: Display) -> tuple[Index, Index]:
    """The images of the training and the validation split: as the index that the recipe names has them, or as they are
    read here and now. Raises DataError where they are not whole."""
    if recipe.data.index == SCAN:
        train, val = scan(recipe, display)
    else:
        train, val = named(recipe)
        for split, found in (("train", train), ("val", val)):
            _check_there(split, found, recipe)
    index.check_pair(train, val, recipe.model.num_classes)
    return train, val


def scan(recipe: Recipe, display: Display) -> tuple[Index, Index]:
    """Read the headers of all images of a recipe."""
    roots = {"train": recipe.data.train, "val": recipe.data.val}
    train, val = (
        index.scan(Path(root), split, functools.partial(display.progress, f"index {split}"))
        for split, root in roots.items()
    )
    return train, val


def write_indices(recipe: Recipe, display: Display) -> str:
    """Read all images of a recipe and write the indices that it names. Returns the digest of the data."""
    if recipe.data.index == SCAN:
        raise ConfigError(
            "`data.index` must be a folder to write the indices into, but is scan. Set it: --set data.index=FOLDER."
        )
    train, val = scan(recipe, display)
    index.check_pair(train, val, recipe.model.num_classes)
    for split, found in (("train", train), ("val", val)):
        index.save(found, index_url(recipe, split))
    return index.data_digest(train, val)


def named(recipe: Recipe) -> tuple[Index, Index]:
    """The indices that the recipe names. Raises ConfigError where it names none, DataError where they can't be read."""
    if recipe.data.index == SCAN:
        raise ConfigError(
            "`data.index` must be the folder of an index where the images themselves are elsewhere, but is scan. Write"
            " one where they are, with `swa-dist data index --recipe RECIPE --set data.index=FOLDER`, and set it."
        )
    train, val = (
        index.load(index_url(recipe, split), Path(root))
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
    if recipe.data.index != SCAN:
        found["data.index"] = recipe.data.index
    if recipe.checkpoint.extend_from != "nothing":
        found["checkpoint.extend_from"] = recipe.checkpoint.extend_from
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
    """Raise DataError unless some images of a named index, from its first to its last, are where it says."""
    step = max(1, len(found) // _LOOKED_AT)
    for path in found.paths[::step]:
        if not (found.root / path).is_file():
            raise DataError(
                f"`data.index` must be of the images in `data.{split}`, but {index_url(recipe, split)} names"
                f" {found.root / path}, which is not there. Refresh it with `swa-dist data index --recipe RECIPE`."
            )
