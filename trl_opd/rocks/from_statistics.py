"""Detection of rocks from statistics per token type."""

from __future__ import annotations

import math

import torch

from ..artefacts.token_stats import TokenStats, require_same_measure
from .controls import named_types, tokenizer_section, whole_number
from .rock_set import Rock, RockSet

# The parameters of the context filter, which this method does not have; the format of a rock set names them.
NO_CONTEXT_FILTER = dict.fromkeys(("tau_pre", "tau_post", "window", "gamma", "eta"))


def detect_rocks(
    stats: TokenStats,
    before: TokenStats | None = None,
    *,
    top_k: int = 100,
    min_persistence: float = 0.8,
    exclude_most_frequent: int = 0,
) -> RockSet:
    """Return the `top_k` persisting types with the largest aggregate score R(v) = mean divergence x count.

    This is stage A of arXiv:2605.09253. The list is shorter if fewer types persist and score above 0. Ties break by id.

    Args:
        stats (`TokenStats`): Statistics of the last rollouts.
        before (`TokenStats`, *optional*):
            Statistics of the first rollouts. A type whose mean divergence has since fallen below `min_persistence`
            times the earlier value is not a rock. A type that was not measured there counts as persisting.
        top_k (`int`, *optional*, defaults to `100`): Largest number of rocks.
        min_persistence (`float`, *optional*, defaults to `0.8`):
            Smallest share of its earlier mean divergence that a rock keeps; used with `before` only.
        exclude_most_frequent (`int`, *optional*, defaults to `0`):
            Number of types to leave out, the most frequent first (one script of the paper's authors leaves out 5).

    Returns:
        `RockSet`: without `controls`, `heldout` and texts (`with_texts` adds the texts).

    Raises:
        `ValueError`: if an argument is out of its range, or the statistics measured different things.
    """
    top_k = _count("top_k", top_k, least=1)
    exclude_most_frequent = _count("exclude_most_frequent", exclude_most_frequent, least=0)
    _check_persistence(min_persistence)
    _check_statistics(stats, before)

    stats = stats.copy()
    mean_kl = stats.mean_kl
    earlier = _earlier_means(stats, before)
    score = torch.where(stats.count > 0, mean_kl * stats.seen, 0.0)
    # No comparison with NaN is true, so a type without an earlier mean has not fallen.
    fell = mean_kl < min_persistence * earlier
    may_be_rock = _scored_types(stats, score, exclude_most_frequent) & ~fell

    found = min(top_k, int(may_be_rock.sum()))
    order = _ranked(score.where(may_be_rock, -1.0))
    ids = order[:found].tolist()
    measure = dict(stats.measure)
    tokenizer = measure.pop("tokenizer", None)
    return RockSet(
        rocks=[_rock(id, stats.seen, mean_kl, score, earlier) for id in ids],
        tokenizer=tokenizer_section(tokenizer),
        measure=measure,
        method={
            "score": "aggregate",
            "top_k": top_k,
            **NO_CONTEXT_FILTER,
            "min_persistence": None if before is None else float(min_persistence),
            "exclude_most_frequent": exclude_most_frequent,
        },
        corpus={"rollouts": None, "tokens": int(stats.seen.sum()), "kl_sum": float(score.sum())},
    )


def _earlier_means(stats: TokenStats, before: TokenStats | None) -> torch.Tensor:
    """Return the earlier mean divergence of each type, nats, `(V,)`; NaN for a type that was not measured."""
    if before is None:
        return torch.full_like(stats.mean_kl, math.nan)
    return before.copy().mean_kl


def _scored_types(stats: TokenStats, score: torch.Tensor, exclude_most_frequent: int) -> torch.Tensor:
    """Return which types have a token and a score above 0 and are not excluded, bool, `(V,)`."""
    scored = (score > 0) & named_types(stats)
    most_frequent = _ranked(stats.seen)[:exclude_most_frequent]
    scored[most_frequent] = False
    return scored


def _ranked(values: torch.Tensor) -> torch.Tensor:
    """Return the ids from the largest to the smallest value, ties by id, `(V,)`."""
    return torch.sort(values, descending=True, stable=True).indices


def _count(name: str, value: int, *, least: int) -> int:
    """Return an argument that counts types as a Python integer, or raise `ValueError`."""
    count = whole_number(name, value)
    if count < least:
        raise ValueError(f"{name} is a number of token types and must be at least {least}, got {count}.")
    return count


def _check_persistence(min_persistence: float) -> None:
    if not 0.0 <= min_persistence < math.inf:
        raise ValueError(
            f"min_persistence is a share of the earlier divergence and must be finite and at least 0, got "
            f"{min_persistence}."
        )


def _check_statistics(stats: TokenStats, before: TokenStats | None) -> None:
    """Raise `ValueError` if the types cannot be ranked, or cannot be compared with those of `before`."""
    finite = stats.kl_sum.isfinite() & stats.entropy_sum.isfinite()
    if not finite.all():
        raise ValueError(
            "The statistics contain sums that are not finite, so the types cannot be ranked. Collect the statistics "
            "again."
        )
    for name in ("divergence", "temperature"):
        if name not in stats.measure:
            raise ValueError(
                f"The statistics do not record what they measured: {name} is missing. Add it to their `measure`."
            )
    if before is None:
        return

    if before.vocab_size != stats.vocab_size:
        raise ValueError(
            f"`before` has {before.vocab_size} vocabulary entries, the statistics {stats.vocab_size}, so their ids "
            "cannot be compared. Pass statistics of one model."
        )
    require_same_measure(stats.measure, before.measure, ignore=("student",))


def _rock(id: int, seen: torch.Tensor, mean_kl: torch.Tensor, score: torch.Tensor, earlier: torch.Tensor) -> Rock:
    mean_kl_pre = float(earlier[id])
    return Rock(
        id=id,
        text=None,
        count=int(seen[id]),
        mean_kl=float(mean_kl[id]),
        score=float(score[id]),
        mean_kl_pre=None if math.isnan(mean_kl_pre) else mean_kl_pre,
    )
