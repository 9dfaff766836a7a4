"""Section of a report about evidence: how the arms compare, what forbidding tokens does, and gradients by type."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...artefacts.gradient_table import GROUPS, MEDIANS, Study, read_gradients
from ...statistics import interval_text
from ..blocks import Block, Facts, Note, Plot, Section, Table
from ..contents import Contents, accuracy_in
from ..plots.canvas import to_svg
from ..plots.evidence import both_ends, plot_forest, plot_gradients
from ..plots.runs import Estimate, plot_arms

# Longest table of forbidden tokens: a row takes about 400 bytes of the page.
MOST_ARMS = 1000
NO_INTERVAL = (None, None)
NO_ESTIMATE = (None, None, None)


def evidence(contents: Contents) -> Section | None:
    """Return the section about arms, a probe and a gradient study; `None` if the folder has none of them.

    Raises:
        `ValueError`: if the table of gradients is damaged or from another program.
    """
    blocks = _arms(contents)
    blocks += _knockout(contents.knockout)
    if contents.gradients is not None:
        found = read_gradients(contents.gradients)
        blocks += _gradients(found)
    if not blocks:
        return None
    return Section("evidence", "Evidence", blocks)


def arm_results(contents: Contents) -> tuple[dict[str, Estimate], dict[str, Estimate], int | None]:
    """Return accuracy and difference to uniform of each arm, with intervals, and the number of problems, if known."""
    results = {}
    differences = {}
    summary = contents.summary
    if summary is not None:
        for arm, found in summary["arms"].items():
            low, high = found.get("accuracy_ci95") or NO_INTERVAL
            results[arm] = (found["accuracy"], low, high)
        for arm, found in summary["differences"].items():
            low, high = found.get("ci95") or NO_INTERVAL
            differences[arm] = (found["estimate"], low, high)
        return results, differences, summary["eval_problems"]

    problems = None
    for arm, run in contents.runs.items():
        lines = run.lines_with("eval_accuracy")
        if lines:
            results[arm] = accuracy_in(lines[-1])
            problems = int(lines[-1].get("eval_accuracy_problems", 0)) or None
    return results, differences, problems


def _arms(contents: Contents) -> list[Block]:
    results, differences, problems = arm_results(contents)
    if len(results) < 2:
        return []

    note = Note(
        "95 % intervals: Wilson for accuracies, a paired bootstrap over problems for differences. They cover the "
        "choice of problems but not the training seed, because each arm was run once."
    )
    what = "accuracy"
    if problems is not None:
        what += f" on {problems} problems"
    ends = "; ".join(f"{arm} {accuracy:.3f}" for arm, (accuracy, _, _) in results.items())
    figure = plot_arms(results, differences, what)
    plot = Plot(to_svg(figure, "a-"), f"Accuracy by arm and difference to uniform: {ends}")

    # The heads of the difference's interval end with a blank, because each head needs its own key.
    columns = {
        "arm": "",
        "accuracy": ".3f",
        "from": ".3f",
        "to": ".3f",
        "difference to uniform": "+.3f",
        "from ": "+.3f",
        "to ": "+.3f",
        "tokens frozen": ".1%",
    }
    rows = []
    for arm, (accuracy, low, high) in results.items():
        difference, least, most = differences.get(arm, NO_ESTIMATE)
        frozen = contents.summary["arms"][arm]["frozen_token_share"] if contents.summary else None
        rows.append((arm, accuracy, low, high, difference, least, most, frozen))
    return [note, plot, Table(f"The arms: {what}, with 95 % intervals", columns, rows)]


def _knockout(result: dict[str, Any] | None) -> list[Block]:
    if result is None:
        return []

    p = result["rocks_against_controls"].get("p")
    tested = "not tested: rocks or controls are missing"
    if p is not None:
        tested = f"p = {p:.3g} (Mann-Whitney over candidates)"
    baseline = result["baseline"]
    interval = interval_text(baseline.get("ci95"), ".3f")
    facts = [
        ("do rocks differ from mass-matched controls?", tested),
        ("baseline", f"mean reward {baseline['reward']:.3f} {interval} on {result['problems']} problems"),
        ("discordance", f"{result['discordance']:.3f} of the problems change their reward, on average over candidates"),
        ("smallest effect found with power 0.8", f"{result['minimal_effect']:.3f} (Bonferroni over all candidates)"),
    ]
    figure = plot_forest(result)
    plot = Plot(to_svg(figure, "n-"), "Effects of forbidding tokens on the mean reward, with 95 % intervals")
    return [Facts(facts), plot, _effects(result["arms"])]


def _effects(arms: list[dict[str, Any]]) -> Table:
    columns = {
        "token": "",
        "kind": "",
        "effect": "+.3f",
        "from": "+.3f",
        "to": "+.3f",
        "p": ".3g",
        "p (BH)": ".3g",
        "p (Holm)": ".3g",
        "label": "",
    }
    shown = both_ends(arms, MOST_ARMS)
    rows = []
    for arm in shown:
        kind = arm["kind"]
        token = "".join(arm["texts"]) if len(arm["ids"]) == 1 else f"all {kind}"
        low, high = arm["ci95"] or NO_INTERVAL
        p_bh = arm.get("p_bh")
        p_holm = arm.get("p_holm")
        rows.append((token, kind, arm["effect"], low, high, arm["p"], p_bh, p_holm, arm["label"]))

    caption = "What forbidding a token does to the mean reward: 95 % intervals over problems, p without and with "
    caption += "correction for the number of tests"
    if len(shown) < len(arms):
        caption += f"; the {MOST_ARMS // 2} at each end of {len(arms)}"
    return Table(caption, columns, rows, tool=True)


def _gradients(found: Study) -> list[Block]:
    rows = []
    for group, name in GROUPS.items():
        is_member = found.columns["group"] == group
        row = [name, int(is_member.sum())]
        for column in MEDIANS:
            values = found.of(group, column)
            median = float(np.median(values)) if len(values) else None
            row.append(median)
        rows.append(row)

    columns = {"types": "", "number": "d"} | dict.fromkeys(MEDIANS.values(), ".4g")
    caption = "Medians over types: norm of the mean gradient of the logits, and its cosine to G_balanced. No "
    caption += "intervals, because positions of a rollout depend on each other. A frequent type has a small norm "
    caption += "already because it is averaged over many positions."
    label = "Gradients of the logits by token type: norms, cosines, early and late"
    figure = plot_gradients(found)
    return [Plot(to_svg(figure, "d-"), label), Table(caption, columns, rows)]
