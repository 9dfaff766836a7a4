"""Effects of forbidding tokens: the arms of a probe, tested and corrected, and the roles of rocks."""

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

ROCKS, CONTROLS = "rocks", "controls"  # arms that forbid all of them at once


def make_arms(
    rocks: Sequence[int], controls: Sequence[int], candidates: Sequence[int]
) -> dict[str, tuple[str, frozenset[int]]]:
    """Return the arms of a probe: name -> kind and forbidden ids.

    Args:
        rocks (`Sequence[int]`): Rocks that are candidates.
        controls (`Sequence[int]`): Their mass-matched controls.
        candidates (`Sequence[int]`): Every single token to forbid; rocks and controls among them keep their kind.
    """
    kinds = dict.fromkeys(candidates, "other") | dict.fromkeys(controls, "control") | dict.fromkeys(rocks, "rock")
    arms = {f"token {id}": (kind, frozenset([id])) for id, kind in kinds.items()}
    for name, ids in ((ROCKS, rocks), (CONTROLS, controls)):
        if len(ids) > 1:
            arms[name] = (name, frozenset(ids))
    return arms


def evaluate_arms(
    arms: Mapping[str, tuple[str, frozenset[int]]],
    rewards: Mapping[str, list[float]],
    measures: Mapping[str, Mapping[int, float]],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the effects of all arms, corrected over the single tokens, and the tests between groups of them.

    Args:
        arms (`Mapping`): Kind and forbidden ids of each.
        rewards (`Mapping`): Of all problems, for each arm and the baseline.
        measures (`Mapping`): Properties of the tokens, by name and id, that effects are correlated with.
        seed (`int`): Of resamples and draws.
    """
    baseline = rewards[BASELINE]
    problems = len(baseline)
    effects = {arm: effect_of(rewards[arm], baseline, seed=seed) for arm in arms}

    # Only single tokens are tested; the arms that forbid many at once are shown beside them.
    single = [arm for arm, (kind, _) in arms.items() if kind not in (ROCKS, CONTROLS)]
    p_values = [effects[arm].p for arm in single]
    p_bh = dict(zip(single, benjamini_hochberg(p_values), strict=True))
    p_holm = dict(zip(single, holm(p_values), strict=True))
    rows = []
    for arm, (kind, ids) in arms.items():
        row = {"arm": arm, "kind": kind, "ids": sorted(ids), **_describe_effect(effects[arm])}
        if arm in p_bh:
            row |= _describe_tests(effects[arm], float(p_bh[arm]), float(p_holm[arm]))
        else:
            row |= dict.fromkeys(("p_bh", "p_holm", "label", "label_as_published"))
        rows.append(row)

    rock_effects = [effects[arm].estimate for arm in single if arms[arm][0] == "rock"]
    control_effects = [effects[arm].estimate for arm in single if arms[arm][0] == "control"]
    correlations = {}
    for name, values in measures.items():
        estimates = [effects[arm].estimate for arm in single]
        correlations[name] = correlation(estimates, [values.get(min(arms[arm][1])) for arm in single])

    shares = [(effects[arm].better + effects[arm].worse) / problems for arm in single]
    discordance = float(np.mean(shares)) if single else 0.0
    is_binary = set(baseline) <= {0.0, 1.0}
    return {
        "problems": problems,
        "baseline": {
            "reward": float(np.mean(baseline)),
            "ci95": list(accuracy_interval([value == 1.0 for value in baseline])) if is_binary else None,
        },
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
    """Return the number of tests of a result: one for each single token."""
    return sum(arm["label"] is not None for arm in result["arms"])


def problems_needed(result: dict[str, Any], effect: float) -> int | None:
    """Return about how many problems it takes to find an effect; `None` where the result has enough."""
    if result["minimal_effect"] <= effect:
        return None
    return problems_for(effect, count_tests(result), result["discordance"])


def add_roles(rock_set: RockSet, result: dict[str, Any]) -> RockSet:
    """Return the rock set with the label that the probe gave to each of its rocks as the rock's role."""
    tested = {arm["ids"][0]: arm for arm in result["arms"] if arm["label"] is not None}
    rocks = []
    for rock in rock_set.rocks:
        if rock.id in tested:
            arm = tested[rock.id]
            rock = replace(rock, role=arm["label"], role_uncorrected=arm["label_as_published"])
        rocks.append(rock)
    return replace(rock_set, rocks=rocks)
