"""Intervals, tests and corrections: exact where they claim it, calibrated without an effect, of the stated power."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trl_opd.statistics import (
    ALPHA,
    LEAST_EFFECT,
    accuracy_interval,
    benjamini_hochberg,
    bootstrap_means,
    correlation,
    effect_of,
    holm,
    interval_text,
    label,
    mcnemar,
    minimal_effect,
    paired_difference,
    problems_for,
    ratio_interval,
    rocks_against_controls,
    sign_flips,
)


def solved(right: int, problems: int) -> list[bool]:
    return [place < right for place in range(problems)]


# Accuracy


@settings(max_examples=50)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_accuracy_interval_is_wilsons(counts, confidence):
    (right, n), z = counts, NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = accuracy_interval(solved(right, n), confidence)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert -1e-12 <= low <= share <= high <= 1 + 1e-12


def test_accuracy_interval_of_three_of_four_problems():
    # By hand at z = 1.96: centre (0.75 + 0.48) / 1.96 = 0.6275, half-width 0.3268.
    assert accuracy_interval([True, False, True, True]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    with pytest.raises(ValueError, match="accuracy on 0 problems is undefined"):
        accuracy_interval([])


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_accuracy_interval_takes_any_sequence(kind):
    low, high = accuracy_interval(kind([True, True, False]))
    assert (low, high) == accuracy_interval([1, 1, 0])
    assert type(low) is type(high) is float


# Differences


def exact_quantiles(difference: list[int], *shares: float) -> list[float]:
    """Return quantiles of the exact bootstrap distribution: the mean of n draws with replacement, by convolution."""
    n = len(difference)
    one = np.array([difference.count(value) / n for value in (-1, 0, 1)])
    probabilities = np.array([1.0])
    for _ in range(n):
        probabilities = np.convolve(probabilities, one)
    cumulative = probabilities.cumsum()
    return [(int(np.searchsorted(cumulative, share)) - n) / n for share in shares]


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("counts", [(3, 20, 7), (0, 30, 10), (10, 5, 10), (1, 58, 1), (12, 0, 3)])
def test_interval_of_a_difference_has_the_quantiles_of_the_exact_bootstrap(counts, confidence):
    worse, same, better = counts
    difference = worse * [-1] + same * [0] + better * [1]
    n = len(difference)
    correct = [value >= 0 for value in difference]
    baseline = worse * [True] + same * [True] + better * [False]
    estimate, (low, high) = paired_difference(correct, baseline, seed=0, confidence=confidence)
    assert estimate == pytest.approx((better - worse) / n)
    expected = exact_quantiles(difference, (1 - confidence) / 2, (1 + confidence) / 2)
    # A mean is a multiple of 1/n: 10 000 draws find each quantile or the multiple next to it.
    assert (low, high) == pytest.approx(expected, abs=1.001 / n)
    assert low <= estimate <= high


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12), st.integers(0, 2**32))
def test_interval_contains_the_difference_of_the_accuracies(pairs, seed):
    correct, baseline = zip(*pairs, strict=True)
    estimate, interval = paired_difference(correct, baseline, seed=seed)
    assert estimate == pytest.approx((sum(correct) - sum(baseline)) / len(pairs), abs=1e-12)
    assert (interval is None) == (len({int(one) - int(other) for one, other in pairs}) == 1)
    assert interval is None or -1 <= interval[0] <= estimate <= interval[1] <= 1
    assert paired_difference(list(correct), np.array(baseline), seed=seed) == (estimate, interval)


def test_seed_alone_decides_the_resamples():
    # So far in the tails an end is one of few resamples, so two draws of 10 000 hardly ever agree in both ends.
    correct, baseline = np.random.default_rng(0).random((2, 200)) < 0.5
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first, again = ([paired_difference(correct, baseline, seed=s, confidence=0.9999) for s in range(6)] for _ in "12")
    assert first == again
    assert len(set(first)) > 3
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.slow
def test_interval_covers_the_true_difference_as_often_as_its_level_says():
    rng, covered, runs, true = np.random.default_rng(0), 0, 200, 0.1
    for seed in range(runs):
        # Correlated arms: better where the baseline fails in 1 of 5 problems, worse in 1 of 10.
        draw = rng.random(60)
        _, (low, high) = paired_difference(draw < 0.7, (draw < 0.5) | (draw > 0.9), seed=seed)
        covered += low <= true <= high
    assert 0.9 <= covered / runs <= 0.98


@pytest.mark.parametrize(("one", "two"), [(2, 3), (3, 2), (0, 1), (1, 0)])
def test_unequal_numbers_of_problems_are_an_error(one, two):
    with pytest.raises(ValueError, match=f"got {one} and {two}"):
        paired_difference([True] * one, [False] * two, seed=0)
    with pytest.raises(ValueError, match="needs two results for each of the same problems"):
        effect_of([1.0] * one, [0.0] * two, seed=0)


# Tests and corrections


@given(better=st.integers(0, 60), worse=st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs(better, worse):
    expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert mcnemar(np.array(better), np.array(worse)) == pytest.approx(expected)


@given(values=st.lists(st.sampled_from([-1.5, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=9))
def test_few_sign_flips_are_enumerated_completely(values):
    flips = np.array(list(itertools.product((1, -1), repeat=len(values)))) * values
    expected = np.mean(abs(flips.sum(1)) >= abs(sum(values)) - 1e-9)
    assert sign_flips(np.array(values), seed=0) == pytest.approx(expected)


def test_many_sign_flips_are_drawn_and_agree_with_mcnemar_where_both_hold():
    difference = np.array([1.0] * 40 + [-1.0] * 20 + [0.0] * 100)
    assert sign_flips(difference, seed=0) == pytest.approx(float(mcnemar(np.array(40), np.array(20))), abs=0.003)
    assert sign_flips(difference, seed=0) == sign_flips(difference, seed=0) != sign_flips(difference, seed=1)
    assert sign_flips(np.ones(60), seed=0) == pytest.approx(1 / 100_001)  # never 0


def test_means_of_resamples_are_those_of_drawing_problems():
    rng = np.random.default_rng(0)
    difference = rng.choice([-1.0, 0.0, 0.5, 1.0], 80)
    naive = difference[rng.integers(80, size=(20_000, 80))].mean(1)
    found = bootstrap_means(difference, seed=1)
    assert found.mean() == pytest.approx(naive.mean(), abs=0.005)
    np.testing.assert_allclose(np.quantile(found, [0.025, 0.975]), np.quantile(naive, [0.025, 0.975]), atol=0.02)


@pytest.mark.parametrize("binary", [True, False])
def test_effect_reports_estimate_counts_interval_and_p(binary):
    baseline = [1.0] * 50 + [0.0] * 50
    arm = [0.0 if binary else 0.4] * 20 + baseline[20:90] + [1.0] * 2 + [0.0] * 8
    found = effect_of(arm, baseline, seed=0)
    assert found.estimate == pytest.approx(np.mean(arm) - np.mean(baseline))
    assert (found.better, found.worse) == (2, 20)
    assert found.ci95[0] < found.estimate < found.ci95[1] < 0
    if binary:
        assert found.p == pytest.approx(stats.binomtest(2, 22).pvalue)
    else:  # a fall by 0.6 weighs less than a rise by 1
        assert found.p == sign_flips(np.subtract(arm, baseline), seed=0) != pytest.approx(stats.binomtest(2, 22).pvalue)
    assert found.p_bootstrap >= 2e-4


def test_arm_that_changes_nothing_has_no_interval():
    found = effect_of([1.0, 0.0], [1.0, 0.0], seed=0)
    assert (found.estimate, found.ci95, found.p, found.p_bootstrap) == (0.0, None, 1.0, 1.0)


def test_corrections_are_those_of_their_authors():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, 0.04, 0.02])
    assert len(holm([])) == len(benjamini_hochberg([])) == 0
    many = np.random.default_rng(0).random(50)
    assert (holm(many) >= benjamini_hochberg(many)).all()
    assert (benjamini_hochberg(many) >= many).all()


def test_label_needs_size_and_significance():
    assert label(-0.01, 0.05) == "pillar"
    assert label(0.01, 0.05) == "stumbling"
    assert label(-0.009, 0.001) == label(-0.2, 0.051) == label(0.0, 1.0) == "neutral"


def simulate(problems: int, discordance: float, effects: np.ndarray, seed: int) -> np.ndarray:
    """Return which of 200 candidates get a label after correction in each of 400 runs, `(400, 200)`."""
    rng = np.random.default_rng(seed)
    share = np.maximum(discordance, np.abs(effects))
    discordant = rng.binomial(problems, share, size=(400, len(effects)))
    better = rng.binomial(discordant, 0.5 * (1 + effects / share))
    p = stats.false_discovery_control(mcnemar(better, discordant - better), axis=1)
    estimate = (2 * better - discordant) / problems
    return (p <= ALPHA) & (np.abs(estimate) >= LEAST_EFFECT)


@pytest.mark.parametrize("discordance", [0.01, 0.02, 0.04, 0.10])
def test_without_an_effect_a_corrected_hit_is_rare(discordance):
    hits = simulate(500, discordance, np.zeros(200), seed=7).any(axis=1)
    assert hits.mean() <= 0.05


@pytest.mark.parametrize("discordance", [0.04, 0.07, 0.10])
def test_effects_of_0_03_are_found_with_2000_problems(discordance):
    effects = np.zeros(200)
    effects[:10] = -0.03
    found = simulate(2000, discordance, effects, seed=3)
    assert found[:, :10].mean() >= 0.8
    assert found[:, 10:].mean() <= 0.01


def test_the_smallest_effect_is_that_of_the_formula_and_its_problems_find_it():
    expected = (stats.norm.ppf(1 - 0.05 / 400) + stats.norm.ppf(0.8)) * np.sqrt(0.1 / 2000)
    assert minimal_effect(2000, 200, 0.1) == pytest.approx(expected)
    needed = problems_for(0.03, 200, 0.1)
    assert minimal_effect(needed, 200, 0.1) <= 0.03 < minimal_effect(needed - 1, 200, 0.1)


def test_rocks_and_controls_are_compared_by_their_effects():
    assert rocks_against_controls([-0.3, -0.2, -0.25, -0.31], [0.0, 0.01, -0.01, 0.02]) == pytest.approx(2 / 70)
    assert rocks_against_controls([], [0.1]) is None


def test_correlation_leaves_out_unknown_values():
    found = correlation([0.1, 0.2, 0.3, 0.9], [1.0, 2.0, 3.0, None])
    assert (found["rho"], found["n"]) == (1.0, 3)
    assert correlation([0.1, 0.2, 0.3], [1.0, None, None]) is None
    assert correlation([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]) is None


def test_ratio_of_one_unit_or_of_equal_units_has_no_interval():
    assert ratio_interval(np.array([1.0]), np.array([2.0]), seed=0) is None
    assert ratio_interval(np.array([1.0, 2.0]), np.array([2.0, 4.0]), seed=0) is None
    assert ratio_interval(np.array([0.0, 0.0]), np.array([0.0, 0.0]), seed=0) is None


def test_ratio_is_resampled_by_units_that_keep_part_and_whole_together():
    wholes = np.geomspace(1, 1000, 200)
    parts = wholes * np.where(np.arange(200) % 2, 0.45, 0.55)  # the sizes differ widely, and the ratios are near 1/2
    low, high = ratio_interval(parts, wholes, seed=0)
    assert 0.48 < low < high < 0.52


def test_interval_is_shown_in_the_format_of_its_numbers_or_as_missing():
    assert interval_text((0.3006, 0.9544), ".3f") == "[0.301, 0.954]"
    assert interval_text([-0.01, 0.2], "+.3f") == "[-0.010, +0.200]"
    assert interval_text(None, ".1%") == "(no interval)"
