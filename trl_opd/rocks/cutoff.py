"""Choice of the number of rocks: ranks of the types, and the coverage and stability of each cutoff K."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .corpus import Corpus

# The sweep tries K = 10, 20, ... up to 300, or up to a fifth of the types, which must then be at least 50.
STEP = 10
MOST = 300
LEAST_TYPES = 5 * STEP
# Sizes of the two draws of rollouts that are compared, and the number of such comparisons for each size.
SIZES = (50, 100, 200)
DRAWS = 10
LEAST_ROLLOUTS = 2 * SIZES[0]
# A cutoff is stable if the lists of two draws overlap by at least this much.
LEAST_JACCARD = 0.7

# Function from corpora to the score of every type, `(V,)`.
Score = Callable[[Sequence[Corpus]], np.ndarray]


@dataclass(frozen=True)
class Sweep:
    """Coverage and stability of each cutoff K.

    Args:
        cutoffs (`list[int]`): Values of K.
        coverage (`list[float]`): Share of the divergence that falls on the top K types, for each K.
        stability (`dict[int, list[float]]`):
            For each number n of rollouts and each K, the mean overlap (Jaccard) of the top K types of n rollouts with
            those of n other rollouts.
        top_k (`int`, *optional*):
            The largest K up to which every overlap at the largest n is at least 0.7; `None` if there is no such K.
    """

    cutoffs: list[int]
    coverage: list[float]
    stability: dict[int, list[float]]
    top_k: int | None


def rank_ids(score: np.ndarray) -> np.ndarray:
    """Return the ids of positive score, the highest score first, ties by id, `(K,)`."""
    ids = np.flatnonzero(score > 0)
    order = np.argsort(-score[ids], kind="stable")
    return ids[order]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of the ids in either list that are in both; 0 for two empty lists."""
    both = len(np.intersect1d(one, other))
    either = len(np.union1d(one, other))
    return both / max(either, 1)


def sweep_cutoffs(corpora: Sequence[Corpus], score: Score, *, seed: int) -> Sweep:
    """Return the coverage and the stability of each cutoff K.

    For the stability, the top K types of n rollouts are compared with those of n other rollouts of the same corpus, in
    ten draws for each n for which there are enough rollouts. A list from n rollouts is never compared with the list
    from all rollouts, because these contain the n.

    Args:
        corpora (`Sequence[Corpus]`): The selection half of each file; the coverage is that of the first one.
        score (`Score`): Scores the types.
        seed (`int`): Seed of the draws.

    Raises:
        `ValueError`: if there are fewer than 100 rollouts, or fewer than 50 types.
    """
    rollouts = min(corpus.rollouts for corpus in corpora)
    if rollouts < LEAST_ROLLOUTS:
        raise ValueError(
            f"--top_k auto compares {SIZES[0]} rollouts with {SIZES[0]} others, and the half that selects has "
            f"{rollouts}: collect more prompts, or pass a number as --top_k."
        )
    cutoffs = _cutoffs(corpora[0])

    rng = np.random.default_rng(seed)
    stability = {}
    for size in SIZES:
        if 2 * size <= rollouts:
            draws = [_overlaps(corpora, score, size, cutoffs, rng) for _ in range(DRAWS)]
            stability[size] = np.mean(draws, axis=0).tolist()

    order = rank_ids(score(corpora))
    largest = max(stability)
    return Sweep(
        cutoffs=cutoffs,
        coverage=_coverage(corpora[0], order, cutoffs),
        stability=stability,
        top_k=_largest_stable(cutoffs, stability[largest]),
    )


def _cutoffs(corpus: Corpus) -> list[int]:
    """Return the values of K to try, or raise `ValueError` if the corpus has too few types for one."""
    types = len(np.unique(corpus.token_id))
    if types < LEAST_TYPES:
        raise ValueError(
            f"--top_k auto needs at least {LEAST_TYPES} token types, and there are {types}: pass a number as --top_k."
        )
    most = min(MOST, types // 5)
    return list(range(STEP, most + 1, STEP))


def _largest_stable(cutoffs: list[int], overlaps: list[float]) -> int | None:
    """Return the last cutoff before the first overlap that is too small, or `None` if the first one is."""
    stable = None
    for cutoff, overlap in zip(cutoffs, overlaps, strict=True):
        if overlap < LEAST_JACCARD:
            break
        stable = cutoff
    return stable


def _coverage(corpus: Corpus, order: np.ndarray, cutoffs: list[int]) -> list[float]:
    """Return the share of the corpus's divergence that falls on the first K types in order, for each K."""
    total = np.bincount(corpus.token_id, corpus.kl)
    # Entry K is the divergence of the first K types.
    covered = np.append(0.0, total[order]).cumsum()
    ranks = np.minimum(cutoffs, len(order))
    # The lower limit avoids 0 / 0 if no token diverges.
    divergence = max(total.sum(), sys.float_info.min)
    shares = covered[ranks] / divergence
    return shares.tolist()


def _overlaps(
    corpora: Sequence[Corpus], score: Score, size: int, cutoffs: list[int], rng: np.random.Generator
) -> list[float]:
    """Return the overlap (Jaccard) of the ranked lists from two disjoint draws of rollouts, for each cutoff."""
    one = []
    other = []
    for corpus in corpora:
        drawn = rng.permutation(corpus.rollouts)
        one.append(corpus.take(drawn[:size]))
        other.append(corpus.take(drawn[size : 2 * size]))

    first = rank_ids(score(one))
    second = rank_ids(score(other))
    return [jaccard(first[:cutoff], second[:cutoff]) for cutoff in cutoffs]
