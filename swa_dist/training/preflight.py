"""Are the starting weights what they are said to be, on this data? Asked before anything is spent."""

import math
from dataclasses import dataclass

from swa_dist.config import Recipe
from swa_dist.errors import DataError

_DEVIATIONS = 4.0  # of the sampling error of top-1
_DECODING = 0.5  # points that another decoder or resizer of images may cost


@dataclass(frozen=True)
class Preflight:
    sentence: str
    """For the log; empty where there is nothing to say."""
    problem: DataError | None = None


def check(top1: float, num_images: int, recipe: Recipe) -> Preflight:
    """Compare the measured top-1 of the untouched weights with the published one, both in percent.

    A problem is more than 0.5 points, and the sampling error of so many images, below it.
    """
    published = recipe.evaluate.published_top1
    if recipe.model.head == "replace":
        return Preflight("the starting weights were not held against a published top-1: their head is a new one.")
    if isinstance(published, str):
        return Preflight("")
    share = published / 100
    error = 100 * math.sqrt(share * (1 - share) / num_images)
    if top1 >= published - _DECODING - _DEVIATIONS * error:
        return Preflight("")
    chance = 100 / recipe.model.num_classes
    if top1 < chance + 0.1 * (published - chance):
        cause = "it is near chance: most likely the classes are in another order than the weights' head has them"
    elif top1 < 0.8 * published:
        cause = "some classes or the transforms may be wrong: see the class folders and `data.image_size`"
    else:
        cause = "look at `data.resize_size` and `data.image_size`, or the weights may be another version"
    sentence = (
        f"the starting weights must have top-1 near {published:.2f} %, as published, but have {top1:.2f} % on"
        f" {num_images:,} images; {cause}. To go on all the same: `evaluate.preflight=warn`."
    )
    return Preflight(sentence, DataError(sentence))
