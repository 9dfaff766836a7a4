"""Detection of rocks from statistics per token type."""

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
    top_k, exclude_most_frequent = _check(stats, before, top_k, min_persistence, exclude_most_frequent)
    stats = stats.copy()
    mean_kl = stats.mean_kl
    earlier = None if before is None else before.copy().mean_kl

    score = torch.where(stats.count > 0, mean_kl * stats.seen, 0.0)
    candidate = (score > 0) & named_types(stats)
    if earlier is not None:
        # The earlier mean of a type that was not measured is NaN, and no comparison with NaN is true.
        candidate &= ~(mean_kl < min_persistence * earlier)
    most_frequent = torch.sort(stats.seen, descending=True, stable=True).indices[:exclude_most_frequent]
    candidate[most_frequent] = False

    order = torch.sort(score.where(candidate, -1.0), descending=True, stable=True).indices
    found = min(top_k, int(candidate.sum()))
    method = {
        "score": "aggregate",
        "top_k": top_k,
        "tau_pre": None,
        "tau_post": None,
        "window": None,
        "gamma": None,
        "eta": None,
        "min_persistence": None if before is None else float(min_persistence),
        "exclude_most_frequent": exclude_most_frequent,
    }
    return RockSet(
        rocks=[_rock(id, stats, mean_kl, score, earlier) for id in order[:found].tolist()],
        tokenizer=tokenizer_section(stats.measure.get("tokenizer")),
        measure={key: value for key, value in stats.measure.items() if key != "tokenizer"},
        method=method,
        corpus={"rollouts": None, "tokens": int(stats.seen.sum()), "kl_sum": float(score.sum())},
    )


def _check(
    stats: TokenStats, before: TokenStats | None, top_k: int, min_persistence: float, exclude_most_frequent: int
) -> tuple[int, int]:
    """Return `top_k` and `exclude_most_frequent` as Python integers, or raise `ValueError`."""
    for name, value in (("top_k", top_k), ("exclude_most_frequent", exclude_most_frequent)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if top_k < 1:
        raise ValueError(f"top_k is a number of rocks and must be at least 1, got {top_k}.")
    if not 0.0 <= min_persistence < float("inf"):
        raise ValueError(
            f"min_persistence is a share of the earlier divergence and must be finite and at least 0, got "
            f"{min_persistence}."
        )
    if exclude_most_frequent < 0:
        raise ValueError(
            f"exclude_most_frequent is a number of types and must be at least 0, got {exclude_most_frequent}."
        )

    finite = stats.kl_sum.isfinite() & stats.entropy_sum.isfinite()
    if not finite.all():
        raise ValueError(
            "The statistics hold sums that are not finite, so the types cannot be ranked. Collect the statistics again."
        )
    if missing := {"divergence", "temperature"} - set(stats.measure):
        raise ValueError(
            f"The statistics do not say what they measured: {min(missing)} is missing. Add it to their `measure`."
        )
    if before is not None:
        if before.vocab_size != stats.vocab_size:
            raise ValueError(
                f"`before` has {before.vocab_size} vocabulary entries, the statistics {stats.vocab_size}, so their ids "
                "cannot be compared. Pass statistics of one model."
            )
        require_same_measure(stats.measure, before.measure, ignore=("student",))
    return operator.index(top_k), operator.index(exclude_most_frequent)


def _rock(id: int, stats: TokenStats, mean_kl: torch.Tensor, score: torch.Tensor, earlier: torch.Tensor | None) -> Rock:
    known = earlier is not None and not earlier[id].isnan()
    return Rock(
        id=id,
        text=None,
        count=int(stats.seen[id]),
        mean_kl=float(mean_kl[id]),
        score=float(score[id]),
        mean_kl_pre=float(earlier[id]) if known else None,
    )
