"""Confidence intervals, paired tests, corrections for multiple tests, and statistical power, based on SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Number of resamples for the interval of a mean; the smallest two-sided p of a bootstrap is then 2e-4.
RESAMPLES = 10_000
# Number of resamples for the interval of a share of tokens, which is only printed, with three digits.
SHARE_RESAMPLES = 2_000
# Number of draws of random signs; the smallest p is then 1e-5, below Holm's first threshold for thousands of tests.
FLIPS = 100_000
# A token gets a label at this level, and when forbidding it moves the mean reward by this much (arXiv:2605.09253).
ALPHA = 0.05
LEAST_EFFECT = 0.01
# Probability with which the smallest detectable effect is found.
POWER = 0.8


def accuracy_interval(correct: Sequence[bool], confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of the share of problems that were solved.

    Raises:
        `ValueError`: if there is no problem.
    """
    if len(correct) == 0:
        raise ValueError("An accuracy needs at least one problem.")
    interval = stats.binomtest(int(sum(correct)), len(correct)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(
    values: Sequence[float], *, seed: int, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """Return the mean of rewards and its interval: Wilson's of 0/1 rewards, else a bootstrap over the problems.

    The percentile interval of 10 000 resamples. `None` where all are equal, and not 0 or 1.

    Raises:
        `ValueError`: if there is no reward.
    """
    if set(values) <= {0.0, 1.0}:
        interval = accuracy_interval([value == 1.0 for value in values], confidence)
        return sum(values) / len(values), interval
    return _mean_with_interval(np.asarray(values, dtype=float), seed=seed, confidence=confidence)


def paired_difference(
    correct: Sequence[bool], baseline: Sequence[bool], *, seed: int, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """Return the difference of two accuracies on the same problems, and its bootstrap interval over the problems.

    The percentile interval of 10 000 resamples. It covers the choice of problems, not that of the training seed. `None`
    where all differences are equal: resampling then says nothing.

    Raises:
        `ValueError`: if the two are not of the same problems.
    """
    differences = _paired_differences("A paired difference", correct, baseline)
    return _mean_with_interval(differences, seed=seed, confidence=confidence)


def ratio_interval(
    parts: np.ndarray, wholes: np.ndarray, *, seed: int, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Return the bootstrap interval of `sum(parts) / sum(wholes)` over units, such as prompts.

    The percentile interval of 2 000 resamples of units. `None` where there is nothing to resample: fewer than two
    units, or all of one ratio.

    Args:
        parts, wholes (`np.ndarray`): What each unit adds above and below, `(N,)`.
        seed (`int`): Seed of the resamples.
    """
    if len(parts) < 2 or wholes.sum() <= 0 or np.ptp(parts * wholes.sum() - wholes * parts.sum()) == 0:
        return None

    def ratio(part: np.ndarray, whole: np.ndarray, axis: int) -> np.ndarray:
        below = whole.sum(axis)
        return np.divide(part.sum(axis), below, out=np.zeros_like(below), where=below > 0)

    samples = (np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float))
    in_memory = max(1, 2**16 // len(parts))
    return _bootstrap_interval(
        samples, ratio, resamples=SHARE_RESAMPLES, in_memory=in_memory, seed=seed, confidence=confidence
    )


def interval_text(interval: Sequence[float] | None, form: str) -> str:
    """Return an interval as reports and tables show it: `[0.30, 0.95]`, or `(no interval)`.

    Args:
        interval (`Sequence[float]`, *optional*): Its two ends.
        form (`str`): Format of a number, as Python has it: ".3f", "+.3f", ".1%".
    """
    if interval is None:
        return "(no interval)"
    low, high = interval
    return f"[{low:{form}}, {high:{form}}]"


@dataclass(frozen=True)
class Effect:
    """Effect of an arm on the mean reward, compared with a baseline on the same problems.

    Args:
        estimate (`float`): Mean reward of the arm less that of the baseline.
        ci95 (`tuple[float, float]`, *optional*): Paired bootstrap over problems; `None` where nothing changed.
        better, worse (`int`): Number of problems whose reward rose, and whose reward fell.
        p (`float`): Two-sided: McNemar's exact test, or sign flips.
        p_bootstrap (`float`): Two-sided p of the paired bootstrap, used only for the label as the paper defines it.
    """

    estimate: float
    ci95: tuple[float, float] | None
    better: int
    worse: int
    p: float
    p_bootstrap: float


def effect_of(rewards: Sequence[float], baseline: Sequence[float], *, seed: int) -> Effect:
    """Return the effect of an arm on the same problems.

    Raises:
        `ValueError`: if the two are not of the same problems.
    """
    differences = _paired_differences("An effect", rewards, baseline)
    better = int((differences > 0).sum())
    worse = int((differences < 0).sum())
    if better + worse == 0:
        return Effect(estimate=0.0, ci95=None, better=0, worse=0, p=1.0, p_bootstrap=1.0)

    all_rewards = np.concatenate([np.asarray(rewards, dtype=float), np.asarray(baseline, dtype=float)])
    if np.isin(all_rewards, (0.0, 1.0)).all():
        p = float(mcnemar(np.array(better), np.array(worse)))
    else:
        p = sign_flips(differences, seed=seed)

    means = bootstrap_means(differences, seed=seed)
    low, high = np.quantile(means, [0.025, 0.975])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    return Effect(
        estimate=float(differences.mean()),
        ci95=(float(low), float(high)),
        better=better,
        worse=worse,
        p=p,
        p_bootstrap=min(1.0, 2 * max(float(beyond), 1 / RESAMPLES)),
    )


def mcnemar(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """Return the two-sided p of McNemar's exact test for counts of discordant pairs, of any equal shape."""
    less = np.minimum(better, worse)
    return np.minimum(1.0, 2 * stats.binom.cdf(less, better + worse, 0.5))


def sign_flips(differences: np.ndarray, *, seed: int) -> float:
    """Return the two-sided p of the mean under random signs: 100 000 draws, or all of them where that is fewer."""
    moved = differences[differences != 0]
    if len(moved) == 0:
        return 1.0
    # Sums that are equal in exact arithmetic differ by rounding.
    found = abs(moved.sum()) - 1e-12 * np.abs(moved).sum()
    if 2 ** len(moved) <= FLIPS:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((np.abs(signs @ moved) >= found).mean())

    rng = np.random.default_rng(seed)
    in_memory = max(1, 2**22 // len(moved))
    beyond = 0
    for first in range(0, FLIPS, in_memory):
        count = min(in_memory, FLIPS - first)
        signs = rng.integers(2, size=(count, len(moved)), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ moved) >= found).sum())
    return (1 + beyond) / (1 + FLIPS)


def bootstrap_means(differences: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the means of 10 000 resamples of problems, `(10 000,)`.

    Only how often each value is drawn matters, so the counts of values are drawn, which is the same and takes one draw
    for a resample of problems. A probe needs the means of hundreds of arms; the intervals above take SciPy's bootstrap,
    one draw for each problem.
    """
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=RESAMPLES)
    return drawn @ values / len(differences)


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Return the p values adjusted for the false discovery rate (Benjamini and Hochberg 1995)."""
    return stats.false_discovery_control(p, method="bh") if len(p) else np.empty(0)


def holm(p: Sequence[float]) -> np.ndarray:
    """Return the p values adjusted for the family-wise error rate (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    found = np.empty(len(p))
    found[order] = adjusted
    return found


def label(estimate: float, p: float) -> str:
    """Return "pillar" where forbidding costs 0.01 or more at p <= 0.05, "stumbling" where it gains it, or "neutral"."""
    if p <= ALPHA and abs(estimate) >= LEAST_EFFECT:
        return "pillar" if estimate < 0 else "stumbling"
    return "neutral"


def minimal_effect(problems: int, tests: int, discordance: float) -> float:
    """Return the smallest effect that one of several tests finds with power 0.8 (Bonferroni at its first threshold).

    Args:
        problems (`int`): Problems.
        tests (`int`): Candidates.
        discordance (`float`): Share of the problems whose reward an arm changes.
    """
    quantiles = stats.norm.ppf(1 - ALPHA / (2 * max(tests, 1))) + stats.norm.ppf(POWER)
    return float(quantiles * math.sqrt(discordance / problems))


def problems_for(effect: float, tests: int, discordance: float) -> int:
    """Return the number of problems that are needed to find an effect with power 0.8."""
    return math.ceil((minimal_effect(1, tests, discordance) / effect) ** 2)


def rocks_against_controls(rocks: Sequence[float], controls: Sequence[float]) -> float | None:
    """Return the two-sided p of Mann and Whitney's test of rocks' against controls' effects; `None` without both."""
    if not len(rocks) or not len(controls):
        return None
    return float(stats.mannwhitneyu(rocks, controls, alternative="two-sided").pvalue)


def correlation(effects: Sequence[float], values: Sequence[float | None]) -> dict[str, float | int] | None:
    """Return Spearman's correlation of effects with the known values of tokens; `None` for fewer than three pairs."""
    known_effects = []
    known_values = []
    for effect, value in zip(effects, values, strict=True):
        if value is not None:
            known_effects.append(effect)
            known_values.append(value)

    # The correlation with a constant is undefined.
    if len(known_values) < 3 or len(set(known_effects)) < 2 or len(set(known_values)) < 2:
        return None
    found = stats.spearmanr(known_effects, known_values)
    return {"rho": float(found.statistic), "p": float(found.pvalue), "n": len(known_values)}


def _paired_differences(what: str, values: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    """Return values less those of a baseline on the same problems, `(N,)`."""
    if len(values) != len(baseline) or len(values) == 0:
        raise ValueError(f"{what} needs the same problems, at least one, got {len(values)} and {len(baseline)}.")
    return np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)


def _mean_with_interval(
    values: np.ndarray, *, seed: int, confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """Return the mean of values and its bootstrap interval, `None` where all values are equal."""
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
    """Return the percentile interval of a statistic of samples, `(N,)` each, whose units are drawn together.

    Args:
        samples (`tuple[np.ndarray, ...]`): What the statistic takes.
        statistic (`Callable`): Takes the samples and an axis.
        resamples (`int`): Resamples of units.
        in_memory (`int`): Resamples in memory at once.
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
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
