"""Is the candidate better than what it started from, and than plain fine-tuning? Paired tests on the same images."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from swa_dist.training.evaluate import Outcomes

LEVEL = 0.05
"""Of all tests."""
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """Top-1 of one set of weights against another's on the same images."""

    candidate: str
    against: str
    gain: float
    """Difference of top-1, percentage points."""
    low: float
    """95 % interval of the gain by the paired bootstrap (Efron 1979), percentage points."""
    high: float
    wins: int
    """Images that only the candidate has right."""
    losses: int
    """Images that only the other has right."""
    p_value: float
    """Of McNemar's exact test (McNemar 1947): as many wins as losses. Two-sided."""

    @property
    def worse(self) -> bool:
        """Whether the candidate is worse by more than chance would have it."""
        return self.p_value < LEVEL and self.high < 0

    @property
    def shown(self) -> bool:
        """Whether the gain is more than chance would give."""
        return self.p_value < LEVEL and self.low > 0

    def __str__(self) -> str:
        return f"{self.gain:+.2f} points (95 % interval {self.low:+.2f} to {self.high:+.2f}, p = {self.p_value:.2g})"


@dataclass(frozen=True)
class Verdict:
    better_than_start: bool
    better_than_last: bool
    sentence: str


def compare(candidate: str, outcomes: Outcomes, against: str, others: Outcomes) -> Paired:
    """Both outcomes must be of the same images."""
    if not np.array_equal(outcomes.ids, others.ids):
        raise ValueError("outcomes must be of the same images to be compared.")
    n = len(outcomes.ids)
    wins = int((outcomes.top1 & ~others.top1).sum())
    losses = int((~outcomes.top1 & others.top1).sum())
    # Drawing images with replacement draws wins, losses and ties in a multinomial; the seed makes it repeatable.
    draws = np.random.default_rng(0).multinomial(n, [wins / n, losses / n, 1 - (wins + losses) / n], size=_RESAMPLES)
    low, high = np.quantile(100 * (draws[:, 0] - draws[:, 1]) / n, [LEVEL / 2, 1 - LEVEL / 2])
    return Paired(
        candidate=candidate,
        against=against,
        gain=100 * (wins - losses) / n,
        low=float(low),
        high=float(high),
        wins=wins,
        losses=losses,
        p_value=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )


def control_of(candidates: dict[str, Outcomes]) -> str:
    """Plain fine-tuning at the same budget: the last iterate with the BatchNorm statistics that suit it better."""
    return max(("last", "last_fresh"), key=lambda name: candidates[name].top1.sum())


def verdict(against_start: Paired, against_control: Paired | None) -> Verdict:
    """`against_control`: None where the candidate is the control itself."""
    name, start = against_start.candidate, against_start.shown
    if against_control is None:
        finding = f"{name} is better than the start" if start else f"no evidence that {name} is better than the start"
        return Verdict(better_than_start=start, better_than_last=False, sentence=f"{finding}: {against_start}.")
    last = against_control.shown
    if start and last:
        finding = f"{name} is better than the start and than plain fine-tuning"
    elif start:
        finding = f"{name} is better than the start, but not shown to be better than plain fine-tuning"
    elif last:
        finding = f"{name} is better than plain fine-tuning, but not shown to be better than the start"
    else:
        finding = f"no evidence that {name} is better than the start or than plain fine-tuning"
    if against_start.worse or against_control.worse:
        than = [w for w, p in (("the start", against_start), ("plain fine-tuning", against_control)) if p.worse]
        finding = f"{name} is worse than {' and than '.join(than)}" + (
            ", though better than the start" if start else ""
        )
    return Verdict(
        better_than_start=start,
        better_than_last=last,
        sentence=f"{finding}: {against_start} over start, {against_control} over {against_control.against}.",
    )
