"""What is looked at before anything is spent on a run: the images, the recipe it extends, the submission it is of."""

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data.index import Index
from swa_dist.data.order import check_groups
from swa_dist.errors import ConfigError, DataError, OutputError
from swa_dist.service.layout import RECIPE, SUMMARY
from swa_dist.storage import folder as storage
from swa_dist.storage.folder import open_folder
from swa_dist.training.recalibrate import most_images


def check_writable(url: str) -> None:
    """Raises OutputError, or ServiceError."""
    try:
        storage.check_writable(url)
    except OutputError as error:
        raise OutputError(f"`output.dir` must be a folder that can be written: {error}") from None


def check_submission(submission: str, key: str) -> int:
    """The least number that this attempt may have: that of the submission it is. Raises ConfigError where the run is
    another than the one that was submitted."""
    parsed = config.parse_attempt_name(submission)
    if parsed is None:
        return 1
    if parsed[0] != key[:12]:
        raise ConfigError(
            f"the submitted run must be the one with key {parsed[0]}, but is {key[:12]} here: its images' index or its"
            " weights have changed since it was submitted, or the submitter has another version of swa_dist. Submit it"
            " again, with the version that the cluster has."
        )
    return parsed[1]


def check_images(recipe: Recipe, train: Index, val: Index) -> None:
    """Raises DataError or ConfigError where the recipe doesn't fit its images."""
    if recipe.data.kind == "imagenet":
        _check_imagenet(train, val)
    _check_cycles(recipe, train)
    check_groups(len(train) % recipe.data.global_batch, recipe.data.group_images)
    check_groups(most_images(recipe.recalibrate, len(train)), recipe.data.group_images)


def _check_imagenet(train: Index, val: Index) -> None:
    for split, found, images in (("train", train, 1_281_167), ("val", val, 50_000)):
        if (len(found), len(found.classes)) != (images, 1000):
            raise DataError(
                f"`data.{split}` must be ILSVRC 2012's {images:,} images of 1,000 classes, as `data.kind` says, but"
                f" has {len(found):,} of {len(found.classes):,}. Complete it, or set `data.kind=other`."
            )


def _check_cycles(recipe: Recipe, train: Index) -> None:
    images = min(recipe.averaging_epochs, recipe.cycle_epochs) * len(train)
    if images < recipe.data.global_batch:
        raise ConfigError(
            "a cycle, and the distance between averaging points, must be at least a global batch"
            f" ({recipe.data.global_batch} images), but is {float(images):.0f} of {len(train):,} training images."
            " Lengthen `schedule.cycle_epochs`, or lower `average.points`."
        )


def check_extension(recipe: Recipe, weights_sha256: str, data_digest: str) -> None:
    """Raise ConfigError unless `extend_from` is a finished run of this recipe with fewer epochs."""
    folder = open_folder(recipe.checkpoint.extend_from)
    summary = folder.read_json(SUMMARY)
    if summary is None:
        raise ConfigError(
            f"`checkpoint.extend_from` must be the folder of a finished run, but {folder.url} has no summary."
        )
    folder.pull(RECIPE)
    theirs = config.load(folder.local / RECIPE)
    after = tuple(n for n in recipe.average.also_after_epochs if n < theirs.optim.epochs)
    shorter = {"optim.epochs": theirs.optim.epochs, "average.also_after_epochs": after}
    if theirs.optim.epochs < recipe.optim.epochs:
        wanted = config.replace(recipe, **shorter)
        if config.run_key(wanted, weights_sha256, data_digest) == summary["run_key"]:
            return
    mine, other = (config.flatten(config.to_tree(r)) for r in (recipe, theirs))
    differing = [name for name in mine if config.in_key(name) and name not in shorter and mine[name] != other.get(name)]
    what = f"`{differing[0]}` differs" if differing else "its length, weights or data are others"
    raise ConfigError(
        f"`checkpoint.extend_from` must be a shorter run of the same recipe, weights and data, but for {folder.url}"
        f" {what}."
    )
