"""Plots of training runs: what changes over optimizer steps, where the time goes, and how the arms end."""

from __future__ import annotations

import itertools
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
MOST_POINTS = 400  # of a line: more cannot be seen, and are many bytes
NAME = 60  # signs of the name of a metric
MOST_MARKERS = 15  # on a line; a longer one is marked here and there

Estimate = tuple[float, float | None, float | None]  # with the ends of its interval, where it has one


@canvas.house_style
def plot_accuracy(
    curves: Mapping[str, Sequence[tuple[int, float, float | None, float | None]]], problems: int | None
) -> Figure:
    """Return accuracy over optimizer steps: a line for each arm, in a band where there are intervals.

    Args:
        curves (`Mapping[str, Sequence[tuple]]`):
            For each arm, its points (step, accuracy, low, high): the ends of the 95 % interval, or `None`.
        problems (`int`, *optional*): Number of problems behind each point.
    """
    y = "accuracy" if problems is None else f"accuracy on {problems} problems"
    figure, axes = canvas.new_figure("Accuracy by arm while distilling", "optimizer step", y)
    intervals = False
    for arm, (colour, marker, dash, _) in _looks(curves).items():
        every = max(1, -(-len(curves[arm]) // MOST_POINTS))  # an interval of several means would be no interval
        steps, values, lows, highs = _columns(curves[arm][::every], 4)
        axes.plot(steps, values, color=colour, ls=dash, label=_name(arm), **_markers(marker, steps))
        if np.isfinite(lows + highs).any():
            intervals = True
            axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
        if len(steps) == 1:  # a band of one point is nothing
            axes.vlines(steps, lows, highs, color=colour)
    if intervals:
        axes.set_title("Accuracy by arm while distilling, with 95 % intervals")
    _finish(figure, axes, share=True)
    return figure


@canvas.house_style
def plot_divergence(
    curves: Mapping[str, Sequence[tuple[int, float | None, float | None, float | None]]], divergence: str
) -> Figure:
    """Return the mean divergence over steps: rocks solid, controls dotted, the rest dashed, a colour for each arm.

    Args:
        curves (`Mapping[str, Sequence[tuple]]`):
            For each arm, its points (last step of the window, mean of rocks, of controls, of others), nats; `None`
            where a window has no such position.
        divergence (`str`): Name of the divergence, for the axis.
    """
    figure, axes = canvas.new_figure(
        "Divergence by kind of token and by arm", "optimizer step", f"mean {visible(divergence, NAME)} per token (nats)"
    )
    every, shown = _window(curves), set()
    for arm, (colour, marker, _, _) in _looks(curves).items():
        steps, *kinds = _means(_columns(curves[arm], 4), every)
        for (kind, dash), values in zip(DASHES.items(), kinds, strict=True):
            if np.isfinite(values).any():
                shown.add(kind)
                axes.plot(steps, values, color=colour, ls=dash, **_markers(marker, steps))
    # A colour and marker for each arm and a dash for each kind, instead of a line for each pair.
    for arm, (colour, marker, _, _) in _looks(curves).items():
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
    """Return a metric over optimizer steps, a line for each arm.

    Args:
        curves (`Mapping[str, Sequence[tuple]]`): For each arm, its points (step, value).
        title (`str`): What one sees.
        y (`str`): The metric, with its unit.
        share (`bool`, *optional*, defaults to `False`): Whether it is a share: the axis begins at 0, in percent.
    """
    figure, axes = canvas.new_figure(title, "optimizer step", y)
    every = _window(curves)
    for arm, (colour, marker, dash, _) in _looks(curves).items():
        steps, values = _means(_columns(curves[arm], 2), every)
        axes.plot(steps, values, color=colour, ls=dash, label=_name(arm), **_markers(marker, steps))
    _finish(figure, axes, every=every, share=share)
    return figure


@canvas.house_style
def plot_phases(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Return where the time of an optimizer step goes: a bar for each arm, of its phases.

    Args:
        seconds (`Mapping[str, Mapping[str, float]]`): For each arm, the mean seconds of each phase.
    """
    size = (6.4, 1.7 + 0.4 * max(len(seconds), 1))
    figure, axes = canvas.new_figure(
        "Where the time of an optimizer step goes", "mean seconds of an optimizer step", "", size=size, grid="x"
    )
    phases = list(dict.fromkeys(phase for arm in seconds.values() for phase in arm))
    left = np.zeros(len(seconds))
    for place, phase in enumerate(phases):
        colour, _, _, hatch = canvas.look_of(place)
        width = np.nan_to_num([arm.get(phase, 0.0) for arm in seconds.values()])
        rows = range(len(seconds))
        look = {"color": colour, "hatch": hatch, "edgecolor": canvas.INK, "linewidth": 0.4}
        axes.barh(rows, width, 0.6, left, label=canvas.label(phase), **look)
        left += width
    canvas.name_rows(axes, [canvas.label(arm) for arm in seconds])
    if phases:
        canvas.add_legend(figure, axes, columns=4)
    else:
        canvas.say_empty(axes, "No time was measured.")
    return figure


@canvas.house_style
def plot_arms(results: Mapping[str, Estimate], differences: Mapping[str, Estimate], what: str) -> Figure:
    """Return how the arms end: their accuracies, and the differences to the uniform arm, with intervals.

    Args:
        results (`Mapping[str, tuple]`): For each arm, its accuracy and the ends of its interval, or `None` for them.
        differences (`Mapping[str, tuple]`): The same for the difference to the uniform arm.
        what (`str`): Name of the accuracy, for the axis.
    """
    arms = list(dict.fromkeys([*results, *differences]))
    figure = Figure(figsize=(7.2, 1.5 + 0.42 * max(len(arms), 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    known = any(low is not None for _, low, _ in (*results.values(), *differences.values()))
    title = "How the arms end: accuracy, and difference to uniform" + (" (95 % intervals)" if known else "")
    figure.suptitle(title, x=0.01, ha="left")
    for axes, values in ((left, results), (right, differences)):
        for arm, (colour, marker, _, _) in _looks(arms).items():
            if arm in values:
                _draw_estimate(axes, arms.index(arm), values[arm], colour, marker)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(canvas.percent)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
    right.axvline(0.0, color=canvas.INK, linewidth=0.8)
    right.xaxis.set_major_formatter(_points)
    left.set_xlabel(visible(what, NAME))
    right.set_xlabel("difference to uniform (percentage points)")
    if not differences:
        canvas.say_empty(right, "Nothing was compared.")
    if not results:
        canvas.say_empty(left, "No arm has ended.")
    canvas.name_rows(left, [canvas.label(arm) for arm in arms])
    return figure


def _draw_estimate(axes: Axes, row: int, estimate: Estimate, colour: str, marker: str) -> None:
    value, low, high = estimate
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot([value], [row], marker, color=colour, markersize=6)


def _points(value: float, _) -> str:
    return f"{100 * value:+.4g}".replace("-", "−") if abs(value) > 1e-9 else "0"


def _looks(arms: Iterable[str]) -> dict[str, canvas.Look]:
    """Return the look of each arm: the known ones have the same in all plots, others have what these leave."""
    arms = list(arms)
    free = (place for place in itertools.count() if place >= len(ARMS) or ARMS[place] not in arms)
    return {arm: canvas.look_of(ARMS.index(arm) if arm in ARMS else next(free)) for arm in arms}


def _name(arm: str) -> str:
    return ARM_NAMES.get(arm) or canvas.label(arm)


def _columns(points: Sequence[tuple], size: int) -> np.ndarray:
    """Return the columns of points, `(size, N)`, NaN for what is not known."""
    rows = [[float("nan") if value is None else float(value) for value in point] for point in points]
    return np.array(rows, dtype=float).reshape(-1, size).T


def _window(curves: Mapping[str, Sequence]) -> int:
    """Return of how many values a point of a line is the mean."""
    return max([1, *(-(-len(points) // MOST_POINTS) for points in curves.values())])


def _means(columns: np.ndarray, every: int) -> np.ndarray:
    """Return the last step and the means of what is known in windows of so many points."""
    starts = np.arange(0, columns.shape[1], every)
    if every == 1 or len(starts) == 0:
        return columns
    ends = np.minimum(starts + every, columns.shape[1])
    known = np.isfinite(columns[1:])
    counts = np.add.reduceat(known.astype(int), starts, axis=1)
    sums = np.add.reduceat(np.where(known, columns[1:], 0.0), starts, axis=1)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return np.concatenate([columns[:1, ends - 1], means])


def _markers(marker: str, steps: Sequence[float]) -> dict:
    every = -(-len(steps) // MOST_MARKERS)
    return {"marker": marker, "markevery": max(1, every), "linewidth": 1.0 if every > 4 else 1.5}


def _finish(figure: Figure, axes: Axes, *, every: int = 1, share: bool = False, from_zero: bool = False) -> None:
    """Set the limits of curves over steps, and name them; or say that there are none."""
    low, high = axes.dataLim.intervaly
    if not np.isfinite([low, high]).all():
        canvas.say_empty(axes, "Nothing was measured.")
        return
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    if every > 1:
        axes.set_xlabel(f"optimizer step (a point is the mean of {every} values)")
    if share:
        axes.yaxis.set_major_formatter(canvas.percent)
        # Shares that stay small are to be seen, and no axis is so short that a thousandth looks like much.
        top = max(high, 1.0) if high > 0.5 else max(1.25 * high, 0.1)
        room = 0.02 * min(top, 1.0)
        axes.set_ylim(min(low, 0.0) - room, top + room)
    elif from_zero:
        axes.set_ylim(bottom=min(low, 0.0))
    canvas.add_legend(figure, axes, columns=2)
