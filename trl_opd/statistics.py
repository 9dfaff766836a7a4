"""Confidence intervals, paired tests, corrections for multiple tests, and statistical power, based on SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Number of resamples for the interval of a mean; the smallest two-sided p of a bootstrap is then 2e-4.
RESAMPLES = 10_000
# Number of resamples for the interval of a share of tokens: fewer, because it is only printed, with three digits.
SHARE_RESAMPLES = 2_000
# Number of draws of random signs; the smallest p is then 1e-5, below Holm's first threshold for thousands of tests.
FLIPS = 100_000
# A token gets a label if forbidding it changes the mean reward at this level and by at least this much
# (arXiv:2605.09253).
ALPHA = 0.05
LEAST_EFFECT = 0.01
# Probability that a test finds the smallest detectable effect.
POWER = 0.8


def accuracy_interval(correct: Sequence[bool], confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's confidence interval of the share of problems that were solved.

    Raises:
        `ValueError`: if there is no problem.
    """
    problems = len(correct)
    if problems == 0:
        raise ValueError("The accuracy on 0 problems is undefined. Pass the results of at least one problem.")

    solved = int(sum(correct))
    test = stats.binomtest(solved, problems)
    interval = test.proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(
    values: Sequence[float], *, seed: int, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """Return the mean of rewards and its confidence interval.

    The interval is Wilson's if every reward is 0 or 1. Otherwise it is the percentile interval of 10 000 resamples of
    the problems, and `None` if all rewards are equal.

    Raises:
        `ValueError`: if there is no reward.
    """
    if set(values) <= {0.0, 1.0}:
        interval = accuracy_interval(values, confidence)
        accuracy = sum(values) / len(values)
        return accuracy, interval

    rewards = np.asarray(values, dtype=float)
    return _mean_with_interval(rewards, seed=seed, confidence=confidence)


def paired_difference(
    correct: Sequence[bool], baseline: Sequence[bool], *, seed: int, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """Return the difference of two accuracies on the same problems, and its bootstrap interval over the problems.

    The interval is the percentile interval of 10 000 resamples. It accounts for the choice of problems, but not for the
    training seed. It is `None` if all differences are equal, because then all resamples are equal, too.

    Raises:
        `ValueError`: if the two differ in length, or are empty.
    """
    differences = _paired_differences("A paired difference", correct, baseline)
    return _mean_with_interval(differences, seed=seed, confidence=confidence)


def ratio_interval(
    parts: np.ndarray, wholes: np.ndarray, *, seed: int, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Return the bootstrap interval of `sum(parts) / sum(wholes)` over units, such as prompts.

    This is the percentile interval of 2 000 resamples of the units. It is `None` if resampling cannot change the ratio:
    there are fewer than two units, all units have the same ratio, or the wholes sum to 0.

    Args:
        parts, wholes (`np.ndarray`): Each unit's part of the numerator and of the denominator, float64, `(N,)`.
        seed (`int`): Seed of the resamples.
        confidence (`float`, *optional*, defaults to `0.95`): Confidence level.
    """
    total_part = parts.sum()
    total_whole = wholes.sum()
    if len(parts) < 2 or total_whole <= 0:
        return None
    # The units have one ratio if all these deviations are equal.
    deviations = parts * total_whole - wholes * total_part
    if np.ptp(deviations) == 0:
        return None

    def ratio(part: np.ndarray, whole: np.ndarray, axis: int) -> np.ndarray:
        numerator = part.sum(axis)
        denominator = whole.sum(axis)
        zeros = np.zeros_like(denominator)
        return np.divide(numerator, denominator, out=zeros, where=denominator > 0)

    in_memory = max(1, 2**16 // len(parts))
    return _bootstrap_interval(
        (parts, wholes), ratio, resamples=SHARE_RESAMPLES, in_memory=in_memory, seed=seed, confidence=confidence
    )


def interval_text(interval: Sequence[float] | None, form: str) -> str:
    """Return an interval as text for reports and tables: `[0.30, 0.95]`, or `(no interval)` for `None`.

    Args:
        interval (`Sequence[float]`, *optional*): The lower and the upper end.
        form (`str`): Python's format of both numbers, for example ".3f", "+.3f" or ".1%".
    """
    if interval is None:
        return "(no interval)"
    low, high = interval
    return f"[{low:{form}}, {high:{form}}]"


@dataclass(frozen=True)
class Effect:
    """Effect of an arm on the mean reward, compared with a baseline on the same problems.

    Args:
        estimate (`float`): Mean reward of the arm minus that of the baseline.
        ci95 (`tuple[float, float]`, *optional*):
            Interval of the paired bootstrap over problems; `None` if no reward changed.
        better, worse (`int`): Number of problems whose reward rose, and whose reward fell.
        p (`float`):
            Two-sided p: of McNemar's exact test if all rewards are 0 or 1, otherwise of random sign flips.
        p_bootstrap (`float`): Two-sided p of the paired bootstrap, used only for the label as the paper defines it.
    """

    estimate: float
    ci95: tuple[float, float] | None
    better: int
    worse: int
    p: float
    p_bootstrap: float


def effect_of(rewards: Sequence[float], baseline: Sequence[float], *, seed: int) -> Effect:
    """Return the effect of an arm with these rewards, compared with a baseline on the same problems.

    Raises:
        `ValueError`: if the two differ in length, or are empty.
    """
    differences = _paired_differences("An effect", rewards, baseline)
    better = int((differences > 0).sum())
    worse = int((differences < 0).sum())
    if better + worse == 0:
        return Effect(estimate=0.0, ci95=None, better=0, worse=0, p=1.0, p_bootstrap=1.0)

    is_binary = set(rewards).union(baseline) <= {0.0, 1.0}
    p = float(mcnemar(better, worse)) if is_binary else sign_flips(differences, seed=seed)

    means = bootstrap_means(differences, seed=seed)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    not_above = float((means <= 0).mean())
    not_below = float((means >= 0).mean())
    one_sided = max(min(not_above, not_below), 1 / RESAMPLES)
    return Effect(
        estimate=float(differences.mean()),
        ci95=(low, high),
        better=better,
        worse=worse,
        p=p,
        p_bootstrap=min(1.0, 2 * one_sided),
    )


def mcnemar(better: np.ndarray | int, worse: np.ndarray | int) -> np.ndarray:
    """Return the two-sided p of McNemar's exact test for counts of discordant pairs, in the shape of the counts."""
    less = np.minimum(better, worse)
    one_sided = stats.binom.cdf(less, better + worse, 0.5)
    return np.minimum(1.0, 2 * one_sided)


def sign_flips(differences: np.ndarray, *, seed: int) -> float:
    """Return the two-sided p of the mean under random signs of the differences.

    It tries all sign patterns if there are at most 100 000, and otherwise draws 100 000 of them.
    """
    moved = differences[differences != 0]
    count = len(moved)
    # Sums that are equal in exact arithmetic may differ by rounding.
    rounding = 1e-12 * np.abs(moved).sum()
    least = abs(moved.sum()) - rounding

    if 2**count <= FLIPS:
        # Bit k of a pattern's number is the sign of difference k.
        patterns = np.arange(2**count)[:, None]
        bits = (patterns >> np.arange(count)) & 1
        return _count_sums(1 - 2 * bits, moved, least) / 2**count

    rng = np.random.default_rng(seed)
    in_memory = max(1, 2**22 // count)
    beyond = 0
    for first in range(0, FLIPS, in_memory):
        rows = min(in_memory, FLIPS - first)
        bits = rng.integers(2, size=(rows, count), dtype=np.int8)
        beyond += _count_sums(2 * bits - 1, moved, least)
    return (1 + beyond) / (1 + FLIPS)


def _count_sums(signs: np.ndarray, differences: np.ndarray, least: float) -> int:
    """Return how many rows of signs, `(R, N)`, give the differences, `(N,)`, a sum of at least this absolute value."""
    sums = np.abs(signs @ differences)
    return int((sums >= least).sum())


def bootstrap_means(differences: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the means of 10 000 resamples of problems, `(10 000,)`.

    A mean depends only on how often each value is drawn, so one multinomial draw replaces one draw for each problem.
    The distribution is the same. A probe needs this speed, because it resamples hundreds of arms; the intervals above
    use SciPy's bootstrap, which draws every problem.
    """
    problems = len(differences)
    values, counts = np.unique(differences, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(problems, counts / problems, size=RESAMPLES)
    return drawn @ values / problems


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Return the p values adjusted for the false discovery rate (Benjamini and Hochberg 1995)."""
    if len(p) == 0:
        return np.empty(0)
    return stats.false_discovery_control(p, method="bh")


def holm(p: Sequence[float]) -> np.ndarray:
    """Return the p values adjusted for the family-wise error rate (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    raised = p[order] * factors
    ascending = np.maximum.accumulate(raised)

    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, ascending)
    return adjusted


def label(estimate: float, p: float) -> str:
    """Return the label of a token from the effect of forbidding it.

    It is "pillar" if forbidding costs at least 0.01 of the mean reward at p <= 0.05, "stumbling" if it gains as much,
    and "neutral" otherwise.
    """
    significant = p <= ALPHA
    if significant and estimate <= -LEAST_EFFECT:
        return "pillar"
    if significant and estimate >= LEAST_EFFECT:
        return "stumbling"
    return "neutral"


def minimal_effect(problems: int, tests: int, discordance: float) -> float:
    """Return the smallest effect that one of several tests finds with power 0.8 (Bonferroni at its first threshold).

    Args:
        problems (`int`): Number of problems.
        tests (`int`): Number of tests, one for each candidate.
        discordance (`float`): Share of the problems whose reward an arm changes.
    """
    tail = ALPHA / (2 * max(tests, 1))
    of_test = stats.norm.ppf(1 - tail)
    of_power = stats.norm.ppf(POWER)
    standard_error = math.sqrt(discordance / problems)
    return float((of_test + of_power) * standard_error)


def problems_for(effect: float, tests: int, discordance: float) -> int:
    """Return the number of problems that are needed to find an effect with power 0.8."""
    ratio = minimal_effect(1, tests, discordance) / effect
    return math.ceil(ratio**2)


def rocks_against_controls(rocks: Sequence[float], controls: Sequence[float]) -> float | None:
    """Return the two-sided p of Mann and Whitney's test between the effects of rocks and those of controls.

    It is `None` if there are no rocks or no controls.
    """
    if not rocks or not controls:
        return None
    test = stats.mannwhitneyu(rocks, controls, alternative="two-sided")
    return float(test.pvalue)


def correlation(effects: Sequence[float], values: Sequence[float | None]) -> dict[str, float | int] | None:
    """Return Spearman's correlation of tokens' effects with the values that are not `None`.

    It is `None` if there are fewer than three such tokens, or if all their effects or all their values are equal,
    because the correlation with a constant is undefined.
    """
    known_effects = []
    known_values = []
    for effect, value in zip(effects, values, strict=True):
        if value is not None:
            known_effects.append(effect)
            known_values.append(value)

    is_constant = len(set(known_effects)) < 2 or len(set(known_values)) < 2
    if len(known_values) < 3 or is_constant:
        return None
    found = stats.spearmanr(known_effects, known_values)
    return {"rho": float(found.statistic), "p": float(found.pvalue), "n": len(known_values)}


def _paired_differences(what: str, values: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    """Return each problem's value minus the baseline's value, float64, `(N,)`."""
    if not len(values) == len(baseline) > 0:
        raise ValueError(
            f"{what} needs two results for each of the same problems, got {len(values)} and {len(baseline)} results. "
            "Pass both results of every problem, and at least one problem."
        )
    return np.subtract(values, baseline, dtype=float)


def _mean_with_interval(
    values: np.ndarray, *, seed: int, confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """Return the mean of values and its bootstrap interval, which is `None` if all values are equal."""
    mean = float(values.mean())
    if np.ptp(values) == 0.0:
        return mean, None
    interval = _bootstrap_interval(
        (values,), np.mean, resamples=RESAMPLES, in_memory=500, seed=seed, confidence=confidence
    )
    return mean, interval


def _bootstrap_interval(
    samples: tuple[np.ndarray, ...],
    statistic: Callable,
    *,
    resamples: int,
    in_memory: int,
    seed: int,
    confidence: float,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of samples.

    Args:
        samples (`tuple[np.ndarray, ...]`): Samples of the same units, `(N,)` each; one draw of units is used for all.
        statistic (`Callable`): Function of the samples and an axis.
        resamples (`int`): Number of resamples of the units.
        in_memory (`int`): Number of resamples that are in memory at once.
        seed (`int`): Seed of the resamples.
        confidence (`float`): Confidence level.
    """
    result = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        n_resamples=resamples,
        batch=in_memory,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)
