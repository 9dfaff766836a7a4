"""What forbidding tokens did: the arms of a probe, their effects, tested and corrected, and the roles of rocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..statistics import (
    Effect,
    accuracy_interval,
    benjamini_hochberg,
    correlation,
    effect_of,
    holm,
    label,
    minimal_effect,
    rocks_against_controls,
)
from .knockout import BASELINE

ROCKS, CONTROLS = "rocks", "controls"  # arms that forbid all of them at once


def arms_of(
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


def evaluate(
    arms: Mapping[str, tuple[str, frozenset[int]]],
    rewards: Mapping[str, list[float]],
    figures: Mapping[str, Mapping[int, float]],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the effects of all arms, corrected over the single tokens, and what they say together.

    Args:
        arms (`Mapping`): Kind and forbidden ids of each.
        rewards (`Mapping`): Of all problems, for each arm and the baseline.
        figures (`Mapping`): What is known of the tokens, by name and id, that effects are correlated with.
        seed (`int`): Of resamples and draws.
    """
    baseline = rewards[BASELINE]
    effects = {arm: effect_of(rewards[arm], baseline, seed=seed) for arm in arms}
    single = [arm for arm, (kind, _) in arms.items() if kind not in (ROCKS, CONTROLS)]
    p = [effects[arm].p for arm in single]
    adjusted = {arm: (float(b), float(h)) for arm, b, h in zip(single, benjamini_hochberg(p), holm(p), strict=True)}
    found = [
        {"arm": arm, "kind": arms[arm][0], "ids": sorted(arms[arm][1]), **_figures(effect, adjusted.get(arm))}
        for arm, effect in effects.items()
    ]
    discordance = float(np.mean([_discordance(effects[arm], len(baseline)) for arm in single])) if single else 0.0
    groups = [[effects[arm].estimate for arm in single if arms[arm][0] == kind] for kind in ("rock", "control")]
    binary = set(baseline) <= {0.0, 1.0}
    return {
        "problems": len(baseline),
        "baseline": {
            "reward": float(np.mean(baseline)),
            "ci95": list(accuracy_interval([value == 1.0 for value in baseline])) if binary else None,
        },
        "rocks_against_controls": {
            "p": rocks_against_controls(*groups),
            "rocks": len(groups[0]),
            "controls": len(groups[1]),
        },
        "correlations": {
            name: correlation(
                [effects[arm].estimate for arm in single], [known.get(min(arms[arm][1])) for arm in single]
            )
            for name, known in figures.items()
        },
        "discordance": discordance,
        "minimal_effect": minimal_effect(len(baseline), len(single), discordance),
        "arms": sorted(found, key=lambda arm: arm["effect"]),
    }


def _discordance(effect: Effect, problems: int) -> float:
    return (effect.better + effect.worse) / problems


def _figures(effect: Effect, adjusted: tuple[float, float] | None) -> dict[str, Any]:
    """Return an effect's figures; corrected p values and labels are of single tokens."""
    figures = {
        "effect": effect.estimate,
        "ci95": None if effect.ci95 is None else list(effect.ci95),
        "better": effect.better,
        "worse": effect.worse,
        "p": effect.p,
    }
    if adjusted is None:
        return figures | dict.fromkeys(("p_bh", "p_holm", "label", "label_as_published"))
    return figures | {
        "p_bh": adjusted[0],
        "p_holm": adjusted[1],
        "label": label(effect.estimate, adjusted[0]),
        "label_as_published": label(effect.estimate, effect.p_bootstrap),
    }


def with_roles(rock_set, result: dict):
    """Return the rock set with what the probe found of its rocks."""

    found = {arm["ids"][0]: arm for arm in result["arms"] if arm["label"] is not None}
    rocks = [
        replace(rock, role=found[rock.id]["label"], role_uncorrected=found[rock.id]["label_as_published"])
        if rock.id in found
        else rock
        for rock in rock_set.rocks
    ]
    return replace(rock_set, rocks=rocks)
