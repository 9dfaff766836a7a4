"""How many types are rocks: ranks, and the sweep of the cutoff K over coverage and stability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .corpus import Corpus

STEP, MOST = 10, 300
SIZES, DRAWS = (50, 100, 200), 10
LEAST_JACCARD = 0.7

# Corpora -> score of every type, `(V,)`.
Score = Callable[[Sequence[Corpus]], np.ndarray]


@dataclass(frozen=True)
class Sweep:
    """What each cutoff would mean.

    Args:
        cutoffs (`list[int]`): Values of K.
        coverage (`list[float]`): Share of the divergence that the top K carry, for each.
        stability (`dict[int, list[float]]`):
            For n rollouts, the mean overlap (Jaccard) of the top K of n with that of n others, for each K.
        top_k (`int`, *optional*): The largest K up to which every overlap is at least 0.7; `None` where there is none.
    """

    cutoffs: list[int]
    coverage: list[float]
    stability: dict[int, list[float]]
    top_k: int | None


def rank_ids(score: np.ndarray) -> np.ndarray:
    """Return the ids of positive score, the highest first, ties by id."""
    ids = np.flatnonzero(score > 0)
    return ids[np.argsort(-score[ids], kind="stable")]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of the ids in either list that are in both; 0 for two empty lists."""
    both = len(np.intersect1d(one, other))
    return both / max(len(one) + len(other) - both, 1)


def sweep_cutoffs(corpora: Sequence[Corpus], score: Score, *, seed: int) -> Sweep:
    """Return the sweep: n rollouts against n others of the same corpus, drawn ten times for each n that is available.

    A list from n rollouts is never compared with one from all of them: it is part of it.

    Args:
        corpora (`Sequence[Corpus]`): The selection half of each file; the first one's divergence is what is covered.
        score (`Score`): Scores the types.
        seed (`int`): Seed of the draws.

    Raises:
        `ValueError`: if there are fewer than 100 rollouts, or fewer than 50 types.
    """
    rollouts = min(corpus.rollouts for corpus in corpora)
    if rollouts < 2 * SIZES[0]:
        raise ValueError(
            f"--top_k auto compares {SIZES[0]} rollouts with {SIZES[0]} others, and the half that selects has "
            f"{rollouts}: collect more prompts, or name a number."
        )
    types = len(np.unique(corpora[0].token_id))
    cutoffs = list(range(STEP, min(MOST, types // 5) + 1, STEP))
    if not cutoffs:
        raise ValueError(f"--top_k auto needs at least {5 * STEP} token types, and there are {types}: name a number.")
    rng = np.random.default_rng(seed)
    stability = {}
    for size in SIZES:
        if 2 * size <= rollouts:
            draws = [_overlaps(corpora, score, size, cutoffs, rng) for _ in range(DRAWS)]
            stability[size] = np.mean(draws, axis=0).tolist()
    order = rank_ids(score(corpora))
    total = np.bincount(corpora[0].token_id, corpora[0].kl)
    covered = np.cumsum(total[order]) / max(total.sum(), np.finfo(float).tiny)
    coverage = [float(covered[min(cutoff, len(order)) - 1]) if len(order) else 0.0 for cutoff in cutoffs]
    stable = np.array(stability[max(stability)]) >= LEAST_JACCARD
    known = int(np.argmin(stable)) if not stable.all() else len(cutoffs)
    return Sweep(cutoffs, coverage, stability, cutoffs[known - 1] if known else None)


def _overlaps(
    corpora: Sequence[Corpus], score: Score, size: int, cutoffs: list[int], rng: np.random.Generator
) -> list[float]:
    """Return the overlap at each cutoff of the lists of two disjoint draws of rollouts."""
    drawn = [rng.permutation(corpus.rollouts)[: 2 * size] for corpus in corpora]
    pairs = zip(corpora, drawn, strict=True)
    halves = [(corpus.take(places[:size]), corpus.take(places[size:])) for corpus, places in pairs]
    one, other = (rank_ids(score([pair[side] for pair in halves])) for side in (0, 1))
    return [jaccard(one[:cutoff], other[:cutoff]) for cutoff in cutoffs]
