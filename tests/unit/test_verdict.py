"""Paired tests of two sets of weights on the same images, and the sentence that sums them up."""

import numpy as np
import pytest
from scipy.stats import binom

from swa_dist.evidence import verdict
from swa_dist.training.evaluate import Outcomes


def outcomes(top1, ids=None):
    """Outcomes of a model that is right where `top1` says."""
    top1 = np.array(top1, dtype=bool)
    return Outcomes(
        ids=np.arange(len(top1), dtype=np.int64) if ids is None else np.array(ids, dtype=np.int64),
        top1=top1,
        top5=np.ones_like(top1),
        nll=np.zeros(len(top1)),
        confidence=np.full(len(top1), 0.5),
    )


def pair(wins, losses, both=20, neither=10):
    """Two models' outcomes, of which the first alone is right `wins` times and the second alone `losses` times."""
    candidate = [True] * wins + [False] * losses + [True] * both + [False] * neither
    other = [False] * wins + [True] * losses + [True] * both + [False] * neither
    return outcomes(candidate), outcomes(other)


def compared(wins, losses, **counts):
    candidate, other = pair(wins, losses, **counts)
    return verdict.compare("swa", candidate, "start", other)


# McNemar's exact test is a sign test of the differing images: 2 * P(X <= fewer) for X of Binomial(n, 1/2), at most 1.
@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [
        (8, 2, 2 * (1 + 10 + 45) / 2**10),  # 0.109375
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (10, 0, 2 / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (3, 1, 2 * (1 + 4) / 2**4),
        (6, 0, 2 / 2**6),
        (0, 0, 1.0),
    ],
)
def test_the_p_value_is_mcnemars_by_hand(wins, losses, p_value):
    assert compared(wins, losses).p_value == pytest.approx(p_value, rel=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(130, 95), (700, 612), (4, 40)])
def test_the_p_value_of_larger_counts_is_twice_the_smaller_tail(wins, losses):
    expected = min(1.0, 2 * binom.cdf(min(wins, losses), wins + losses, 0.5))
    assert compared(wins, losses).p_value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("both", "neither"), [(0, 0), (1000, 0), (0, 1000)])
def test_images_that_both_have_right_or_wrong_do_not_change_the_p_value(both, neither):
    assert compared(8, 2, both=both, neither=neither).p_value == pytest.approx(0.109375)


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (0, 7), (3, 3), (120, 80)])
def test_comparing_the_other_way_round_turns_the_sign_and_keeps_the_p_value(wins, losses):
    one, other = pair(wins, losses)
    forth, back = verdict.compare("a", one, "b", other), verdict.compare("b", other, "a", one)
    assert (forth.candidate, forth.against) == (back.against, back.candidate) == ("a", "b")
    assert (forth.wins, forth.losses) == (back.losses, back.wins) == (wins, losses)
    assert forth.gain == -back.gain
    assert forth.p_value == back.p_value
    # The intervals are of two samples of draws, so they mirror each other up to one image or so.
    assert forth.low == pytest.approx(-back.high, abs=2 * 100 / len(one.ids))
    assert forth.high == pytest.approx(-back.low, abs=2 * 100 / len(one.ids))


def test_the_gain_is_the_difference_of_top1():
    random = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        one, other = outcomes(random.random(397) < share), outcomes(random.random(397) < 0.5)
        gain = verdict.compare("swa", one, "start", other).gain
        assert gain == pytest.approx(one.metrics()["top1"] - other.metrics()["top1"], abs=1e-9)


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (0, 1), (8, 2), (2, 8), (30, 30), (40, 0), (130, 95)])
def test_the_interval_contains_the_gain(wins, losses):
    found = compared(wins, losses)
    assert found.low <= found.gain <= found.high
    assert -100 <= found.low
    assert found.high <= 100


def test_the_interval_is_that_of_resampling_images():
    """Against the plain bootstrap, image by image, of the same outcomes."""
    one, other = pair(60, 30, both=200, neither=110)
    found = verdict.compare("swa", one, "start", other)
    difference = one.top1.astype(float) - other.top1
    drawn = np.random.default_rng(1).integers(0, len(difference), (4000, len(difference)))
    low, high = np.quantile(100 * difference[drawn].mean(axis=1), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.5)
    assert found.high == pytest.approx(high, abs=0.5)


def test_the_interval_narrows_with_more_images():
    few, many = compared(8, 2, both=0, neither=0), compared(800, 200, both=0, neither=0)
    assert many.gain == few.gain == 60
    assert many.high - many.low < (few.high - few.low) / 5


def test_no_differences_give_p_1_and_no_gain():
    found = compared(0, 0)
    assert (found.gain, found.low, found.high, found.p_value) == (0, 0, 0, 1.0)
    assert not found.shown


def test_a_comparison_is_repeatable():
    assert compared(30, 20) == compared(30, 20)


@pytest.mark.parametrize("other", [outcomes([True] * 3), outcomes([True] * 2, ids=[0, 2])])
def test_outcomes_of_different_images_are_refused(other):
    with pytest.raises(ValueError, match="same images"):
        verdict.compare("swa", outcomes([True] * 2), "start", other)


@pytest.mark.parametrize(
    ("wins", "losses", "shown"),
    [(40, 10, True), (10, 40, False), (8, 2, False), (0, 0, False), (6, 0, True), (5, 0, False)],
)
def test_a_gain_is_shown_if_chance_would_not_give_it(wins, losses, shown):
    assert compared(wins, losses).shown is shown


def test_the_control_is_the_better_of_the_last_weights():
    good, bad = outcomes([True, True, False]), outcomes([True, False, False])
    start = outcomes([True, True, True])
    assert verdict.control_of({"start": start, "last": good, "last_fresh": bad, "swa": start}) == "last"
    assert verdict.control_of({"start": start, "last": bad, "last_fresh": good, "swa": start}) == "last_fresh"
    assert verdict.control_of({"last": good, "last_fresh": good}) == "last"


BETTER, NOT_SHOWN, WORSE = (40, 10), (8, 2), (10, 40)


def paired(counts, against):
    return verdict.compare("swa", pair(*counts)[0], against, pair(*counts)[1])


@pytest.mark.parametrize(
    ("over_start", "over_last", "sentence"),
    [
        (BETTER, BETTER, "swa is better than the start and than plain fine-tuning: "),
        (BETTER, NOT_SHOWN, "swa is better than the start, but not shown to be better than plain fine-tuning: "),
        (NOT_SHOWN, BETTER, "swa is better than plain fine-tuning, but not shown to be better than the start: "),
        (NOT_SHOWN, NOT_SHOWN, "no evidence that swa is better than the start or than plain fine-tuning: "),
        (WORSE, WORSE, "swa is worse than the start and than plain fine-tuning: "),
        (BETTER, WORSE, "swa is worse than plain fine-tuning, though better than the start: "),
    ],
)
def test_the_sentence_says_which_of_both_was_shown(over_start, over_last, sentence):
    start, last = paired(over_start, "start"), paired(over_last, "last_fresh")
    found = verdict.verdict(start, last)
    assert found.sentence.startswith(sentence)
    assert (found.better_than_start, found.better_than_last) == (over_start == BETTER, over_last == BETTER)
    assert f"{start} over start" in found.sentence
    assert f"{last} over last_fresh" in found.sentence


@pytest.mark.parametrize(
    ("over_start", "sentence"),
    [(BETTER, "last is better than the start: "), (NOT_SHOWN, "no evidence that last is better than the start: ")],
)
def test_where_the_candidate_is_the_control_the_start_alone_counts(over_start, sentence):
    one, other = pair(*over_start)
    found = verdict.verdict(verdict.compare("last", one, "start", other), None)
    assert found.sentence.startswith(sentence)
    assert found.better_than_start == (over_start == BETTER)
    assert not found.better_than_last


def test_a_comparison_reads_with_its_sign_interval_and_p_value():
    found = compared(8, 2, both=80, neither=10)
    text = str(found)
    assert text.startswith("+6.00 points (95 % interval ")
    assert "p = 0.11)" in text
    assert str(compared(2, 8, both=80, neither=10)).startswith("-6.00 points")
