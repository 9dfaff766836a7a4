"""Plots of evidence: what forbidding a token does to the reward, and the gradients of token types."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ...artefacts.gradient_table import GROUPS, Study
from . import canvas

KINDS = {
    "rock": (canvas.VERMILLION, "s"),
    "rocks": (canvas.VERMILLION, "D"),
    "control": (canvas.GREEN, "^"),
    "controls": (canvas.GREEN, "v"),
    "other": (canvas.BLUE, "o"),
}
KIND_NAMES = {"rocks": "all rocks at once", "controls": "all controls at once"}
GROUP_LOOKS = {
    "rock": (canvas.VERMILLION, "s", "////"),
    "rare": (canvas.BLUE, "o", ""),
    "random": (canvas.GREY, "^", "||||"),
}
MOST_ROWS = 60  # of a forest plot


@canvas.house_style
def plot_forest(result: dict) -> Figure:
    """Return the effects of forbidding tokens with their 95 % intervals, the largest at the ends.

    Args:
        result (`dict`): Result of the probe, as in `knockout.json`.
    """
    known = [arm for arm in result["arms"] if arm["ci95"] is not None]
    arms = known if len(known) <= MOST_ROWS else [*known[: MOST_ROWS // 2], *known[-(MOST_ROWS // 2) :]]
    left_out = f": the {MOST_ROWS // 2} at each end of {len(known)}" if len(arms) < len(known) else ""
    figure, axes = canvas.new_figure(
        f"What forbidding a token does to the reward{left_out}",
        f"difference of the mean reward, with 95 % interval ({result['problems']} problems)",
        "",
        size=(6.4, 1.6 + 0.22 * max(len(arms), 4)),
        grid="x",
    )
    for kind, (colour, marker) in KINDS.items():
        rows = [row for row, arm in enumerate(arms) if arm["kind"] == kind]
        if rows:
            axes.hlines(rows, *zip(*(arms[row]["ci95"] for row in rows), strict=True), color=colour, linewidth=1.2)
            effects = [arms[row]["effect"] for row in rows]
            axes.plot(effects, rows, marker, color=colour, markersize=5, label=KIND_NAMES.get(kind, kind))
    axes.axvline(0.0, color=canvas.INK, linewidth=0.8)
    canvas.name_rows(axes, [_row_name(arm) for arm in arms])
    axes.tick_params(axis="y", labelsize="x-small")
    if arms:
        canvas.add_legend(figure, axes, columns=5)
    else:
        canvas.say_empty(axes, "Nothing that was forbidden changed a reward.")
    return figure


def _row_name(arm: dict) -> str:
    if arm["kind"] in KIND_NAMES:
        return KIND_NAMES[arm["kind"]]
    return f"{canvas.label(''.join(arm['texts']))} ({arm['ids'][0]})"  # many tokens are a part of a character: "�"


@canvas.house_style
def plot_gradients(found: Study) -> Figure:
    """Return four panels: norm over count, norms by group, cosines by group, and divergence early against late.

    Args:
        found (`Study`): Result of the gradient study.
    """
    figure = Figure(figsize=(9.6, 7.4), layout="constrained")
    (scatter, norms), (cosines, change) = figure.subplots(2, 2)
    figure.suptitle("Gradients of the logits by token type", x=0.01, ha="left")
    _draw_norms(scatter, found)
    columns = ("norm", "norm_unbiased", "norm_matched")
    _draw_boxes(norms, found, columns, "Norms by group", "norm of the mean gradient")
    columns = ("cos_balanced", "cos_balanced_without", "cos_matched")
    _draw_boxes(cosines, found, columns, "Directions by group", "cosine to G_balanced")
    _draw_change(change, found)
    looks = GROUP_LOOKS.values()
    handles = [
        (Line2D([], [], color=colour, marker=marker, ls="", markersize=5), _box(colour, hatch))
        for colour, marker, hatch in looks
    ]
    handles.append(Line2D([], [], color=canvas.INK, ls="--", linewidth=1.2))
    names = [*(GROUPS[group] for group in GROUP_LOOKS), "1/√n: what noise alone would give"]
    tuples = {tuple: HandlerTuple(ndivide=None, pad=0.8)}
    figure.legend(handles, names, loc="outside lower center", ncols=4, handlelength=3.0, handler_map=tuples)
    return figure


def _box(colour: str, hatch: str) -> Patch:
    return Patch(facecolor=colour, hatch=hatch, edgecolor=canvas.INK, linewidth=0.6)


def _draw_norms(axes: Axes, found: Study) -> None:
    axes.set_title("Norm over count")
    count, norm = (np.asarray(found.columns[name], dtype=float) for name in ("count", "norm"))
    shown = (count > 0) & (norm > 0)  # False for NaN
    if not shown.any():
        canvas.say_empty(axes, "No type has a gradient.")
        return
    canvas.log_axis(axes, "x", "y")
    axes.set(xlabel="occurrences n of the type (tokens)", ylabel="norm of the mean gradient")
    for group, (colour, marker, _) in GROUP_LOOKS.items():
        chosen = shown & (found.columns["group"] == group)
        canvas.add_points(axes, count[chosen], norm[chosen], colour=colour, marker=marker, size=4, label=GROUPS[group])
    edge = np.array([count[shown].min(), count[shown].max()])
    noise = np.median(norm[shown] * np.sqrt(count[shown])) / np.sqrt(edge)
    axes.plot(edge, noise, "--", color=canvas.INK, linewidth=1.2)


def _draw_boxes(axes: Axes, found: Study, columns: tuple[str, ...], title: str, y: str) -> None:
    axes.set_title(title)
    for shift, (group, (colour, _, hatch)) in enumerate(GROUP_LOOKS.items(), -1):
        axes.boxplot(
            [found.of(group, name) for name in columns],
            positions=[place + 0.25 * shift for place in range(len(columns))],
            widths=0.2,
            showfliers=False,
            medianprops={"color": canvas.INK},
            boxprops={"facecolor": colour, "hatch": hatch, "edgecolor": canvas.INK, "linewidth": 0.6},
            whiskerprops={"color": canvas.INK},
            capprops={"color": canvas.INK},
            patch_artist=True,
        )
    axes.set_xticks(range(len(columns)), ["as published", "corrected", "equal n"])
    axes.set_ylabel(f"{y} (median, quartiles)")


def _draw_change(axes: Axes, found: Study) -> None:
    axes.set_title("Divergence, early and late")
    if not found.has_early:
        canvas.say_empty(axes, "No earlier occurrences were given (--early).")
        return
    early, late = (np.asarray(found.columns[name], dtype=float) for name in ("mean_kl_early", "mean_kl"))
    shown = np.isfinite(early) & np.isfinite(late)
    if not shown.any():
        canvas.say_empty(axes, "No type occurs early and late.")
        return
    canvas.nats_axis(axes, "x", "y")
    axes.set(xlabel="mean KL, early (nats per token)", ylabel="mean KL, late (nats per token)")
    for group, (colour, marker, _) in GROUP_LOOKS.items():
        chosen = shown & (found.columns["group"] == group)
        canvas.add_points(axes, early[chosen], late[chosen], colour=colour, marker=marker, size=4, label=GROUPS[group])
    both = np.concatenate([early[shown], late[shown]])
    low, high = canvas.limit_nats(axes.set_xlim, both)
    canvas.limit_nats(axes.set_ylim, both)
    axes.plot([low, high], [low, high], color=canvas.INK, linewidth=0.8)
