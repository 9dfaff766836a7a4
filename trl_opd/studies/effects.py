"""Effects of forbidding tokens: arms of a probe, tests corrected for multiple comparisons, and roles of rocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..rocks.rock_set import RockSet
from ..statistics import (
    Effect,
    accuracy_interval,
    benjamini_hochberg,
    correlation,
    effect_of,
    holm,
    label,
    minimal_effect,
    problems_for,
    rocks_against_controls,
)
from .knockout import BASELINE

# Arms that forbid all rocks, or all controls, at once.
ROCKS = "rocks"
CONTROLS = "controls"


def make_arms(
    rocks: Sequence[int], controls: Sequence[int], candidates: Sequence[int]
) -> dict[str, tuple[str, frozenset[int]]]:
    """Return the arms of a probe by name: the kind and the forbidden ids of each.

    Args:
        rocks (`Sequence[int]`): Rocks that are candidates.
        controls (`Sequence[int]`): Their mass-matched controls.
        candidates (`Sequence[int]`): Tokens to forbid one at a time; rocks and controls among them keep their kind.
    """
    kinds = dict.fromkeys(candidates, "other")
    kinds |= dict.fromkeys(controls, "control")
    kinds |= dict.fromkeys(rocks, "rock")
    arms = {}
    for id, kind in kinds.items():
        arms[f"token {id}"] = (kind, frozenset([id]))
    # With one rock or one control, its own arm already forbids all of them.
    if len(rocks) > 1:
        arms[ROCKS] = (ROCKS, frozenset(rocks))
    if len(controls) > 1:
        arms[CONTROLS] = (CONTROLS, frozenset(controls))
    return arms


def evaluate_arms(
    arms: Mapping[str, tuple[str, frozenset[int]]],
    rewards: Mapping[str, list[float]],
    measures: Mapping[str, Mapping[int, float]],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the effects of all arms, p values corrected over the single tokens, and tests between groups of tokens.

    Args:
        arms (`Mapping`): Kind and forbidden ids of each arm ([`make_arms`]).
        rewards (`Mapping`): Rewards of all problems, for each arm and the baseline.
        measures (`Mapping`): Properties of the tokens, by name and id, that effects are correlated with.
        seed (`int`): Seed of resamples and draws.
    """
    baseline = rewards[BASELINE]
    problems = len(baseline)
    effects = {arm: effect_of(rewards[arm], baseline, seed=seed) for arm in arms}

    # Corrections, labels and comparisons are for single tokens; an arm that forbids several has its p value only.
    single = [arm for arm in arms if arm not in (ROCKS, CONTROLS)]
    p_values = [effects[arm].p for arm in single]
    p_bh = dict(zip(single, benjamini_hochberg(p_values), strict=True))
    p_holm = dict(zip(single, holm(p_values), strict=True))
    rows = _rows_of_arms(arms, effects, p_bh, p_holm)

    estimates = []
    shares = []
    single_ids = []
    by_kind: dict[str, list[float]] = {"rock": [], "control": [], "other": []}
    for arm in single:
        kind, ids = arms[arm]
        effect = effects[arm]
        estimates.append(effect.estimate)
        shares.append((effect.better + effect.worse) / problems)
        single_ids.extend(ids)
        by_kind[kind].append(effect.estimate)

    rock_effects = by_kind["rock"]
    control_effects = by_kind["control"]
    correlations = {}
    for name, values in measures.items():
        correlations[name] = correlation(estimates, [values.get(id) for id in single_ids])
    discordance = float(np.mean(shares)) if single else 0.0
    interval = None
    if set(baseline) <= {0.0, 1.0}:
        interval = list(accuracy_interval([value == 1.0 for value in baseline]))
    return {
        "problems": problems,
        "baseline": {"reward": float(np.mean(baseline)), "ci95": interval},
        "rocks_against_controls": {
            "p": rocks_against_controls(rock_effects, control_effects),
            "rocks": len(rock_effects),
            "controls": len(control_effects),
        },
        "correlations": correlations,
        "discordance": discordance,
        "minimal_effect": minimal_effect(problems, len(single), discordance),
        "arms": sorted(rows, key=lambda row: row["effect"]),
    }


def _rows_of_arms(
    arms: Mapping[str, tuple[str, frozenset[int]]],
    effects: Mapping[str, Effect],
    p_bh: Mapping[str, float],
    p_holm: Mapping[str, float],
) -> list[dict[str, Any]]:
    rows = []
    for arm, (kind, ids) in arms.items():
        effect = effects[arm]
        row = {"arm": arm, "kind": kind, "ids": sorted(ids)}
        row |= _describe_effect(effect)
        if arm in p_bh:
            row |= _describe_tests(effect, float(p_bh[arm]), float(p_holm[arm]))
        else:
            row |= dict.fromkeys(("p_bh", "p_holm", "label", "label_as_published"))
        rows.append(row)
    return rows


def _describe_effect(effect: Effect) -> dict[str, Any]:
    return {
        "effect": effect.estimate,
        "ci95": None if effect.ci95 is None else list(effect.ci95),
        "better": effect.better,
        "worse": effect.worse,
        "p": effect.p,
    }


def _describe_tests(effect: Effect, p_bh: float, p_holm: float) -> dict[str, Any]:
    return {
        "p_bh": p_bh,
        "p_holm": p_holm,
        "label": label(effect.estimate, p_bh),
        "label_as_published": label(effect.estimate, effect.p_bootstrap),
    }


def count_tests(result: dict[str, Any]) -> int:
    """Return the number of tests of a result: one for each arm of a single token."""
    return sum(arm["label"] is not None for arm in result["arms"])


def problems_needed(result: dict[str, Any], effect: float) -> int | None:
    """Return roughly how many problems are needed to detect an effect; `None` if the result already has enough."""
    if result["minimal_effect"] <= effect:
        return None
    return problems_for(effect, count_tests(result), result["discordance"])


def add_roles(rock_set: RockSet, result: dict[str, Any]) -> RockSet:
    """Return the rock set with the role of each rock set to the label that the probe gave it."""
    rocks = {rock.id: rock for rock in rock_set.rocks}
    for arm in result["arms"]:
        id = arm["ids"][0]
        if arm["label"] is not None and id in rocks:
            rocks[id] = replace(rocks[id], role=arm["label"], role_uncorrected=arm["label_as_published"])
    return replace(rock_set, rocks=list(rocks.values()))
