"""The learning rate as a pure function of the sample position: how many images of the run came before a step.

Positions, not steps, so that a short last batch, a restart and another number of workers change nothing. A boundary
inside a batch belongs to the step that crosses it.
"""

from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    def rate(self, start: int, stop: int) -> float:
        """The learning rate of the step over the images [start, stop) of the run."""


@dataclass(frozen=True)
class Cyclical:
    """Linear from `max_lr` down to `min_lr` in each cycle, then a jump back.

    Izmailov et al. 2018, section 3.2: alpha(i) = (1 - t) alpha_1 + t alpha_2 with t = (mod(i - 1, c) + 1) / c, where
    the share of a cycle's steps is here the share of its images. The last step of a cycle has exactly `min_lr`.
    """

    max_lr: float
    min_lr: float
    cycle_images: int

    def rate(self, start: int, stop: int) -> float:
        done = min(stop - start // self.cycle_images * self.cycle_images, self.cycle_images)
        if done == self.cycle_images:
            return self.min_lr
        t = done / self.cycle_images
        return (1 - t) * self.max_lr + t * self.min_lr


@dataclass(frozen=True)
class Constant:
    """One rate throughout."""

    lr: float

    def rate(self, start: int, stop: int) -> float:
        return self.lr


@dataclass(frozen=True)
class WarmUp:
    """Another schedule, scaled up linearly from zero over the first `warmup_images`."""

    schedule: Schedule
    warmup_images: float

    def rate(self, start: int, stop: int) -> float:
        rate = self.schedule.rate(start, stop)
        return rate if stop >= self.warmup_images else rate * (stop / self.warmup_images)


def crosses(start: int, stop: int, period: int) -> bool:
    """Whether the step over the images [start, stop) reaches or passes a multiple of `period`."""
    return stop // period > start // period
