"""Intervals of accuracies and of their differences, on SciPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000
# Of shares over prompts, whose interval nobody decides by.
SHARE_RESAMPLES = 2_000


def accuracy_interval(correct: Sequence[bool], confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of the share of problems that were solved.

    Raises:
        `ValueError`: if there is no problem.
    """
    if len(correct) == 0:
        raise ValueError("An accuracy needs at least one problem.")
    interval = stats.binomtest(int(sum(correct)), len(correct)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(
    correct: Sequence[bool], baseline: Sequence[bool], *, seed: int, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """Return the difference of two accuracies on the same problems, and its bootstrap interval over the problems.

    The percentile interval of 10 000 resamples. It covers the choice of problems, not that of the training seed. `None`
    where all differences are equal: resampling then says nothing.

    Raises:
        `ValueError`: if the two are not of the same problems.
    """
    if len(correct) != len(baseline) or len(correct) == 0:
        raise ValueError(
            f"A paired difference needs the same problems, at least one, got {len(correct)} and {len(baseline)}."
        )
    difference = np.asarray(correct, dtype=float) - np.asarray(baseline, dtype=float)
    estimate = float(difference.mean())
    if np.ptp(difference) == 0.0:
        return estimate, None
    return estimate, _bootstrap_mean(difference, seed, confidence)


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
    array = np.asarray(values, dtype=float)
    return float(array.mean()), None if np.ptp(array) == 0.0 else _bootstrap_mean(array, seed, confidence)


def _bootstrap_mean(values: np.ndarray, seed: int, confidence: float) -> tuple[float, float]:
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,  # resamples in memory at once
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


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

    result = stats.bootstrap(
        (np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)),
        ratio,
        paired=True,
        n_resamples=SHARE_RESAMPLES,
        batch=max(1, 2**16 // len(parts)),  # resamples in memory at once
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
