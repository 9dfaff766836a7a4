"""Plots of token types: divergence over count, divergence before and after, cutoffs for the rocks, families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from ...rocks.cutoff import LEAST_JACCARD, Sweep
from . import canvas

BINS_PER_DECADE = 4
# Bins with fewer types are left out, because the 10th and 90th percentile of so few say nothing.
LEAST_TYPES = 5
QUANTILES = (0.1, 0.5, 0.9)
# Number of names beside the funnel, and the least distance between two, as a share of its height.
LABELS = 8
GAP = 0.075


@canvas.house_style
def plot_funnel(
    count: np.ndarray, mean_kl: np.ndarray, is_rock: np.ndarray, *, texts: Mapping[int, str] | None = None
) -> Figure:
    """Return mean KL over count: a point for each type that occurs, and a band for 8 in 10 types of similar count.

    Args:
        count (`np.ndarray`): Occurrences of each type, `(V,)`.
        mean_kl (`np.ndarray`): Its mean KL, nats per token, `(V,)`; NaN where it is not known.
        is_rock (`np.ndarray`): Whether it is a rock, `(V,)`.
        texts (`Mapping[int, str]`, *optional*):
            Texts of types by index. If given, the 8 rocks with the highest count × mean KL are named, those that have
            no text here by their index.
    """
    count = np.asarray(count, dtype=float)
    mean_kl = np.asarray(mean_kl, dtype=float)
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
    shown_count = count[shown]
    shown_kl = mean_kl[shown]
    centres, (low, median, high) = count_band(shown_count, shown_kl)
    name = "10 to 90 % of types of similar count"
    axes.fill_between(centres, low, high, color=canvas.GREY, alpha=0.3, linewidth=0, label=name)
    axes.plot(centres, median, "--", color=canvas.INK, linewidth=1.2, label="their median")

    # The axis spans at least a decade, so that it has two numbers.
    fewest = shown_count.min()
    most = max(shown_count.max(), 10 * fewest)
    axes.set_xlim(fewest / 1.4, most * 1.4)
    canvas.limit_nats(axes.set_ylim, shown_kl)

    if texts is not None:
        rocks = np.flatnonzero(shown & is_rock)
        mass = count[rocks] * mean_kl[rocks]
        rocks = rocks[np.argsort(-mass, kind="stable")][:LABELS]
        names = [texts.get(index, f"({index})") for index in rocks.tolist()]
        _name_beside(axes, count[rocks], mean_kl[rocks], names)
    canvas.add_legend(figure, axes, columns=2)
    return figure


def count_band(count: np.ndarray, mean_kl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres of bins of count, `(B,)`, and the 10th, 50th and 90th percentile of mean KL, nats, `(3, B)`.

    A bin is a quarter of a decade wide and has at least five types; its centre is the geometric mean of their counts.

    Args:
        count (`np.ndarray`): Occurrences of each type, at least 1, `(N,)`.
        mean_kl (`np.ndarray`): Its mean KL, nats per token, `(N,)`.
    """
    # A count that is the edge of a bin belongs to the bin above, also where rounding puts its logarithm below the edge.
    bins = np.floor(np.log10(count) * BINS_PER_DECADE + 1e-9)
    centres = []
    band = []
    for place in np.unique(bins):
        members = bins == place
        if members.sum() >= LEAST_TYPES:
            log_count = np.log(count[members]).mean()
            centres.append(np.exp(log_count))
            quantiles = np.quantile(mean_kl[members], QUANTILES)
            band.append(quantiles)

    # Without bins, the band is still of the shape (3, 0).
    percentiles = np.array(band).reshape(-1, len(QUANTILES))
    return np.array(centres), percentiles.T


@canvas.house_style
def plot_before_after(before: np.ndarray, after: np.ndarray, is_rock: np.ndarray) -> Figure:
    """Return the mean KL of each type after distillation over the one before; a type on the diagonal did not change.

    Args:
        before, after (`np.ndarray`): Mean KL of each type, nats per token, `(V,)`; NaN where it is not known.
        is_rock (`np.ndarray`): Whether it is a rock, `(V,)`.
    """
    before = np.asarray(before, dtype=float)
    after = np.asarray(after, dtype=float)
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
    limits = canvas.limit_both(axes, before[shown], after[shown])
    axes.plot(limits, limits, color=canvas.INK, linewidth=0.8, label="no change")
    canvas.add_legend(figure, axes, columns=3)
    return figure


@canvas.house_style
def plot_sweep(sweep: Sweep) -> Figure:
    """Return coverage and stability over the cutoff K, with the chosen K marked.

    Args:
        sweep (`Sweep`): The sweep of the cutoff; if its `stability` is empty, only coverage is drawn.
    """
    title = "How many types are rocks: overlap of two draws, and coverage"
    if not sweep.stability:
        title = "How many types are rocks: coverage only, no draws were compared"
    figure, axes = canvas.new_figure(title, "cutoff K (types)", "share (0 to 1)")

    name = "coverage: share of the divergence"
    marker = "." if len(sweep.cutoffs) == 1 else ""  # a line through a single point is invisible
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
    """Return two bars for each family: its share of the tokens, and its share of the divergence.

    Args:
        names (`Sequence[str]`): The families, at the top first.
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
    look = {"height": 0.36, "edgecolor": canvas.INK, "linewidth": 0.4}
    tokens = np.nan_to_num(np.asarray(token_share, dtype=float))
    axes.barh(rows - 0.19, tokens, color=canvas.BLUE, hatch="", label="of the tokens", **look)
    kl = np.nan_to_num(np.asarray(kl_share, dtype=float))
    axes.barh(rows + 0.19, kl, color=canvas.VERMILLION, hatch="////", label="of the divergence", **look)

    axes.xaxis.set_major_formatter(canvas.percent)
    canvas.name_rows(axes, [canvas.label(name) for name in names])
    if names:
        canvas.add_legend(figure, axes, columns=2)
    else:
        canvas.say_empty(axes, "No token has a family.")
    return figure


def _draw_types(axes: Axes, x: np.ndarray, y: np.ndarray, is_rock: np.ndarray, shown: np.ndarray) -> None:
    """Draw the types that are shown as points, with the rocks on top of the others."""
    others = shown & ~is_rock
    look = {"colour": canvas.BLUE, "marker": "o", "size": 2.6, "alpha": 0.55, "label": "other types"}
    canvas.add_points(axes, x[others], y[others], **look)

    rocks = shown & is_rock
    look = {"colour": canvas.VERMILLION, "marker": "D", "size": 4.5, "alpha": 0.9, "label": "rocks"}
    canvas.add_points(axes, x[rocks], y[rocks], **look)


def _name_beside(axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> None:
    """Name points in a column to the right of the axes, in the order of their heights, so that no two names overlap.

    Args:
        axes (`Axes`): Axes with their final limits.
        x, y (`np.ndarray`): The points, `(N,)`.
        names (`Sequence[str]`): Their names.
    """
    to_axes = axes.transScale + axes.transLimits
    heights = to_axes.transform(np.column_stack([x, y]))[:, 1]
    order = np.argsort(heights)
    places = heights[order]
    # Names that are too close move up, each above the one below it, and then down from the top if they left the axes.
    for row in range(1, len(places)):
        places[row] = max(places[row], places[row - 1] + GAP)
    highest = 1.0
    for row in reversed(range(len(places))):
        places[row] = min(places[row], highest)
        highest = places[row] - GAP

    # The offset is in points, because the width of the axes is known only after the layout.
    beside = offset_copy(axes.transAxes, axes.figure, x=10, units="points")
    line = {"arrowstyle": "-", "color": canvas.INK, "alpha": 0.4, "linewidth": 0.6}
    line |= {"shrinkA": 1, "shrinkB": 3, "relpos": (0.0, 0.5)}
    for place, point in zip(places, order, strict=True):
        axes.annotate(
            canvas.label(names[point]),
            xy=(x[point], y[point]),
            xytext=(1.0, place),
            textcoords=beside,
            va="center",
            fontsize="small",
            arrowprops=line,
        )
