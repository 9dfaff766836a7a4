"""Controls: types that are no rocks and together occur as often, and the texts of both."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..artefacts.token_stats import TokenStats
from .rock_set import Controls, RockSet

# A control's token mass lies within 5 % of the rocks'.
MASS_TOLERANCE = 0.05


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
    free = (seen > 0) & named_types(stats)
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


def named_types(stats: TokenStats) -> torch.Tensor:
    """Return which entries the tokenizer has a token for; the rows beyond pad the embedding."""
    known = tokenizer_section(stats.measure.get("tokenizer"))["vocab_size"]
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


def tokenizer_section(known: Any) -> dict[str, Any]:
    """Return the tokenizer section of a rock set: what the statistics know of it, null for the rest."""
    known = known if isinstance(known, dict) else {"name": known}
    return {key: known.get(key) for key in ("name", "vocab_size", "fingerprint")}
