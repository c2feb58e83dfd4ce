"""The rules between a version and @champion."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from swa_dist.config import Gate
from swa_dist.evidence import gate
from swa_dist.evidence.verdict import Verdict
from swa_dist.training.evaluate import Outcomes

CLASSES = ("ant", "bee", "cat", "dog")
BETTER = Verdict(better_than_start=True, better_than_last=True, sentence="better than both")
THAN_START = Verdict(better_than_start=True, better_than_last=False, sentence="better than the start alone")
NONE = Verdict(better_than_start=False, better_than_last=False, sentence="no evidence")


def outcomes(right, confidence=0.9):
    right = np.array(right, dtype=bool)
    return Outcomes(
        ids=np.arange(len(right)),
        top1=right,
        top5=np.ones_like(right),
        nll=np.zeros(len(right)),
        confidence=np.full(len(right), confidence),
    )


def pair(*by_class, both=900, neither=100):
    """Outcomes of challenger and champion, and labels: for each class how many images only the one has right, and how
    many only the other; those that both or neither has right are spread over the classes."""
    mine, theirs, labels = [], [], []
    for label, (wins, losses) in enumerate(by_class):
        mine += [True] * wins + [False] * losses
        theirs += [False] * wins + [True] * losses
        labels += [label] * (wins + losses)
    mine += [True] * both + [False] * neither
    theirs += [True] * both + [False] * neither
    labels += [number % len(CLASSES) for number in range(both + neither)]
    return np.array(mine), np.array(theirs), np.array(labels)


def decided(by_class, rules=None, verdict=BETTER, *, is_control=False, mine_confidence=0.9, **counts):
    mine, theirs, labels = pair(*by_class, **counts)
    return gate.decide(
        rules or Gate(),
        verdict,
        is_control=is_control,
        challenger=outcomes(mine, mine_confidence),
        champion=outcomes(theirs),
        labels=labels,
        classes=CLASSES,
    )


def broken(decision):
    return [rule.name for rule in decision.rules if not rule.holds]


def test_a_clear_gain_everywhere_passes():
    found = decided([(10, 2)] * 4)
    assert found.passed
    assert found.sentence.startswith("better than @champion: +3.05 points")
    assert found.most_lost == ()


@pytest.mark.parametrize(
    ("verdict", "rules", "is_control", "passes"),
    [
        (BETTER, Gate(), False, True),
        (THAN_START, Gate(), False, False),
        (THAN_START, Gate(evidence="start"), False, True),
        (THAN_START, Gate(), True, True),
        (NONE, Gate(evidence="start"), True, False),
    ],
)
def test_the_runs_own_verdict_is_needed(verdict, rules, is_control, passes):
    found = decided([(10, 2)] * 4, rules, verdict, is_control=is_control)
    assert found.passed == passes
    if not passes:
        assert broken(found) == ["its own run"]
        assert verdict.sentence in found.sentence


def test_a_gain_that_chance_would_give_is_none():
    found = decided([(3, 2), (2, 2), (3, 2), (2, 1)])
    assert broken(found) == ["gain"]
    assert "no more than chance would give" in found.sentence


def test_a_gain_below_the_least_is_refused_though_it_is_surely_one():
    by_class = [(30, 0)] * 4  # 120 of 1,120 images
    assert decided(by_class, Gate(min_gain=10.7)).passed
    assert broken(decided(by_class, Gate(min_gain=10.8))) == ["gain"]


def test_a_class_that_loses_much_stands_in_the_way_of_a_gain_elsewhere():
    by_class = [(100, 0), (100, 0), (100, 0), (0, 40)]
    found = decided(by_class)
    assert broken(found) == ["classes"]
    assert (
        "1 of 4 classes lost more than 5 points beyond chance, most dog: -13.8 points of 290 images" in found.sentence
    )
    assert [one.name for one in found.most_lost] == ["dog"]
    assert decided(by_class, Gate(max_class_loss=14)).passed


def test_a_class_that_loses_no_more_than_chance_would_have_it_does_not():
    """With four classes 6 of 6 images lost are of p = 4/64 after the correction; alone they would be of 1/64."""
    found = decided([(100, 0), (100, 0), (100, 0), (0, 6)], both=32, neither=8)
    (dog,) = found.most_lost
    assert dog.change == pytest.approx(-100 * 6 / 16)
    assert dog.p_value == pytest.approx(4 / 64)
    assert found.passed
    assert broken(decided([(100, 0), (100, 0), (100, 0), (0, 7)], both=32, neither=8)) == ["classes"]


def test_worse_calibration_stands_in_the_way():
    assert decided([(10, 2)] * 4, mine_confidence=0.905).passed
    found = decided([(10, 2)] * 4, mine_confidence=0.99)
    assert broken(found) == ["calibration"]
    assert decided([(10, 2)] * 4, Gate(max_ece_rise=20), mine_confidence=0.99).passed


def test_all_rules_that_do_not_hold_are_named():
    found = decided([(2, 9)] * 4, verdict=NONE, mine_confidence=0.99)
    assert broken(found) == ["its own run", "gain", "calibration"]
    assert found.sentence.count(";") >= 2


def test_of_a_class_without_images_nothing_is_said():
    mine, theirs, labels = pair((3, 1), (3, 1))
    kept = labels < 2
    found = gate.class_changes(mine[kept], theirs[kept], labels[kept], CLASSES)
    assert [(one.name, one.images) for one in found] == [("ant", 254), ("bee", 254)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_holms_correction_lies_between_none_and_bonferronis_and_keeps_the_order(p_values):
    p_values = np.array(p_values)
    found = gate.holm(p_values)
    assert (found >= p_values).all()
    assert (found <= np.minimum(1, p_values * len(p_values))).all()
    assert found[p_values.argmin()] == min(1, p_values.min() * len(p_values))
    assert (np.diff(found[np.argsort(p_values)]) >= 0).all()


def test_where_no_class_is_worse_one_is_called_so_in_at_most_one_comparison_of_twenty():
    """5,000 comparisons of two equal models on 100 classes of 50 images, on a third of which they differ."""
    random = np.random.default_rng(0)
    differing = random.binomial(50, 1 / 3, size=(5000, 100))
    losses = random.binomial(differing, 0.5)
    p_values = binom.sf(losses - 1, differing, 0.5)
    flagged = np.array([(gate.holm(row) < 0.05).any() for row in p_values])
    assert flagged.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(flagged))
    assert flagged.any()
