"""What a version showed in its own run, as files among its model's: each image's outcome, the verdict, the recipe."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data.index import Index
from swa_dist.data.order import Ints
from swa_dist.errors import CheckpointError, SwaDistError
from swa_dist.evidence.verdict import Verdict
from swa_dist.training.evaluate import Outcomes

EVIDENCE, OUTCOMES, RECIPE = "evidence.json", "outcomes.safetensors", "recipe.yaml"
_LABELS = "labels"


@dataclass(frozen=True)
class Scored:
    """A version's evidence."""

    recipe: Recipe
    outcomes: Outcomes
    labels: Ints
    """int64 [images]: the classes of the images that `outcomes` are of."""
    classes: tuple[str, ...]
    """Names in the order of the labels, as the data's folders are called."""
    val_digest: str
    """Of the validation images."""
    verdict: Verdict
    is_control: bool
    """Whether it is plain fine-tuning itself."""

    def files(self) -> dict[str, bytes]:
        facts = {
            "schema": 1,
            "classes": self.classes,
            "val_digest": self.val_digest,
            "verdict": asdict(self.verdict),
            "is_control": self.is_control,
        }
        tensors = self.outcomes.tensors() | {_LABELS: torch.from_numpy(self.labels)}
        return {
            EVIDENCE: json.dumps(facts, indent=1).encode(),
            OUTCOMES: safetensors.torch.save(tensors),
            RECIPE: config.to_yaml(self.recipe).encode(),
        }


def scored(recipe: Recipe, outcomes: Outcomes, val: Index, summary: Mapping[str, Any]) -> Scored:
    """Of the candidate of a finished run. `val`: the images that `outcomes` are of."""
    return Scored(
        recipe=recipe,
        outcomes=outcomes,
        labels=val.labels[outcomes.ids],
        classes=val.classes,
        val_digest=val.digest,
        verdict=Verdict(**summary["verdict"]),
        is_control=summary["candidate"] == summary["control"],
    )


def read(folder: Path, what: str) -> Scored:
    """From the files of the model `what`. Raises CheckpointError where they are not there or can't be read."""
    try:
        facts = json.loads((folder / EVIDENCE).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / OUTCOMES)
        return Scored(
            recipe=config.load(folder / RECIPE),
            outcomes=Outcomes.of(tensors),
            labels=tensors[_LABELS].numpy(),
            classes=tuple(facts["classes"]),
            val_digest=facts["val_digest"],
            verdict=Verdict(**facts["verdict"]),
            is_control=facts["is_control"],
        )
    except (OSError, ValueError, KeyError, TypeError, SwaDistError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{what} must hold the evidence of its run ({EVIDENCE}, {OUTCOMES}, {RECIPE}), but does not: {error}."
            " Another version of swa_dist wrote it, or another program."
        ) from None
