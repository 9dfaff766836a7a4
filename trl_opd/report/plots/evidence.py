"""Plots of evidence: what forbidding a token does to the reward, and the gradients of token types."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ...artefacts.gradient_table import GROUPS, Study
from . import canvas

# Colour and marker of each kind of arm of a probe.
KINDS = {
    "rock": (canvas.VERMILLION, "s"),
    "rocks": (canvas.VERMILLION, "D"),
    "control": (canvas.GREEN, "^"),
    "controls": (canvas.GREEN, "v"),
    "other": (canvas.BLUE, "o"),
}
KIND_NAMES = {"rocks": "all rocks at once", "controls": "all controls at once"}
# Colour, marker and hatch of each group of the gradient study.
GROUP_LOOKS = {
    "rock": (canvas.VERMILLION, "s", "////"),
    "rare": (canvas.BLUE, "o", ""),
    "random": (canvas.GREY, "^", "||||"),
}
# Longest forest plot, in rows.
MOST_ROWS = 60


def both_ends(items: list[Any], most: int) -> list[Any]:
    """Return a list of at most `most` items: all of them, or those at the start and at the end, half of `most` each."""
    if len(items) <= most:
        return items
    half = most // 2
    start = items[:half]
    end = items[-half:]
    return start + end


@canvas.house_style
def plot_forest(result: dict) -> Figure:
    """Return a forest plot: the effect of forbidding each token, with its 95 % interval, in the order of the result.

    Tokens without an interval are left out, and so is the middle of a list of more than 60.

    Args:
        result (`dict`): Result of the probe, as in `knockout.json`.
    """
    known = [arm for arm in result["arms"] if arm["ci95"] is not None]
    arms = both_ends(known, MOST_ROWS)
    title = "What forbidding a token does to the reward"
    if len(arms) < len(known):
        title += f": the {MOST_ROWS // 2} at each end of {len(known)}"
    figure, axes = canvas.new_figure(
        title,
        f"difference of the mean reward, with 95 % interval ({result['problems']} problems)",
        "",
        size=(6.4, 1.6 + 0.22 * max(len(arms), 4)),
        grid="x",
    )

    for kind, (colour, marker) in KINDS.items():
        rows = [row for row, arm in enumerate(arms) if arm["kind"] == kind]
        if not rows:
            continue
        chosen = [arms[row] for row in rows]
        lows, highs = np.transpose([arm["ci95"] for arm in chosen])
        axes.hlines(rows, lows, highs, color=colour, linewidth=1.2)
        effects = [arm["effect"] for arm in chosen]
        axes.plot(effects, rows, marker, color=colour, markersize=5, label=KIND_NAMES.get(kind, kind))

    axes.axvline(0.0, color=canvas.INK, linewidth=0.8)
    canvas.name_rows(axes, list(map(_row_name, arms)))
    axes.tick_params(axis="y", labelsize="x-small")
    if arms:
        canvas.add_legend(figure, axes, columns=5)
    else:
        canvas.say_empty(axes, "Nothing that was forbidden changed a reward.")
    return figure


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
    _add_group_legend(figure)
    return figure


def _row_name(arm: dict) -> str:
    name = KIND_NAMES.get(arm["kind"])
    if name is not None:
        return name
    # The id keeps tokens apart whose texts look alike: many are only a part of a character, and all shown as "�".
    text = "".join(arm["texts"])
    id = arm["ids"][0]
    return f"{canvas.label(text)} ({id})"


def _draw_norms(axes: Axes, found: Study) -> None:
    axes.set_title("Norm over count")
    count = found.columns["count"].astype(float)
    norm = found.columns["norm"].astype(float)
    shown = (count > 0) & (norm > 0)  # False for NaN
    if not shown.any():
        canvas.say_empty(axes, "No type has a gradient.")
        return

    canvas.log_axis(axes, "x", "y")
    axes.set(xlabel="occurrences n of the type (tokens)", ylabel="norm of the mean gradient")
    _draw_groups(axes, found, count, norm, shown)

    # The norm of a mean of n random gradients falls with 1/√n; the line runs through the median type.
    count = count[shown]
    edge = np.array([count.min(), count.max()])
    of_one = np.median(norm[shown] * np.sqrt(count))
    noise = of_one / np.sqrt(edge)
    axes.plot(edge, noise, "--", color=canvas.INK, linewidth=1.2)


def _draw_boxes(axes: Axes, found: Study, columns: tuple[str, ...], title: str, y: str) -> None:
    axes.set_title(title)
    line = {"color": canvas.INK}
    centres = np.arange(len(columns))
    for shift, (group, (colour, _, hatch)) in enumerate(GROUP_LOOKS.items(), -1):
        axes.boxplot(
            [found.of(group, name) for name in columns],
            positions=centres + 0.25 * shift,
            widths=0.2,
            showfliers=False,
            medianprops=line,
            boxprops={"facecolor": colour, "hatch": hatch, "edgecolor": canvas.INK, "linewidth": 0.6},
            whiskerprops=line,
            capprops=line,
            patch_artist=True,
        )
    axes.set_xticks(centres, ["as published", "corrected", "equal n"])
    axes.set_ylabel(f"{y} (median, quartiles)")


def _draw_change(axes: Axes, found: Study) -> None:
    axes.set_title("Divergence, early and late")
    if not found.has_early:
        canvas.say_empty(axes, "No earlier occurrences were given (--early).")
        return

    early = found.columns["mean_kl_early"]
    late = found.columns["mean_kl"]
    shown = np.isfinite(early) & np.isfinite(late)
    if not shown.any():
        canvas.say_empty(axes, "No type occurs early and late.")
        return

    canvas.nats_axis(axes, "x", "y")
    axes.set(xlabel="mean KL, early (nats per token)", ylabel="mean KL, late (nats per token)")
    _draw_groups(axes, found, early, late, shown)
    limits = canvas.limit_both(axes, early[shown], late[shown])
    axes.plot(limits, limits, color=canvas.INK, linewidth=0.8)


def _draw_groups(axes: Axes, found: Study, x: np.ndarray, y: np.ndarray, shown: np.ndarray) -> None:
    """Draw the types that are `shown`, bool, `(T,)`, as a series for each group."""
    for group, (colour, marker, _) in GROUP_LOOKS.items():
        chosen = shown & (found.columns["group"] == group)
        canvas.add_points(
            axes,
            x[chosen],
            y[chosen],
            colour=colour,
            marker=marker,
            size=4,
            label=GROUPS[group],
        )


def _add_group_legend(figure: Figure) -> None:
    """Put one legend for all panels below the figure: marker and box of each group, and the line of noise."""
    handles = []
    names = []
    for group, (colour, marker, hatch) in GROUP_LOOKS.items():
        point = Line2D([], [], color=colour, marker=marker, ls="", markersize=5)
        box = Patch(facecolor=colour, hatch=hatch, edgecolor=canvas.INK, linewidth=0.6)
        handles.append((point, box))
        names.append(GROUPS[group])

    handles.append(Line2D([], [], color=canvas.INK, ls="--", linewidth=1.2))
    names.append("1/√n: what noise alone would give")
    pairs = {tuple: HandlerTuple(ndivide=None, pad=0.8)}
    figure.legend(handles, names, loc="outside lower center", ncols=4, handlelength=3.0, handler_map=pairs)
