"""Tests of trl_opd.statistics: Wilson's closed formula, and the bootstrap against its exact distribution."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opd.statistics import accuracy_interval, interval_text, paired_difference


def solved(right: int, problems: int) -> list[bool]:
    return [place < right for place in range(problems)]


# Accuracy


@settings(max_examples=50)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_the_interval_of_an_accuracy_is_wilsons(counts, confidence):
    (right, n), z = counts, NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = accuracy_interval(solved(right, n), confidence)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert -1e-12 <= low <= share <= high <= 1 + 1e-12


def test_three_of_four_are_known_to_lie_between_30_and_95_percent():
    # Worked by hand at z = 1.96: centre (0.75 + 0.48) / 1.96 = 0.6275, half-width 0.3268.
    assert accuracy_interval([True, False, True, True]) == pytest.approx((0.3006, 0.9544), abs=1e-4)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_an_accuracy_is_taken_from_any_sequence(kind):
    low, high = accuracy_interval(kind([True, True, False]))
    assert (low, high) == accuracy_interval([1, 1, 0])
    assert type(low) is type(high) is float


def test_no_problems_have_no_accuracy():
    with pytest.raises(ValueError, match=r"\w"):
        accuracy_interval([])


# Differences


def exact_quantiles(difference: list[int], *shares: float) -> list[float]:
    """Return quantiles of the mean of n draws with replacement: the bootstrap distribution itself, by convolution."""
    n = len(difference)
    one = np.array([difference.count(value) / n for value in (-1, 0, 1)])
    probabilities = np.array([1.0])
    for _ in range(n):
        probabilities = np.convolve(probabilities, one)
    cumulative = probabilities.cumsum()
    return [(int(np.searchsorted(cumulative, share)) - n) / n for share in shares]


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("counts", [(3, 20, 7), (0, 30, 10), (10, 5, 10), (1, 58, 1), (12, 0, 3)])
def test_the_interval_of_a_difference_is_the_quantiles_of_the_exact_bootstrap(counts, confidence):
    worse, same, better = counts
    correct = worse * [False] + same * [True] + better * [True]
    baseline = worse * [True] + same * [True] + better * [False]
    estimate, (low, high) = paired_difference(correct, baseline, seed=0, confidence=confidence)
    difference = worse * [-1] + same * [0] + better * [1]
    n = len(difference)
    assert estimate == pytest.approx((better - worse) / n)
    expected = exact_quantiles(difference, (1 - confidence) / 2, (1 + confidence) / 2)
    # A mean is a multiple of 1/n: 10 000 draws find each quantile, or its neighbour.
    assert (low, high) == pytest.approx(expected, abs=1.001 / n)
    assert low <= estimate <= high


answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(answers, st.integers(0, 2**32))
def test_the_interval_contains_the_difference_of_the_accuracies(pairs, seed):
    correct, baseline = zip(*pairs, strict=True)
    estimate, interval = paired_difference(correct, baseline, seed=seed)
    assert estimate == pytest.approx((sum(correct) - sum(baseline)) / len(pairs), abs=1e-12)
    assert (interval is None) == (len({int(one) - int(other) for one, other in pairs}) == 1)
    assert interval is None or -1 <= interval[0] <= estimate <= interval[1] <= 1
    assert paired_difference(list(correct), np.array(baseline), seed=seed) == (estimate, interval)


def test_a_seed_repeats_its_resamples_and_another_draws_others():
    # So far in the tails an end is one of few resamples, and two draws of 10 000 hardly agree in both.
    correct, baseline = np.random.default_rng(0).random((2, 200)) < 0.5
    first, again = ([paired_difference(correct, baseline, seed=s, confidence=0.9999) for s in range(6)] for _ in "12")
    assert first == again
    assert len(set(first)) > 3


def test_numpys_global_generator_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    paired_difference([True, False, True], [False, False, True], seed=1)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    ("correct", "baseline", "expected"),
    [([1, 0, 1], [1, 0, 1], 0.0), ([1, 1], [0, 0], 1.0), ([0, 0, 0], [1, 1, 1], -1.0), ([1], [0], 1.0)],
)
def test_a_constant_difference_has_no_interval(correct, baseline, expected):
    assert paired_difference(correct, baseline, seed=0) == (expected, None)


def test_problems_are_paired():
    # Two arms of accuracy 1/2: on the same problems they agree everywhere, on opposite ones nowhere.
    half, other = 20 * [True] + 20 * [False], 20 * [False] + 20 * [True]
    assert paired_difference(half, half, seed=0) == (0.0, None)
    estimate, (low, high) = paired_difference(half, other, seed=0)
    assert estimate == 0.0
    # 1.96 standard errors of 40 differences of ±1 are 0.31.
    assert (low, high) == pytest.approx((-0.31, 0.31), abs=0.05)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says():
    rng, covered, runs, true = np.random.default_rng(0), 0, 200, 0.1
    for seed in range(runs):
        # Correlated arms: better where the baseline fails in 1 of 5 problems, worse in 1 of 10.
        draw = rng.random(60)
        _, (low, high) = paired_difference(draw < 0.7, (draw < 0.5) | (draw > 0.9), seed=seed)
        covered += low <= true <= high
    assert 0.9 <= covered / runs <= 0.98


@pytest.mark.parametrize(("one", "two"), [(2, 3), (3, 2), (0, 1), (1, 0)])
def test_unequal_numbers_of_problems_are_refused(one, two):
    with pytest.raises(ValueError, match=f"got {one} and {two}"):
        paired_difference([True] * one, [False] * two, seed=0)


# Text


def test_an_interval_is_shown_in_the_form_of_its_numbers_or_said_to_be_missing():
    assert interval_text((0.3006, 0.9544), ".3f") == "[0.301, 0.954]"
    assert interval_text([-0.01, 0.2], "+.3f") == "[-0.010, +0.200]"
    assert interval_text(None, ".1%") == "(no interval)"
