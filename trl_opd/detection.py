"""Statistics per token type -> rocks, and controls that occur as often."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch

from .rock_set import Controls, Rock, RockSet
from .token_stats import TokenStats, require_same_measure

# A control's token mass lies within 5 % of the rocks'.
MASS_TOLERANCE = 0.05


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
    candidate = (score > 0) & _named(stats)
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
        tokenizer=_tokenizer(stats.measure.get("tokenizer")),
        measure={key: value for key, value in stats.measure.items() if key != "tokenizer"},
        method=method,
        corpus={"rollouts": None, "tokens": int(stats.seen.sum()), "kl_sum": float(score.sum())},
    )


def mass_matched_controls(stats: TokenStats, rocks: RockSet | Sequence[int] | torch.Tensor, seed: int) -> Controls:
    """Return types that are no rocks and together occur as often: freezing either leaves out as many positions.

    Walks the types that occur in a seeded order, skips one that would exceed 1.05 of the rocks' mass, and stops at 0.95
    of it. Rocks are the frequent types, so no match type by type exists.

    Args:
        stats (`TokenStats`): Counts of the rollouts that chose the rocks.
        rocks (`RockSet` or ids): The rocks.
        seed (`int`): Seed of the order.

    Returns:
        `Controls`: `matched` is false where the walk ended below 0.95.

    Raises:
        `ValueError`: if no rock occurs in the statistics, or an id is none of theirs or stands twice.
    """
    ids, seen = _ids(rocks, stats.vocab_size), stats.seen.cpu()
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= operator.index(seed) < 2**63:
        raise ValueError(f"seed must be a whole number, at least 0, got {seed!r}.")
    seed = operator.index(seed)
    wanted = int(seen[ids].sum())
    if wanted == 0:
        raise ValueError("No rock occurs in the statistics, so there is no token mass to match.")
    free = (seen > 0) & _named(stats)
    free[ids] = False
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    chosen, mass = [], 0
    order = order[free[order]]
    for id, count in zip(order.tolist(), seen[order].tolist(), strict=True):
        if mass + count > (1 + MASS_TOLERANCE) * wanted:
            continue
        chosen.append(id)
        mass += count
        if mass >= (1 - MASS_TOLERANCE) * wanted:
            break
    return Controls(chosen, mass / wanted, mass >= (1 - MASS_TOLERANCE) * wanted, seed)


def with_texts(rock_set: RockSet, tokenizer) -> RockSet:
    """Return the rock set with the text of every rock and control, as `tokenizer` decodes it."""
    rocks = [dataclasses.replace(rock, text=tokenizer.decode([rock.id])) for rock in rock_set.rocks]
    controls = rock_set.controls
    if controls is not None:
        controls = dataclasses.replace(controls, texts=[tokenizer.decode([id]) for id in controls.ids])
    return dataclasses.replace(rock_set, rocks=rocks, controls=controls)


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


def _named(stats: TokenStats) -> torch.Tensor:
    """Return which entries the tokenizer has a token for; the rows beyond pad the embedding."""
    known = _tokenizer(stats.measure.get("tokenizer"))["vocab_size"]
    size = max(0, min(known, stats.vocab_size)) if isinstance(known, int) else stats.vocab_size  # of whatever size
    return torch.arange(stats.vocab_size) < size


def _ids(rocks: RockSet | Sequence[int] | torch.Tensor, vocab_size: int) -> torch.Tensor:
    ids = rocks.ids if isinstance(rocks, RockSet) else torch.as_tensor(rocks).cpu()
    if ids.numel() == 0:
        ids = ids.long()
    if ids.ndim != 1 or ids.dtype == torch.bool or ids.is_floating_point():
        raise ValueError(f"The rocks must be ids of shape (K,), got {ids.dtype} of shape {tuple(ids.shape)}.")
    if outside := [id for id in ids.tolist() if not 0 <= id < vocab_size]:
        raise ValueError(f"Rock id {outside[0]} is none of the {vocab_size} vocabulary entries of the statistics.")
    if len(ids.unique()) < len(ids):
        raise ValueError("A rock id stands twice.")
    return ids.long()


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


def _tokenizer(known: Any) -> dict[str, Any]:
    """Return the tokenizer section of a rock set: what the statistics know of it, null for the rest."""
    known = known if isinstance(known, dict) else {"name": known}
    return {key: known.get(key) for key in ("name", "vocab_size", "fingerprint")}
