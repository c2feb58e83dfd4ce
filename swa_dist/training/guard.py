"""Whether a step may be taken: not where its loss or gradient is not finite, nor where the gradient is a spike."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from swa_dist import config

_REMEMBERED = 64
_LEAST = 8
"""Steps before which nothing is called a spike."""


@torch.no_grad()
def length_of(loss: Tensor, gradients: Iterable[Tensor]) -> Tensor:
    """Length of the gradient that this worker would step with, float64 []; infinity where it or the loss of this
    worker's share is not finite: a maximum over workers with NaN would be whatever the backend makes of it."""
    norm = torch.nn.utils.get_total_norm(list(gradients)).double().to(loss.device)
    return torch.where(torch.isfinite(loss) & torch.isfinite(norm), norm, math.inf)


class Guard:
    """The lengths of the last gradients, and the steps that were skipped.

    Part of a run's state: a resumed run decides as an undisturbed one would.
    """

    def __init__(self, plan: config.Guard) -> None:
        self._plan = plan
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self.skipped: list[int] = []
        """Positions at which the skipped steps began."""
        self.in_a_row = 0

    def refuses(self, start: int, length: float) -> str | None:
        """Why the step that begins at position `start` must not be taken; None where it may be.

        `length`: the largest `length_of` over all workers.
        """
        why = self._judge(length)
        if why is None:
            self._norms.append(length)
            self.in_a_row = 0
        else:
            self.skipped.append(start)
            self.in_a_row += 1
        return why

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that going on makes no sense."""
        return self.in_a_row >= self._plan.max_skips_in_a_row

    def facts(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "skipped": list(self.skipped), "in_a_row": self.in_a_row}

    def restore(self, facts: dict[str, Any]) -> None:
        self._norms.extend(facts["norms"])
        self.skipped = list(facts["skipped"])
        self.in_a_row = facts["in_a_row"]

    def _judge(self, length: float) -> str | None:
        if not math.isfinite(length):
            return "the loss or the gradient is not finite"
        if self._plan.spike_factor == "off" or len(self._norms) < _LEAST:
            return None
        usual = statistics.median(self._norms)
        if usual and length > self._plan.spike_factor * usual:
            return f"the gradient is {length / usual:.3g} times as long as usual"
        return None
