"""The learning rate as a pure function of the sample position: how many images of the run came before a step.

Positions, not steps, so that a short last batch, a restart and another number of workers change nothing. A boundary
inside a batch belongs to the step that crosses it. Boundaries are fractions, compared exactly.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import cos, pi
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
    cycle_images: Fraction

    def rate(self, start: int, stop: int) -> float:
        done = stop - start // self.cycle_images * self.cycle_images
        if done >= self.cycle_images:
            return self.min_lr
        t = float(done / self.cycle_images)
        return (1 - t) * self.max_lr + t * self.min_lr


@dataclass(frozen=True)
class Constant:
    """One rate, after a ramp from `start_lr`.

    The ramp is that of the authors' code (timgaripov/swa, train.py): `start_lr` for its first half, then linear, and
    `lr` from nine tenths of it on.
    """

    lr: float
    start_lr: float = 0.0
    ramp_images: Fraction = Fraction(0)

    def rate(self, start: int, stop: int) -> float:
        t = float(stop / self.ramp_images) if self.ramp_images else 1.0
        if t <= 0.5:
            return self.start_lr
        if t >= 0.9:
            return self.lr
        share = (t - 0.5) / 0.4
        return (1 - share) * self.start_lr + share * self.lr


@dataclass(frozen=True)
class Linear:
    """Linear from `max_lr` to a floor at the run's end, exactly: a control."""

    max_lr: float
    min_lr: float
    run_images: int

    def rate(self, start: int, stop: int) -> float:
        if stop >= self.run_images:
            return self.min_lr
        t = stop / self.run_images
        return (1 - t) * self.max_lr + t * self.min_lr


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `max_lr` to a floor at the run's end, exactly (Loshchilov and Hutter 2017): a control."""

    max_lr: float
    min_lr: float
    run_images: int

    def rate(self, start: int, stop: int) -> float:
        if stop >= self.run_images:
            return self.min_lr
        return self.min_lr + (self.max_lr - self.min_lr) * (1 + cos(pi * stop / self.run_images)) / 2


@dataclass(frozen=True)
class WarmUp:
    """Another schedule, scaled up linearly from zero over the first `warmup_images`."""

    schedule: Schedule
    warmup_images: Fraction

    def rate(self, start: int, stop: int) -> float:
        rate = self.schedule.rate(start, stop)
        return rate if stop >= self.warmup_images else rate * float(stop / self.warmup_images)


@dataclass(frozen=True)
class Scaled:
    """Another schedule, times a factor: for another global batch than it was made for."""

    schedule: Schedule
    factor: float

    def rate(self, start: int, stop: int) -> float:
        return self.factor * self.schedule.rate(start, stop)


def crosses(start: int, stop: int, period: Fraction | int) -> bool:
    """Whether the step over the images [start, stop) reaches or passes a multiple of `period`."""
    return stop // period > start // period
