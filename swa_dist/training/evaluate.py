"""A model on the validation images: an outcome for each image, and metrics of them all."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error

from swa_dist.config import Recipe
from swa_dist.data.order import Group
from swa_dist.training.batchnorm import modes_restored
from swa_dist.training.world import World

_ECE_BINS = 15
_COLUMNS = 4


@dataclass(frozen=True)
class Outcomes:
    """What a model made of each image that can be decoded, sorted by the image's place in the index."""

    ids: npt.NDArray[np.int64]
    top1: npt.NDArray[np.bool_]
    """Whether the likeliest class is right."""
    top5: npt.NDArray[np.bool_]
    """Whether the right class is among the five likeliest."""
    nll: npt.NDArray[np.float64]
    """Negative log-likelihood of the right class, nats."""
    confidence: npt.NDArray[np.float64]
    """Probability of the likeliest class."""

    def metrics(self) -> dict[str, float]:
        """top1, top5 and ece in percent, nll in nats per image."""
        ece = binary_calibration_error(
            torch.from_numpy(self.confidence), torch.from_numpy(self.top1).long(), n_bins=_ECE_BINS, norm="l1"
        )
        return {
            "top1": 100 * float(self.top1.mean()),
            "top5": 100 * float(self.top5.mean()),
            "nll": float(self.nll.mean()),
            "ece": 100 * float(ece),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"outcomes/{name}": torch.from_numpy(getattr(self, name))
            for name in ("ids", "top1", "top5", "nll", "confidence")
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Outcomes":
        names = ("ids", "top1", "top5", "nll", "confidence")
        return cls(**{name: tensors[f"outcomes/{name}"].numpy() for name in names})


@torch.no_grad()
def evaluate(
    model: nn.Module,
    groups: Iterable[Group],
    num_images: int,
    recipe: Recipe,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcomes:
    """Run `model` in evaluation mode over this worker's `groups`; every worker gets the outcomes of all.

    `num_images`: over all workers, whose ids are 0 to num_images - 1. `progress` is told images done and wanted, over
    all workers. Collective. The model's mode is restored.
    """
    rows = torch.zeros(num_images, _COLUMNS, dtype=torch.float64, device=world.device)
    seen = torch.zeros(num_images, dtype=torch.int64, device=world.device)
    with modes_restored(model):
        model.eval()
        done = 0
        left_out = 0
        for group in groups:
            left_out += len(group.left_out)
            if not len(group.ids):
                continue
            with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = model(group.images).float()
            likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            right = likeliest == group.labels[:, None]
            ids = torch.from_numpy(group.ids).to(world.device)
            rows[ids] = torch.stack(
                [
                    right[:, 0].double(),
                    right.any(1).double(),
                    F.cross_entropy(logits, group.labels, reduction="none").double(),
                    logits.softmax(1).amax(1).double(),
                ],
                dim=1,
            )
            seen[ids] += 1
            done += len(ids)
            progress(min(done * world.size, num_images), num_images)
    # Each image is on one worker, so the sum over workers is a gather.
    world.sum_(rows)
    world.sum_(seen)
    missing = world.sum_(torch.tensor(left_out, dtype=torch.int64, device=world.device))
    if (seen > 1).any() or int((seen == 0).sum()) != int(missing):
        raise AssertionError("each validation image must be seen exactly once")
    ids = torch.nonzero(seen).flatten()
    top1, top5, nll, confidence = rows[ids].cpu().numpy().T
    return Outcomes(
        ids=ids.cpu().numpy(),
        top1=top1 > 0,
        top5=top5 > 0,
        nll=nll.copy(),
        confidence=confidence.copy(),
    )
