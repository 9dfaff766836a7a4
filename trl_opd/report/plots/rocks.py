"""Plots of token types: how often and how far from the teacher, before and after, which cutoff, which families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from ...rocks.cutoff import LEAST_JACCARD, Sweep
from . import canvas

BINS_A_DECADE, LEAST_TYPES = 4, 5  # of fewer types a bin's tenths say nothing
LABELS, GAP = 8, 0.075  # names beside the funnel, and their distance as a share of its height
QUANTILES = (0.1, 0.5, 0.9)


@canvas.house_style
def plot_funnel(
    count: np.ndarray, mean_kl: np.ndarray, is_rock: np.ndarray, *, texts: Mapping[int, str] | None = None
) -> Figure:
    """Return mean KL over count, a point for each type that occurs, with the band of 8 in 10 types of like count.

    Args:
        count (`np.ndarray`): Occurrences of each type, `(V,)`.
        mean_kl (`np.ndarray`): Its mean KL, nats per token, `(V,)`; NaN where it is not known.
        is_rock (`np.ndarray`): Whether it is a rock, `(V,)`.
        texts (`Mapping[int, str]`, *optional*):
            Texts of types by their places in these arrays; the rocks of the highest count × mean KL are named.
    """
    count, mean_kl = np.asarray(count, dtype=float), np.asarray(mean_kl, dtype=float)
    is_rock = np.asarray(is_rock, dtype=bool)
    figure, axes = canvas.new_figure(
        "How often types occur, and how far they stay from the teacher",
        "occurrences of the type (tokens)",
        "mean KL (nats per token)",
        size=(7.0, 4.8),
    )
    shown = (count > 0) & np.isfinite(mean_kl)
    if not shown.any():
        canvas.say_empty(axes, "No type occurs.")
        return figure
    canvas.log_axis(axes, "x")
    canvas.nats_axis(axes, "y")
    _draw_types(axes, count, mean_kl, is_rock, shown)
    centres, band = count_band(count[shown], mean_kl[shown])
    name = "10 to 90 % of types of like count"
    axes.fill_between(centres, band[0], band[2], color=canvas.GREY, alpha=0.3, linewidth=0, label=name)
    axes.plot(centres, band[1], "--", color=canvas.INK, linewidth=1.2, label="their median")
    # At least a decade each way, so that there are numbers on the axes.
    low, high = count[shown].min(), count[shown].max()
    axes.set_xlim(low / 1.4, max(high, 10 * low) * 1.4)
    canvas.limit_nats(axes.set_ylim, mean_kl[shown])
    if texts is not None:
        rocks = np.flatnonzero(shown & is_rock)
        rocks = rocks[np.argsort(-(count * mean_kl)[rocks], kind="stable")][:LABELS]
        _name_beside(axes, [(count[id_], mean_kl[id_], texts.get(int(id_), f"({id_})")) for id_ in rocks])
    canvas.add_legend(figure, axes, columns=2)
    return figure


def count_band(count: np.ndarray, mean_kl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles of bins of count, `(B,)`, and the 10th, 50th and 90th percentile of mean KL, nats, `(3, B)`.

    A bin is a quarter of a decade and has at least five types; its middle is the mean of its types' log counts.
    """
    bins = np.floor(np.log10(count) * BINS_A_DECADE + 1e-9).astype(int)
    members = [bins == place for place in np.unique(bins)]
    members = [member for member in members if member.sum() >= LEAST_TYPES]
    centres = np.array([np.exp(np.log(count[member]).mean()) for member in members])
    band = [np.quantile(mean_kl[member], QUANTILES) for member in members]
    return centres, np.array(band).reshape(-1, len(QUANTILES)).T


@canvas.house_style
def plot_before_after(before: np.ndarray, after: np.ndarray, is_rock: np.ndarray) -> Figure:
    """Return the mean KL of each type after distillation over that before; on the diagonal nothing was learned.

    Args:
        before, after (`np.ndarray`): Mean KL of each type, nats per token, `(V,)`; NaN where it is not known.
        is_rock (`np.ndarray`): Whether it is a rock, `(V,)`.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    is_rock = np.asarray(is_rock, dtype=bool)
    figure, axes = canvas.new_figure(
        "What distillation changed: each type before and after",
        "mean KL before (nats per token)",
        "mean KL after (nats per token)",
        size=(5.4, 5.6),
        grid="both",
    )
    shown = np.isfinite(before) & np.isfinite(after)
    if not shown.any():
        canvas.say_empty(axes, "No type was measured before and after.")
        return figure
    canvas.nats_axis(axes, "x", "y")
    _draw_types(axes, before, after, is_rock, shown)
    both = np.concatenate([before[shown], after[shown]])
    low, high = canvas.limit_nats(axes.set_xlim, both)
    canvas.limit_nats(axes.set_ylim, both)
    axes.plot([low, high], [low, high], color=canvas.INK, linewidth=0.8, label="no change")
    canvas.add_legend(figure, axes, columns=3)
    return figure


@canvas.house_style
def plot_sweep(sweep: Sweep) -> Figure:
    """Return coverage and, where two draws were compared, stability over the cutoff K, and the K that was chosen.

    Args:
        sweep (`Sweep`): What each cutoff would mean; its `stability` may be empty.
    """
    title = "How many types are rocks: overlap of two draws, and coverage"
    if not sweep.stability:
        title = "How many types are rocks: coverage only, no draws were compared"
    figure, axes = canvas.new_figure(title, "cutoff K (types)", "share (0 to 1)")
    name = "coverage: share of the divergence"
    marker = "." if len(sweep.cutoffs) == 1 else ""  # a line of one point is nothing
    axes.plot(sweep.cutoffs, sweep.coverage, "--", marker=marker, color=canvas.INK, label=name)
    for place, (size, values) in enumerate(sweep.stability.items()):
        look = canvas.look_of(place)
        name = f"overlap (Jaccard) of {size} rollouts and {size} others"
        axes.plot(sweep.cutoffs, values, color=look.colour, marker=look.marker, markersize=3, label=name)
    if sweep.stability:
        axes.axhline(LEAST_JACCARD, color=canvas.GREY, linewidth=0.8, label=f"least overlap: {LEAST_JACCARD}")
    if sweep.top_k is not None:
        axes.axvline(sweep.top_k, color=canvas.INK, linewidth=0.8, linestyle=":", label=f"chosen: K = {sweep.top_k}")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylim(0.0, 1.02)
    canvas.add_legend(figure, axes, columns=2)
    return figure


@canvas.house_style
def plot_families(names: Sequence[str], token_share: Sequence[float], kl_share: Sequence[float]) -> Figure:
    """Return for each family its share of the tokens and of the divergence, two bars.

    Args:
        names (`Sequence[str]`): The families.
        token_share, kl_share (`Sequence[float]`): Their shares, 0 to 1.
    """
    figure, axes = canvas.new_figure(
        "Which families the tokens and the divergence belong to",
        "share",
        "",
        size=(6.4, 1.7 + 0.42 * max(len(names), 1)),
        grid="x",
    )
    rows = np.arange(len(names))
    for shift, shares, colour, hatch, name in (
        (-0.19, token_share, canvas.BLUE, "", "of the tokens"),
        (0.19, kl_share, canvas.VERMILLION, "////", "of the divergence"),
    ):
        width = np.nan_to_num(np.asarray(shares, dtype=float))
        axes.barh(rows + shift, width, 0.36, color=colour, hatch=hatch, edgecolor=canvas.INK, linewidth=0.4, label=name)
    axes.xaxis.set_major_formatter(canvas.percent)
    canvas.name_rows(axes, [canvas.label(name) for name in names])
    if len(names):
        canvas.add_legend(figure, axes, columns=2)
    else:
        canvas.say_empty(axes, "No token has a family.")
    return figure


def _draw_types(axes: Axes, x: np.ndarray, y: np.ndarray, is_rock: np.ndarray, shown: np.ndarray) -> None:
    """Draw types, rocks on top."""
    look = {"colour": canvas.BLUE, "marker": "o", "size": 2.6, "alpha": 0.55, "label": "types that are no rocks"}
    canvas.add_points(axes, x[shown & ~is_rock], y[shown & ~is_rock], **look)
    look = {"colour": canvas.VERMILLION, "marker": "D", "size": 4.5, "alpha": 0.9, "label": "rocks"}
    canvas.add_points(axes, x[shown & is_rock], y[shown & is_rock], **look)


def _name_beside(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Name points in a column on the right, in the order of their heights, where no two names can meet."""
    heights = (axes.transScale + axes.transLimits).transform([point[:2] for point in points])[:, 1] if points else []
    order = np.argsort(heights)
    places = np.array([heights[place] for place in order])
    for row in range(1, len(places)):
        places[row] = max(places[row], places[row - 1] + GAP)
    for row in reversed(range(len(places))):
        places[row] = min(places[row], 1.0 if row == len(places) - 1 else places[row + 1] - GAP)
    # Points, and no share of a width that the layout has yet to find.
    beside = offset_copy(axes.transAxes, axes.figure, x=10, units="points")
    line = {"arrowstyle": "-", "color": canvas.INK, "alpha": 0.4, "linewidth": 0.6}
    line |= {"shrinkA": 1, "shrinkB": 3, "relpos": (0.0, 0.5)}
    beside = offset_copy(axes.transAxes, axes.figure, x=10, units="points")
    for row, place in enumerate(order):
        x, y, text = points[place]
        axes.annotate(
            canvas.label(text),
            (x, y),
            (1.0, places[row]),
            textcoords=beside,
            va="center",
            fontsize="small",
            arrowprops=line,
        )
