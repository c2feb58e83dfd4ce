"""May a version become @champion? Its own verdict, and what it makes of the images that the champion was scored on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from swa_dist.config import Gate
from swa_dist.data.order import Ints
from swa_dist.evidence.verdict import LEVEL, Paired, Verdict, compare
from swa_dist.training.evaluate import Outcomes

_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Rule:
    """One of the recipe's, and whether it holds."""

    name: str
    holds: bool
    finding: str


@dataclass(frozen=True)
class ClassChange:
    """Top-1 of one class, the challenger's against the champion's."""

    name: str
    images: int
    change: float
    """Percentage points."""
    p_value: float
    """Of losing so many more images than are won by chance, one-sided, after Holm's correction for all classes."""


@dataclass(frozen=True)
class Decision:
    passed: bool
    rules: tuple[Rule, ...]
    paired: Paired
    """The challenger's top-1 against the champion's."""
    most_lost: tuple[ClassChange, ...]
    """The classes that lost most, if any did."""

    @property
    def sentence(self) -> str:
        if self.passed:
            return f"better than @champion: {self.paired}"
        return "; ".join(rule.finding for rule in self.rules if not rule.holds)


def decide(
    gate: Gate,
    verdict: Verdict,
    *,
    is_control: bool,
    challenger: Outcomes,
    champion: Outcomes,
    labels: Ints,
    classes: Sequence[str],
) -> Decision:
    """Whether the challenger may take the champion's place: all rules of `gate` hold.

    `verdict`: of the challenger's own run; `is_control`: the challenger is plain fine-tuning itself. Both outcomes are
    of the same images, `labels` their classes, int64 [images]. Raises ValueError where they are not.
    """
    paired = compare("challenger", challenger, "@champion", champion)
    changes = class_changes(challenger.top1, champion.top1, labels, classes)
    rise = challenger.metrics()["ece"] - champion.metrics()["ece"]
    rules = (
        _own_verdict(gate, verdict, is_control=is_control),
        _gain(gate, paired),
        _classes(gate, changes),
        Rule(
            "calibration",
            bool(rise <= gate.max_ece_rise),
            f"ECE {rise:+.2f} points against @champion's, and {gate.max_ece_rise:+g} is the most",
        ),
    )
    lost = sorted((one for one in changes if one.change < 0), key=lambda one: one.change)[:_CLASSES_SHOWN]
    return Decision(all(rule.holds for rule in rules), rules, paired, tuple(lost))


def class_changes(
    challenger: npt.NDArray[np.bool_], champion: npt.NDArray[np.bool_], labels: Ints, classes: Sequence[str]
) -> list[ClassChange]:
    """Each class's change of top-1, of those that have images.

    A sign test on the images where the two differ (McNemar 1947), one-sided, corrected by Holm (1979): the chance that
    any class at all seems to lose is at most the level, however many classes there are.
    """
    counts = np.bincount(labels, minlength=len(classes))
    wins = np.bincount(labels[challenger & ~champion], minlength=len(classes))
    losses = np.bincount(labels[~challenger & champion], minlength=len(classes))
    there = np.flatnonzero(counts)
    p_values = holm(binom.sf(losses[there] - 1, wins[there] + losses[there], 0.5))
    return [
        ClassChange(classes[k], int(counts[k]), 100 * float(wins[k] - losses[k]) / int(counts[k]), float(p))
        for k, p in zip(there.tolist(), p_values, strict=True)
    ]


def holm(p_values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """P-values [tests] after the step-down correction for all of them (Holm 1979)."""
    order = np.argsort(p_values)
    remaining = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(remaining * p_values[order]))
    return adjusted


def _own_verdict(gate: Gate, verdict: Verdict, *, is_control: bool) -> Rule:
    needs_last = gate.evidence == "start-and-last" and not is_control
    wanted = "the start and plain fine-tuning" if needs_last else "the start"
    holds = verdict.better_than_start and (verdict.better_than_last or not needs_last)
    return Rule("its own run", holds, f"must be shown better than {wanted} in its own run; found: {verdict.sentence}")


def _gain(gate: Gate, paired: Paired) -> Rule:
    finding = f"{paired} over @champion"
    if not paired.shown:
        finding += ", no more than chance would give" if paired.gain >= 0 else ""
    if paired.gain < gate.min_gain:
        finding += f", and {gate.min_gain:+g} is the least"
    return Rule("gain", paired.shown and paired.gain >= gate.min_gain, finding)


def _classes(gate: Gate, changes: Sequence[ClassChange]) -> Rule:
    lost = [one for one in changes if one.p_value < LEVEL and -one.change > gate.max_class_loss]
    if not lost:
        return Rule("classes", True, f"no class lost more than {gate.max_class_loss:g} points beyond chance")
    worst = min(lost, key=lambda one: one.change)
    return Rule(
        "classes",
        False,
        f"{len(lost)} of {len(changes)} classes lost more than {gate.max_class_loss:g} points beyond chance, most"
        f" {worst.name}: {worst.change:+.1f} points of {worst.images} images (p = {worst.p_value:.2g})",
    )
