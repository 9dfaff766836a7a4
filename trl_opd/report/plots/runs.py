"""Plots of training runs: metrics over optimizer steps, where the time goes, and how the arms compare at the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..text import visible
from . import canvas

ARMS = ("uniform", "rock", "control", "random")
ARM_NAMES = {
    "uniform": "uniform (all weigh alike)",
    "rock": "rock (rocks weigh less)",
    "control": "control (controls weigh less)",
    "random": "random (random positions weigh less)",
}
DASHES = {"rocks": "-", "controls": ":", "the rest": "--"}
# Most points of a line: more cannot be seen, and would only make the page larger.
MOST_POINTS = 400
# Most markers on a line; on a longer line only some points have one.
MOST_MARKERS = 15
# Longest name of a metric, in characters.
NAME = 60

# A value and the two ends of its 95 % interval, which are `None` if there is none.
Estimate = tuple[float, float | None, float | None]


@canvas.house_style
def plot_accuracy(
    curves: Mapping[str, Sequence[tuple[int, float, float | None, float | None]]], problems: int | None
) -> Figure:
    """Return accuracy over optimizer steps: a line for each arm, within a band where it has intervals.

    Args:
        curves (`Mapping[str, Sequence[tuple]]`):
            Points of each arm: step, accuracy, and the two ends of its 95 % interval, which may be `None`.
        problems (`int`, *optional*): Number of problems behind each point.
    """
    y = "accuracy"
    if problems is not None:
        y += f" on {problems} problems"
    title = "Accuracy by arm while distilling"
    figure, axes = canvas.new_figure(title, "optimizer step", y)

    has_intervals = False
    for arm, (colour, marker, dash, _) in _looks(curves).items():
        # A long line is thinned and not averaged, because a mean of several intervals is not an interval.
        points = curves[arm]
        every = _stride(len(points), MOST_POINTS)
        steps, values, lows, highs = _columns(points[::every], 4)
        look = _markers(marker, len(steps))
        axes.plot(steps, values, color=colour, ls=dash, label=_name(arm), **look)
        if np.isfinite(lows + highs).any():
            has_intervals = True
            axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
        if len(steps) == 1:  # a band around a single point has no area
            axes.vlines(steps, lows, highs, color=colour)

    if has_intervals:
        axes.set_title(f"{title}, with 95 % intervals")
    _finish(figure, axes, share=True)
    return figure


@canvas.house_style
def plot_divergence(
    curves: Mapping[str, Sequence[tuple[int, float | None, float | None, float | None]]], divergence: str
) -> Figure:
    """Return the mean divergence over steps: rocks solid, controls dotted, the rest dashed, with a colour per arm.

    Args:
        curves (`Mapping[str, Sequence[tuple]]`):
            Points of each arm: last step of the window, and the mean divergence of rocks, of controls and of the rest,
            nats; `None` where a window has no such token.
        divergence (`str`): Name of the divergence, for the axis.
    """
    y = f"mean {visible(divergence, NAME)} per token (nats)"
    figure, axes = canvas.new_figure("Divergence by kind of token and by arm", "optimizer step", y)
    looks = _looks(curves)
    every = _window(curves)
    shown = set()
    for arm, (colour, marker, _, _) in looks.items():
        columns = _columns(curves[arm], 4)
        steps, *kinds = _means(columns, every)
        look = _markers(marker, len(steps))
        for (kind, dash), values in zip(DASHES.items(), kinds, strict=True):
            if np.isfinite(values).any():
                shown.add(kind)
                axes.plot(steps, values, color=colour, ls=dash, **look)

    # The legend has an entry for each arm and for each kind, which are fewer than their combinations.
    for arm, (colour, marker, _, _) in looks.items():
        axes.plot([], [], color=colour, marker=marker, label=_name(arm))
    for kind, dash in DASHES.items():
        if kind in shown:
            axes.plot([], [], color=canvas.INK, ls=dash, label=kind)
    _finish(figure, axes, every=every, from_zero=True)
    return figure


@canvas.house_style
def plot_curves(
    curves: Mapping[str, Sequence[tuple[int, float | None]]], title: str, y: str, *, share: bool = False
) -> Figure:
    """Return a metric over optimizer steps, with a line for each arm.

    Args:
        curves (`Mapping[str, Sequence[tuple]]`): Points of each arm: step and value.
        title (`str`): Title of the plot.
        y (`str`): The metric, with its unit.
        share (`bool`, *optional*, defaults to `False`): Whether the metric is a share, on an axis in percent from 0.
    """
    figure, axes = canvas.new_figure(title, "optimizer step", y)
    every = _window(curves)
    for arm, (colour, marker, dash, _) in _looks(curves).items():
        columns = _columns(curves[arm], 2)
        steps, values = _means(columns, every)
        look = _markers(marker, len(steps))
        axes.plot(steps, values, color=colour, ls=dash, label=_name(arm), **look)
    _finish(figure, axes, every=every, share=share)
    return figure


@canvas.house_style
def plot_phases(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Return the mean time of an optimizer step: a bar for each arm, stacked from its phases.

    Args:
        seconds (`Mapping[str, Mapping[str, float]]`): Mean seconds of each phase, for each arm.
    """
    size = (6.4, 1.7 + 0.4 * max(len(seconds), 1))
    figure, axes = canvas.new_figure(
        "Where the time of an optimizer step goes", "mean seconds of an optimizer step", "", size=size, grid="x"
    )
    phases = dict.fromkeys(itertools.chain.from_iterable(seconds.values()))
    rows = range(len(seconds))
    left = np.zeros(len(seconds))
    for place, phase in enumerate(phases):
        look = canvas.look_of(place)
        width = np.nan_to_num([arm.get(phase, 0.0) for arm in seconds.values()])
        axes.barh(
            rows,
            width,
            height=0.6,
            left=left,
            label=canvas.label(phase),
            color=look.colour,
            hatch=look.hatch,
            edgecolor=canvas.INK,
            linewidth=0.4,
        )
        left += width

    canvas.name_rows(axes, [canvas.label(arm) for arm in seconds])
    if phases:
        canvas.add_legend(figure, axes, columns=4)
    else:
        canvas.say_empty(axes, "No time was measured.")
    return figure


@canvas.house_style
def plot_arms(results: Mapping[str, Estimate], differences: Mapping[str, Estimate], what: str) -> Figure:
    """Return the accuracies of the arms at the end, and their differences to the uniform arm, with intervals.

    Args:
        results (`Mapping[str, tuple]`): Accuracy of each arm, and the two ends of its interval, which may be `None`.
        differences (`Mapping[str, tuple]`): The same for its difference to the uniform arm.
        what (`str`): Name of the accuracy, for the axis.
    """
    arms = list({**results, **differences})
    figure = Figure(figsize=(7.2, 1.5 + 0.42 * max(len(arms), 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)

    title = "How the arms end: accuracy, and difference to uniform"
    estimates = itertools.chain(results.values(), differences.values())
    if any(low is not None for _, low, _ in estimates):
        title += " (95 % intervals)"
    figure.suptitle(title, x=0.01, ha="left")

    looks = _looks(arms)
    for axes, values in ((left, results), (right, differences)):
        for row, (arm, look) in enumerate(looks.items()):
            if arm in values:
                _draw_estimate(axes, row, values[arm], look)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(canvas.percent)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)

    right.axvline(0.0, color=canvas.INK, linewidth=0.8)
    right.xaxis.set_major_formatter(_percentage_points)
    left.set_xlabel(visible(what, NAME))
    right.set_xlabel("difference to uniform (percentage points)")
    if not differences:
        canvas.say_empty(right, "Nothing was compared.")
    if not results:
        canvas.say_empty(left, "No arm has ended.")
    canvas.name_rows(left, [canvas.label(arm) for arm in arms])
    return figure


def _draw_estimate(axes: Axes, row: int, estimate: Estimate, look: canvas.Look) -> None:
    value, low, high = estimate
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color=look.colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot([value], [row], look.marker, color=look.colour, markersize=6)


def _percentage_points(value: float, _) -> str:
    if abs(value) <= 1e-9:  # a tick at zero may be off by rounding
        return "0"
    return f"{100 * value:+.4g}".replace("-", "−")


def _looks(arms: Iterable[str]) -> dict[str, canvas.Look]:
    """Return the look of each arm; our arms look the same in every plot, and others take the looks that are free."""
    arms = list(arms)
    free = [place for place, arm in enumerate(ARMS) if arm not in arms]
    free += range(len(ARMS), len(ARMS) + len(arms))
    free.reverse()
    looks = {}
    for arm in arms:
        place = ARMS.index(arm) if arm in ARMS else free.pop()
        looks[arm] = canvas.look_of(place)
    return looks


def _name(arm: str) -> str:
    return ARM_NAMES.get(arm) or canvas.label(arm)


def _columns(points: Sequence[tuple], size: int) -> np.ndarray:
    """Return the columns of points of `size` numbers, `(size, N)`, with NaN for `None`."""
    return np.array(points, dtype=float).reshape(-1, size).T


def _window(curves: Mapping[str, Sequence]) -> int:
    """Return how many values are averaged to one point, so that the longest line has at most 400 points."""
    longest = max(map(len, curves.values()), default=0)
    return _stride(longest, MOST_POINTS)


def _stride(points: int, most: int) -> int:
    """Return the smallest stride through so many points that visits at most `most` of them, at least 1."""
    return max(1, math.ceil(points / most))


def _means(columns: np.ndarray, every: int) -> np.ndarray:
    """Return the last step of each window of `every` points, and the means of its known values, `(size, windows)`.

    Args:
        columns (`np.ndarray`): Steps in the first row, values in the others, `(size, N)`; NaN and infinity are unknown.
        every (`int`): Points of a window; the last window may have fewer.
    """
    points = columns.shape[1]
    if every == 1 or points == 0:
        return columns

    starts = np.arange(0, points, every)
    ends = np.minimum(starts + every, points)
    values = columns[1:]
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    counts = np.add.reduceat(known.astype(int), starts, axis=1)
    sums = np.add.reduceat(filled, starts, axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: a window without a known value has no mean
        means = sums / counts
    steps = columns[:1, ends - 1]
    return np.concatenate([steps, means])


def _markers(marker: str, points: int) -> dict:
    """Return marker and width of a line with so many points; a line with few markers is thinner."""
    every = _stride(points, MOST_MARKERS)
    width = 1.0 if every > 4 else 1.5
    return {"marker": marker, "markevery": every, "linewidth": width}


def _finish(figure: Figure, axes: Axes, *, every: int = 1, share: bool = False, from_zero: bool = False) -> None:
    """Set ticks, limits and legend of curves over steps, or say that nothing was measured.

    Args:
        every (`int`, *optional*): How many values a point is the mean of.
        share (`bool`, *optional*): Whether the y axis is a share, in percent from 0.
        from_zero (`bool`, *optional*): Whether the y axis starts at 0.
    """
    low, high = axes.dataLim.intervaly
    if not (math.isfinite(low) and math.isfinite(high)):
        canvas.say_empty(axes, "Nothing was measured.")
        return

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    if every > 1:
        axes.set_xlabel(f"optimizer step (a point is the mean of {every} values)")
    if share:
        axes.yaxis.set_major_formatter(canvas.percent)
        # A share that stays small gets a shorter axis, but never below 10 %, where a thousandth would look large.
        top = max(high, 1.0) if high > 0.5 else max(1.25 * high, 0.1)
        room = 0.02 * min(top, 1.0)
        axes.set_ylim(min(low, 0.0) - room, top + room)
    elif from_zero:
        axes.set_ylim(bottom=min(low, 0.0))
    canvas.add_legend(figure, axes, columns=2)
