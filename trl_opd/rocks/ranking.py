"""Ranking of the token types in files of occurrences, and the number of rocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .corpus import Corpus
from .cutoff import LEAST_JACCARD, Sweep, rank_ids, sweep_cutoffs
from .recurrence import ContextSettings, TypeStatistics, measure_types

DEFAULT_TOP_K = 100


@dataclass(frozen=True)
class Scorer:
    """Function from the corpora of one or two students to the score of every type, `(V,)`.

    Args:
        context (`bool`): Whether the score is R(v) x CCR(v) instead of R(v).
        settings (`ContextSettings`): Parameters of the context filter.
        vocab_size (`int`): V; above every id.
        named (`int`): Number of ids, from 0, that have a token; the rows from there on only pad the embedding.
    """

    context: bool
    settings: ContextSettings
    vocab_size: int
    named: int

    def measure(self, corpora: Sequence[Corpus]) -> list[TypeStatistics]:
        """Return the statistics of the types in each corpus."""
        return [measure_types(corpus, self.settings, self.vocab_size, context=self.context) for corpus in corpora]

    def score(self, statistics: Sequence[TypeStatistics]) -> np.ndarray:
        """Return the smallest score of each type over the corpora, `(V,)`."""
        scores = [found.context_score if self.context else found.kl_sum for found in statistics]
        least = np.minimum.reduce(scores)
        # Padding rows of the embedding have no token, so freezing them would do nothing.
        least[self.named :] = 0
        return least

    def __call__(self, corpora: Sequence[Corpus]) -> np.ndarray:
        return self.score(self.measure(corpora))


def scorer_for(corpora: Sequence[Corpus], settings: ContextSettings, *, context: bool, named: int | None) -> Scorer:
    """Return the function that scores the types of these corpora; without `named` every id has a token."""
    largest = max(corpus.token_id.max() for corpus in corpora)
    vocab_size = 1 + int(largest)
    if named is None:
        named = vocab_size
    return Scorer(context=context, settings=settings, vocab_size=vocab_size, named=named)


@dataclass(frozen=True)
class Ranking:
    """The types of the selecting half, ranked by their scores.

    Args:
        context (`bool`): Whether the score is R(v) x CCR(v) instead of R(v).
        statistics (`list[TypeStatistics]`): Statistics of the types in each corpus.
        scores (`np.ndarray`): Score of every type, `(V,)`.
        order (`np.ndarray`): Ids of the types with a positive score, in rank order.
        limit (`int`): Largest number of rocks.
        sweep (`Sweep`, *optional*): The sweep that chose the limit, for `top_k="auto"` only.
    """

    context: bool
    statistics: list[TypeStatistics]
    scores: np.ndarray
    order: np.ndarray
    limit: int
    sweep: Sweep | None

    @property
    def first(self) -> TypeStatistics:
        """Statistics of the first corpus, which the rock set reports."""
        return self.statistics[0]

    @property
    def rocks(self) -> np.ndarray:
        """Ids of the rocks in rank order, `(K,)`."""
        return self.order[: self.limit]

    @property
    def stages(self) -> list[tuple[str, int]]:
        """Name of each stage and number of types left after it, from all types to the rocks."""
        scored = len(self.order)
        stages = [("types in the half of the prompts that selects", self.first.types)]
        if self.context:
            # With two files a type must have the occurrences in both.
            persistent = np.minimum.reduce([found.persistent for found in self.statistics])
            one = int((persistent >= 1).sum())
            two = int((persistent >= 2).sum())
            stages.append(("with at least one persistent occurrence", one))
            stages.append(("with at least two persistent occurrences", two))
            stages.append(("with a persistent occurrence in recurring surroundings", scored))
        else:
            stages.append(("with a divergence above 0", scored))

        stages.append(("rocks: the highest scores", len(self.rocks)))
        return stages


def rank_types(corpora: Sequence[Corpus], scorer: Scorer, top_k: int | str | None) -> Ranking:
    """Return the ranked types, or raise `ValueError` if none has a positive score or there is no valid cutoff."""
    statistics = scorer.measure(corpora)
    scores = scorer.score(statistics)
    sweep = None
    if top_k == "auto":
        sweep = sweep_cutoffs(corpora, scorer, seed=scorer.settings.seed)
    ranking = Ranking(
        context=scorer.context,
        statistics=statistics,
        scores=scores,
        order=rank_ids(scores),
        limit=_limit(top_k, statistics[0].types, sweep),
        sweep=sweep,
    )
    if len(ranking.order) == 0:
        raise ValueError(_nothing_left(ranking, scorer.settings))
    return ranking


def _limit(top_k: int | str | None, types: int, sweep: Sweep | None) -> int:
    """Return the largest number of rocks, or raise `ValueError` if no cutoff is stable or there are fewer types."""
    if sweep is not None:
        return _stable_cutoff(sweep)
    if top_k is None:
        return min(DEFAULT_TOP_K, types)
    if top_k > types:
        raise ValueError(
            f"--top_k {top_k} is more than the {types} token types in the half of the prompts that selects rocks. Pass "
            "a smaller number, or collect more prompts."
        )
    return top_k


def _stable_cutoff(sweep: Sweep) -> int:
    if sweep.top_k is None:
        size = max(sweep.stability)
        overlap = sweep.stability[size][0]
        raise ValueError(
            f"--top_k auto found no stable cutoff: the {sweep.cutoffs[0]} highest types of {size} rollouts overlap "
            f"by only {overlap:.2f} (Jaccard) with those of {size} other rollouts, and {LEAST_JACCARD} is needed. "
            "Collect more prompts, or pass a number as --top_k."
        )
    return sweep.top_k


def _nothing_left(ranking: Ranking, settings: ContextSettings) -> str:
    left = ", ".join(f"{count} {stage}" for stage, count in ranking.stages[:-1])
    if not ranking.context:
        return f"No token type is left: {left}. Check that the occurrences compare two different models."

    statistics = ranking.first
    taus = f"tau_post {statistics.tau_post:.4g} nats"
    if statistics.tau_pre is not None:
        taus = f"tau_pre {statistics.tau_pre:.4g} and {taus}"
    return (
        f"No token type is left: {left} ({taus}, window {settings.window}, gamma {settings.gamma}, eta "
        f"{settings.eta}). Lower the thresholds, or use --score aggregate."
    )
