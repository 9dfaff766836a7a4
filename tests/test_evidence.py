"""Statistics of the probe: exact where they say so, calibrated under no effect, and with the power that is claimed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trl_opd.statistics import (
    ALPHA,
    LEAST_EFFECT,
    benjamini_hochberg,
    bootstrap_means,
    correlation,
    effect_of,
    holm,
    label,
    mcnemar,
    minimal_effect,
    problems_for,
    rocks_against_controls,
    sign_flips,
)

CANDIDATES, RUNS = 200, 400


@given(better=st.integers(0, 60), worse=st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs(better, worse):
    expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert mcnemar(np.array(better), np.array(worse)) == pytest.approx(expected)


@given(values=st.lists(st.sampled_from([-1.5, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=9))
def test_few_sign_flips_are_all_of_them(values):
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = np.mean([flip >= abs(sum(values)) - 1e-9 for flip in flips])
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
def test_an_effect_tells_what_changed(binary):
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


def test_an_arm_that_changes_nothing_has_no_interval():
    found = effect_of([1.0, 0.0], [1.0, 0.0], seed=0)
    assert (found.estimate, found.ci95, found.p, found.p_bootstrap) == (0.0, None, 1.0, 1.0)
    with pytest.raises(ValueError, match="needs the same problems"):
        effect_of([1.0], [1.0, 0.0], seed=0)


def test_corrections_are_those_of_their_authors():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, 0.04, 0.02])
    assert len(holm([])) == len(benjamini_hochberg([])) == 0
    many = np.random.default_rng(0).random(50)
    assert (holm(many) >= benjamini_hochberg(many)).all()
    assert (benjamini_hochberg(many) >= many).all()


@pytest.mark.parametrize(
    ("estimate", "p", "expected"),
    [
        (-0.01, 0.05, "pillar"),
        (0.01, 0.05, "stumbling"),
        (-0.009, 0.001, "neutral"),
        (-0.2, 0.051, "neutral"),
        (0.0, 1.0, "neutral"),
    ],
)
def test_a_label_needs_size_and_significance(estimate, p, expected):
    assert label(estimate, p) == expected


def simulate(problems: int, discordance: float, effects: np.ndarray, seed: int) -> np.ndarray:
    """Return which candidates get a label after correction, `(runs, candidates)`."""
    rng = np.random.default_rng(seed)
    discordant = rng.binomial(problems, np.maximum(discordance, np.abs(effects)), size=(RUNS, len(effects)))
    better = rng.binomial(discordant, 0.5 * (1 + effects / np.maximum(discordance, np.abs(effects))))
    p = stats.false_discovery_control(mcnemar(better, discordant - better), axis=1)
    estimate = (2 * better - discordant) / problems
    return (p <= ALPHA) & (np.abs(estimate) >= LEAST_EFFECT)


@pytest.mark.parametrize("discordance", [0.01, 0.02, 0.04, 0.10])
def test_without_an_effect_a_corrected_hit_is_rare(discordance):
    hits = simulate(500, discordance, np.zeros(CANDIDATES), seed=7).any(axis=1)
    assert hits.mean() <= 0.05


@pytest.mark.parametrize("discordance", [0.04, 0.07, 0.10])
def test_effects_of_three_hundredths_are_found_with_two_thousand_problems(discordance):
    effects = np.zeros(CANDIDATES)
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


def test_a_correlation_leaves_out_what_is_not_known():
    found = correlation([0.1, 0.2, 0.3, 0.9], [1.0, 2.0, 3.0, None])
    assert (found["rho"], found["n"]) == (1.0, 3)
    assert correlation([0.1, 0.2, 0.3], [1.0, None, None]) is None
    assert correlation([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]) is None
