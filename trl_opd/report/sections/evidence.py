"""Section of a report about evidence: what forbidding tokens does, whether they teach, and how the arms compare."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...artefacts.gradient_table import GROUPS, MEDIANS, Study, read_gradients
from ...statistics import interval_text
from ..blocks import Block, Facts, Note, Plot, Section, Table
from ..contents import Contents
from ..plots.canvas import to_svg
from ..plots.evidence import plot_forest, plot_gradients
from ..plots.runs import Estimate, plot_arms

MOST_ARMS = 1000  # of the table of what was forbidden: each is 400 bytes of the page


def evidence(contents: Contents) -> Section | None:
    """Return what a folder knows of arms, knockouts and gradients."""
    blocks = [*_arms(contents), *_knockout(contents.knockout)]
    if contents.gradients is not None:
        blocks += _gradients(read_gradients(contents.gradients))
    return Section("evidence", "Evidence", blocks) if blocks else None


def arm_results(contents: Contents) -> tuple[dict[str, Estimate], dict[str, Estimate], int | None]:
    """Return accuracy and difference to uniform of each arm, with intervals, and the number of problems."""
    if contents.summary is not None:
        found = contents.summary
        results = {arm: _estimate(one, "accuracy", "accuracy_ci95") for arm, one in found["arms"].items()}
        differences = {arm: _estimate(one, "estimate", "ci95") for arm, one in found["differences"].items()}
        return results, differences, found["eval_problems"]
    results, problems = {}, None
    for arm, run in contents.runs.items():
        last = next((line for line in reversed(run.log) if "eval_accuracy" in line), None)
        if last is not None:
            ends = (last.get(f"eval_accuracy_ci95_{end}") for end in ("low", "high"))
            results[arm] = (last["eval_accuracy"], *ends)
            problems = int(last.get("eval_accuracy_problems", 0)) or None
    return results, {}, problems


def _estimate(found: dict[str, Any], name: str, interval: str) -> Estimate:
    return (found[name], *(found.get(interval) or (None, None)))


def _arms(contents: Contents) -> list[Block]:
    results, differences, problems = arm_results(contents)
    if len(results) < 2:
        return []
    what = "accuracy" if problems is None else f"accuracy on {problems} problems"
    shares = {arm: found["frozen_token_share"] for arm, found in (contents.summary or {"arms": {}})["arms"].items()}
    rows = [(arm, *results[arm], *differences.get(arm, (None,) * 3), shares.get(arm)) for arm in results]
    columns = {"arm": "", "accuracy": ".3f", "from": ".3f", "to": ".3f"}
    columns |= {"difference to uniform": "+.3f", "from ": "+.3f", "to ": "+.3f", "tokens frozen": ".1%"}
    text = "Intervals of 95 %: accuracy Wilson, differences a paired bootstrap over problems. They cover the choice of "
    text += "the problems, not that of the training seed: one run of each arm."
    ends = "; ".join(f"{arm} {found[0]:.3f}" for arm, found in results.items())
    plot = Plot(
        to_svg(plot_arms(results, differences, what), "a-"), f"Accuracy by arm and difference to uniform: {ends}"
    )
    return [Note(text), plot, Table(f"The arms: {what}, with 95 % intervals", columns, rows)]


def _knockout(result: dict[str, Any] | None) -> list[Block]:
    if result is None:
        return []
    against = result["rocks_against_controls"]
    baseline = result["baseline"]
    reward = f"{baseline['reward']:.3f} {interval_text(baseline.get('ci95'), '.3f')}"
    p = against.get("p")
    facts = [
        (
            "do rocks differ from mass-matched controls?",
            "not tested: one of the two is missing" if p is None else f"p = {p:.3g} (Mann-Whitney over candidates)",
        ),
        ("baseline", f"mean reward {reward} on {result['problems']} problems"),
        ("discordance", f"{result['discordance']:.3f} of the problems change their reward, on average over candidates"),
        ("least effect found with power 0.8", f"{result['minimal_effect']:.3f} (Bonferroni over all candidates)"),
    ]
    plot = Plot(
        to_svg(plot_forest(result), "n-"), "Effects of forbidding tokens on the mean reward, with 95 % intervals"
    )
    return [Facts(facts), plot, _effects(result["arms"])]


def _effects(arms: list[dict[str, Any]]) -> Table:
    shown = arms if len(arms) <= MOST_ARMS else [*arms[: MOST_ARMS // 2], *arms[-(MOST_ARMS // 2) :]]
    rows = [
        (
            "".join(arm["texts"]) if len(arm["ids"]) == 1 else f"all {arm['kind']}",
            arm["kind"],
            arm["effect"],
            *(arm["ci95"] or (None, None)),
            arm["p"],
            arm.get("p_bh"),
            arm.get("p_holm"),
            arm["label"],
        )
        for arm in shown
    ]
    columns = {"token": "", "kind": "", "effect": "+.3f", "from": "+.3f", "to": "+.3f", "p": ".3g"}
    columns |= {"p (BH)": ".3g", "p (Holm)": ".3g", "label": ""}
    caption = "What forbidding a token does to the mean reward: 95 % intervals over problems, p as tested and corrected"
    if len(shown) < len(arms):
        caption += f"; the {MOST_ARMS // 2} at each end of {len(arms)}"
    return Table(caption, columns, rows, tool=True)


def _gradients(found: Study) -> list[Block]:
    rows = []
    for group, name in GROUPS.items():
        values = [found.of(group, column) for column in MEDIANS]
        medians = [float(np.median(part)) if len(part) else None for part in values]
        rows.append((name, int((found.columns["group"] == group).sum()), *medians))
    columns = {"types": "", "number": "d"} | dict.fromkeys(MEDIANS.values(), ".4g")
    caption = "Medians over types: norm of the mean gradient of the logits, and its cosine to G_balanced. No intervals "
    caption += "(positions of a rollout depend on each other). Averaging alone makes norms of frequent types small."
    plot = Plot(
        to_svg(plot_gradients(found), "d-"), "Gradients of the logits by token type: norms, cosines, early and late"
    )
    return [plot, Table(caption, columns, rows)]
