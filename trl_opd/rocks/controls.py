"""Controls: token types that are not rocks and together occur as often as the rocks; texts of rocks and controls."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..artefacts.token_stats import TokenStats
from .rock_set import Controls, RockSet

# Controls match if their token mass (their number of occurrences) is within 5 % of the rocks'.
MASS_TOLERANCE = 0.05


def mass_matched_controls(stats: TokenStats, rocks: RockSet | Sequence[int] | torch.Tensor, seed: int) -> Controls:
    """Return types that are not rocks and together occur as often as the rocks.

    Freezing the controls therefore drops as many positions as freezing the rocks. Rocks are frequent types, so they
    cannot be matched one by one. Instead, the types that occur are walked through in a seeded random order. A type that
    would bring the mass above 1.05 of the rocks' mass is skipped, and the walk stops at 0.95 of it.

    Args:
        stats (`TokenStats`): Statistics of the rollouts that the rocks were chosen from.
        rocks (`RockSet` or ids): The rocks.
        seed (`int`): Seed of the order.

    Returns:
        `Controls`: `matched` is false if the walk ended below 0.95.

    Raises:
        `ValueError`: if no rock occurs in the statistics, an id is outside their vocabulary or repeated, or the seed is
            not a whole number from 0 to 2**63 - 1.
    """
    rock_ids = _ids(rocks, stats.vocab_size)
    seed = whole_number("seed", seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed}.")

    seen = stats.seen.cpu()
    wanted = int(seen[rock_ids].sum())
    if wanted == 0:
        raise ValueError(
            "No rock occurs in the statistics, so there is no token mass to match. Pass the statistics that the rocks "
            "were chosen from."
        )

    is_candidate = (seen > 0) & named_types(stats)
    is_candidate[rock_ids] = False
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(seen), generator=generator)
    order = order[is_candidate[order]]

    least = (1 - MASS_TOLERANCE) * wanted
    most = (1 + MASS_TOLERANCE) * wanted
    counts = seen[order].tolist()
    chosen = []
    mass = 0
    for id, count in zip(order.tolist(), counts, strict=True):
        if mass + count > most:
            continue
        chosen.append(id)
        mass += count
        if mass >= least:
            break
    return Controls(ids=chosen, mass_ratio=mass / wanted, matched=mass >= least, seed=seed)


def with_texts(rock_set: RockSet, tokenizer) -> RockSet:
    """Return the rock set with the text of every rock and control, as `tokenizer` decodes it."""
    rocks = []
    for rock in rock_set.rocks:
        text = tokenizer.decode([rock.id])
        rocks.append(replace(rock, text=text))

    controls = rock_set.controls
    if controls is not None:
        texts = [tokenizer.decode([id]) for id in controls.ids]
        controls = replace(controls, texts=texts)
    return replace(rock_set, rocks=rocks, controls=controls)


def named_types(stats: TokenStats) -> torch.Tensor:
    """Return which ids have a token, bool, `(V,)`; the embedding's rows beyond the tokenizer's size are padding."""
    vocab_size = stats.vocab_size
    tokenizer = tokenizer_section(stats.measure.get("tokenizer"))
    size = tokenizer["vocab_size"]
    if not isinstance(size, int):
        size = vocab_size
    # A size read from a file may be negative or too large for an int64.
    size = max(0, min(size, vocab_size))
    return torch.arange(vocab_size) < size


def whole_number(name: str, value: Any) -> int:
    """Return an argument as a Python integer, or raise `ValueError` if it is not a whole number (a bool is not)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    return operator.index(value)


def _ids(rocks: RockSet | Sequence[int] | torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the ids of the rocks, int64, `(K,)`, or raise `ValueError` if they cannot be ids of these statistics."""
    if isinstance(rocks, RockSet):
        rocks = rocks.ids
    ids = torch.as_tensor(rocks).cpu()
    if ids.numel() == 0:
        ids = ids.long()
    if ids.ndim != 1 or ids.dtype == torch.bool or ids.is_floating_point():
        shape = tuple(ids.shape)
        raise ValueError(f"The rocks must be ids, whole numbers of shape (K,), got {ids.dtype} of shape {shape}.")

    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"Rock id {outside[0]} is outside the {vocab_size} vocabulary entries of the statistics. Pass rocks and "
            "statistics of one tokenizer."
        )
    if len(ids.unique()) < len(ids):
        raise ValueError("The rocks contain an id twice. Pass each id once.")
    return ids.long()


def tokenizer_section(known: Any) -> dict[str, Any]:
    """Return the tokenizer section of a rock set: the entries that are known, and `None` for the others.

    Args:
        known (`Any`): A tokenizer section that may lack entries, or only the tokenizer's name.
    """
    if not isinstance(known, dict):
        known = {"name": known}
    return {key: known.get(key) for key in ("name", "vocab_size", "fingerprint")}
