"""What `swa-dist data` does: index, verify, shard; for the images of a recipe, or for those at one place."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from swa_dist.config import Recipe
from swa_dist.data import index, sharding
from swa_dist.data.index import Index
from swa_dist.data.scan import scan
from swa_dist.data.sizes import cores_here
from swa_dist.errors import ConfigError
from swa_dist.service import identity
from swa_dist.service.progress import Display
from swa_dist.storage import folder


@dataclass(frozen=True)
class Images:
    """Images at one place."""

    named: str
    """What people call them: data.train, or SRC."""
    root: str
    labels: str | None
    index: str | None
    """Where their index is, or is to be."""


def of_recipe(recipe: Recipe) -> list[Images]:
    """The training and the validation images. Raises ConfigError where the recipe names no place for their indices."""
    if recipe.data.index == identity.SCAN:
        raise ConfigError(
            "`data.index` must be a folder to write the indices into, but is scan. Set it: --set data.index=FOLDER."
        )
    data = recipe.data
    return [
        Images("data.train", data.train, None, identity.index_url(recipe, "train")),
        Images("data.val", data.val, data.val_labels, identity.index_url(recipe, "val")),
    ]


def write_indices(recipe: Recipe, display: Display, *, quarantine: bool = False) -> tuple[Index, Index]:
    """Index a recipe's images where it says. Nothing is written unless both splits have the same classes."""
    both = of_recipe(recipe)
    train, val = (read(images, display, quarantine=quarantine) for images in both)
    index.check_pair(train, val, recipe.model.num_classes)
    for images, found in zip(both, (train, val), strict=True):
        assert images.index is not None
        index.save(found, images.index)
    return train, val


def write_index(images: Images, display: Display, *, quarantine: bool = False) -> Index:
    found = read(images, display, quarantine=quarantine)
    if images.index is not None:
        index.save(found, images.index)
    return found


def read(images: Images, display: Display, *, quarantine: bool = False, left_out: bool = True) -> Index:
    """The index of the images as they are. What `verify` noted in an index that is there is kept of the images that
    have not changed; with `left_out`, also which it left out."""
    progress = functools.partial(display.progress, f"index {images.named}")
    found = scan(images.root, images.named, progress, labels=images.labels, quarantine=quarantine)
    if images.index is None or folder.read(images.index) is None:
        return found
    return index.carried(found, index.load(images.index, images.root), left_out=left_out)


@dataclass(frozen=True)
class Checked:
    images: Images
    num_images: int
    bad: dict[str, str]
    unusual: dict[str, int]

    def facts(self) -> dict[str, object]:
        return {
            "images": self.images.root,
            "num_images": self.num_images,
            "bad": self.bad,
            "unusual": self.unusual,
            "left_out_of": self.images.index,
        }

    def __str__(self) -> str:
        unusual = "".join(f", {number:,} {mode}" for mode, number in sorted(self.unusual.items()))
        lines = [f"{self.images.root}: {self.num_images:,} images, {len(self.bad):,} bad{unusual}"]
        lines += [f"  {name}: {why}" for name, why in self.bad.items()]
        if self.bad:
            lines.append(f"  left out of {self.images.index}" if self.images.index else "  --out INDEX leaves them out")
        return "\n".join(lines)


def check(places: Sequence[Images], display: Display) -> list[Checked]:
    """Decode all images, also those that were left out before, and leave the bad ones out of their index, if they have
    a place for one."""
    from swa_dist.data.verify import verify  # with DALI

    checked = []
    for images in places:
        found = read(images, display, quarantine=True, left_out=False)
        refused = dict(index.left_out(found))
        verified = verify(found, cores_here(), functools.partial(display.progress, f"verify {images.named}"))
        if images.index is not None:
            index.save(verified.index, images.index)
        checked.append(Checked(images, len(found.rows), refused | verified.bad, verified.unusual))
    return checked


def shard(images: Images, target: str, images_per_shard: int, display: Display) -> Index:
    """Write images as tar shards."""
    progress = functools.partial(display.progress, "shard")
    return sharding.write(write_index(images, display), target, images_per_shard, progress)
