"""Controls: token types that are not rocks and together occur as often as the rocks; texts of rocks and controls."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..artefacts.token_stats import TokenStats
from .rock_set import Controls, RockSet

# Controls match when their token mass is within 5 % of the rocks'.
MASS_TOLERANCE = 0.05


def mass_matched_controls(stats: TokenStats, rocks: RockSet | Sequence[int] | torch.Tensor, seed: int) -> Controls:
    """Return types that are not rocks and together occur as often, so that freezing either set drops as many positions.

    Walks the types that occur in a seeded random order, skips each type that would bring the mass above 1.05 of the
    rocks' mass, and stops at 0.95 of it. Rocks are the frequent types, so they cannot be matched type by type.

    Args:
        stats (`TokenStats`): Statistics of the rollouts that the rocks were chosen from.
        rocks (`RockSet` or ids): The rocks.
        seed (`int`): Seed of the order.

    Returns:
        `Controls`: `matched` is false if the walk ended below 0.95.

    Raises:
        `ValueError`: if no rock occurs in the statistics, an id is outside their vocabulary or repeated, or the seed is
            not a whole number of at least 0.
    """
    ids = _ids(rocks, stats.vocab_size)
    seen = stats.seen.cpu()
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= operator.index(seed) < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}.")
    seed = operator.index(seed)

    wanted = int(seen[ids].sum())
    if wanted == 0:
        raise ValueError(
            "No rock occurs in the statistics, so there is no token mass to match. Pass the statistics that the rocks "
            "were chosen from."
        )
    least = (1 - MASS_TOLERANCE) * wanted
    most = (1 + MASS_TOLERANCE) * wanted

    free = (seen > 0) & named_types(stats)
    free[ids] = False
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    order = order[free[order]]
    chosen = []
    mass = 0
    for id, count in zip(order.tolist(), seen[order].tolist(), strict=True):
        if mass + count > most:
            continue
        chosen.append(id)
        mass += count
        if mass >= least:
            break
    return Controls(ids=chosen, mass_ratio=mass / wanted, matched=mass >= least, seed=seed)


def with_texts(rock_set: RockSet, tokenizer) -> RockSet:
    """Return the rock set with the text of every rock and control, as `tokenizer` decodes it."""
    rocks = [dataclasses.replace(rock, text=tokenizer.decode([rock.id])) for rock in rock_set.rocks]
    controls = rock_set.controls
    if controls is not None:
        texts = [tokenizer.decode([id]) for id in controls.ids]
        controls = dataclasses.replace(controls, texts=texts)
    return dataclasses.replace(rock_set, rocks=rocks, controls=controls)


def named_types(stats: TokenStats) -> torch.Tensor:
    """Return which ids have a token, bool, `(V,)`; the rows of the embedding beyond the tokenizer are only padding."""
    size = tokenizer_section(stats.measure.get("tokenizer"))["vocab_size"]
    if not isinstance(size, int):
        size = stats.vocab_size
    # A size read from a file may be negative or too large for an int64.
    size = max(0, min(size, stats.vocab_size))
    return torch.arange(stats.vocab_size) < size


def _ids(rocks: RockSet | Sequence[int] | torch.Tensor, vocab_size: int) -> torch.Tensor:
    ids = rocks.ids if isinstance(rocks, RockSet) else torch.as_tensor(rocks).cpu()
    if ids.numel() == 0:
        ids = ids.long()
    if ids.ndim != 1 or ids.dtype == torch.bool or ids.is_floating_point():
        raise ValueError(
            f"The rocks must be ids, whole numbers of shape (K,), got {ids.dtype} of shape {tuple(ids.shape)}."
        )
    if outside := [id for id in ids.tolist() if not 0 <= id < vocab_size]:
        raise ValueError(
            f"Rock id {outside[0]} is outside the {vocab_size} vocabulary entries of the statistics. Pass rocks and "
            "statistics of one tokenizer."
        )
    if len(ids.unique()) < len(ids):
        raise ValueError("The rocks contain an id twice. Pass each id once.")
    return ids.long()


def tokenizer_section(known: Any) -> dict[str, Any]:
    """Return the tokenizer section of a rock set: the entries that the statistics know, and null for the others."""
    if not isinstance(known, dict):
        known = {"name": known}
    return {key: known.get(key) for key in ("name", "vocab_size", "fingerprint")}
