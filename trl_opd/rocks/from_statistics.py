"""Statistics per token type -> rocks, and controls that occur as often."""

from __future__ import annotations

import operator

import torch

from ..artefacts.token_stats import TokenStats, require_same_measure
from .controls import named_types, tokenizer_section
from .rock_set import Rock, RockSet


def detect_rocks(
    stats: TokenStats,
    before: TokenStats | None = None,
    *,
    top_k: int = 100,
    min_persistence: float = 0.8,
    exclude_most_frequent: int = 0,
) -> RockSet:
    """Return the `top_k` types of the largest aggregate score R(v) = mean divergence x count that persist.

    arXiv:2605.09253, stage A. The list is shorter where fewer types persist and score above 0. Ties break by id.

    Args:
        stats (`TokenStats`): Statistics of the last rollouts.
        before (`TokenStats`, *optional*):
            Statistics of the first rollouts. A type whose mean divergence has since fallen below `min_persistence` of
            its value there is no rock; a type that did not occur there is not judged.
        top_k (`int`, *optional*, defaults to `100`): Largest number of rocks.
        min_persistence (`float`, *optional*, defaults to `0.8`): See `before`.
        exclude_most_frequent (`int`, *optional*, defaults to `0`):
            Types to leave out, the most frequent first (one of the authors' scripts leaves out 5).

    Returns:
        `RockSet`: without `controls`, `heldout` and texts (`with_texts` adds those).

    Raises:
        `ValueError`: if an argument is out of its range, or the statistics measured different things.
    """
    top_k, exclude_most_frequent = _check(stats, before, top_k, min_persistence, exclude_most_frequent)
    stats = stats.copy()
    mean_kl = stats.mean_kl
    earlier = None if before is None else before.copy().mean_kl
    score = torch.where(stats.count > 0, mean_kl * stats.seen, 0.0)
    candidate = (score > 0) & named_types(stats)
    if earlier is not None:
        candidate &= ~(mean_kl < min_persistence * earlier)  # NaN, where the type did not occur, is not below
    most_frequent = torch.sort(stats.seen, descending=True, stable=True).indices[:exclude_most_frequent]
    candidate[most_frequent] = False
    order = torch.sort(score.where(candidate, -1.0), descending=True, stable=True).indices
    order = order[: min(top_k, int(candidate.sum()))]
    method = {"score": "aggregate", "top_k": top_k, **dict.fromkeys(("tau_pre", "tau_post", "window", "gamma", "eta"))}
    method["min_persistence"] = None if before is None else float(min_persistence)
    method["exclude_most_frequent"] = exclude_most_frequent
    return RockSet(
        rocks=[_rock(id, stats, mean_kl, score, earlier) for id in order.tolist()],
        tokenizer=tokenizer_section(stats.measure.get("tokenizer")),
        measure={key: value for key, value in stats.measure.items() if key != "tokenizer"},
        method=method,
        corpus={"rollouts": None, "tokens": int(stats.seen.sum()), "kl_sum": float(score.sum())},
    )


def _check(
    stats: TokenStats, before: TokenStats | None, top_k: int, min_persistence: float, exclude_most_frequent: int
) -> tuple[int, int]:
    """Return the two counts as plain numbers, or raise `ValueError`."""
    for name, value in (("top_k", top_k), ("exclude_most_frequent", exclude_most_frequent)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if top_k < 1:
        raise ValueError(f"top_k counts rocks, at least 1, got {top_k}.")
    if not 0.0 <= min_persistence < float("inf"):
        raise ValueError(f"min_persistence is a share of the earlier divergence, at least 0, got {min_persistence}.")
    if exclude_most_frequent < 0:
        raise ValueError(f"exclude_most_frequent counts types, at least 0, got {exclude_most_frequent}.")
    if not all(sums.isfinite().all() for sums in (stats.kl_sum, stats.entropy_sum)):
        raise ValueError("The statistics hold sums that are not finite.")
    if missing := {"divergence", "temperature"} - set(stats.measure):
        raise ValueError(f"The statistics do not say what they measured: {min(missing)} is missing.")
    if before is not None:
        if before.vocab_size != stats.vocab_size:
            raise ValueError(f"`before` has {before.vocab_size} vocabulary entries, the statistics {stats.vocab_size}.")
        require_same_measure(stats.measure, before.measure, ignore=("student",))
    return operator.index(top_k), operator.index(exclude_most_frequent)


def _rock(id: int, stats: TokenStats, mean_kl: torch.Tensor, score: torch.Tensor, earlier: torch.Tensor | None) -> Rock:
    known = earlier is not None and not bool(earlier[id].isnan())
    return Rock(
        id=id,
        text=None,
        count=int(stats.seen[id]),
        mean_kl=float(mean_kl[id]),
        score=float(score[id]),
        mean_kl_pre=float(earlier[id]) if known else None,
    )
