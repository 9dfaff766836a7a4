"""Plots, drawn by Matplotlib into PNG files; colours that colour-blind people can tell apart (Okabe and Ito 2008)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..cutoff import LEAST_JACCARD, Sweep
from ..files import complete_file
from ..gradient_study import GROUPS, Study

ARM_COLOURS = {"uniform": "#0072B2", "rock": "#D55E00", "control": "#009E73", "random": "#CC79A7"}
KIND_STYLES = {
    "rock": ("#D55E00", "s"),
    "rocks": ("#D55E00", "D"),
    "control": ("#009E73", "^"),
    "controls": ("#009E73", "v"),
    "other": ("#0072B2", "o"),
}
GROUP_STYLES = {"rock": ("#D55E00", "s"), "rare": ("#0072B2", "o"), "random": ("#999999", "^")}
MOST_ROWS = 60  # of a forest plot
ARM_MARKERS = {"uniform": "o", "rock": "s", "control": "^", "random": "D"}


def plot_accuracy(curves: Mapping[str, Sequence[tuple[int, float]]], problems: int, path: str | os.PathLike) -> None:
    """Draw accuracy over optimizer steps, a line for each arm.

    Args:
        curves (`Mapping[str, Sequence[tuple[int, float]]]`): For each arm, its points (step, accuracy).
        problems (`int`): Number of problems behind each point.
        path (`str` or `os.PathLike`): The PNG file.
    """
    figure, axes = _figure(
        "Accuracy by arm while distilling", "optimizer step", f"greedy accuracy on {problems} problems"
    )
    for arm, points in curves.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=ARM_COLOURS[arm], marker=ARM_MARKERS[arm], markersize=4, label=_arm_label(arm))
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_divergence(
    curves: Mapping[str, Sequence[tuple[int, float | None, float | None]]], divergence: str, path: str | os.PathLike
) -> None:
    """Draw the mean divergence of rocks (solid) and of the rest (dashed) over steps, a colour for each arm.

    Args:
        curves (`Mapping`): For each arm, its points (last step of the window, rocks' mean, others' mean), in nats;
            `None` where a window has no such position.
        divergence (`str`): Name of the divergence, for the axis.
        path (`str` or `os.PathLike`): The PNG file.
    """
    figure, axes = _figure(
        "Divergence of rock tokens and of the rest, by arm", "optimizer step", f"mean {divergence} per token (nats)"
    )
    for arm, points in curves.items():
        steps = [step for step, _, _ in points]
        for place, style, what in ((1, "-", "rocks"), (2, "--", "the rest")):
            values = [float("nan") if point[place] is None else point[place] for point in points]
            label = f"{what}, {_arm_label(arm)}"
            axes.plot(steps, values, style, color=ARM_COLOURS[arm], marker=ARM_MARKERS[arm], markersize=4, label=label)
    axes.set_ylim(bottom=0.0)
    figure.legend(loc="outside lower center", ncols=len(curves), frameon=False, fontsize="x-small")
    _save(figure, path)


def plot_sweep(sweep: Sweep, path: str | os.PathLike) -> None:
    """Draw coverage and stability over the cutoff K, and the K that was chosen.

    Args:
        sweep (`Sweep`): What each cutoff would mean.
        path (`str` or `os.PathLike`): The PNG file.
    """
    figure, axes = _figure(
        "How many types are rocks: overlap of two draws, and coverage", "cutoff K (types)", "share (0 to 1)"
    )
    colours, markers = list(ARM_COLOURS.values()), list(ARM_MARKERS.values())
    axes.plot(sweep.cutoffs, sweep.coverage, "--", color="black", label="coverage: share of the divergence")
    for place, (size, values) in enumerate(sweep.stability.items()):
        label = f"overlap (Jaccard) of {size} rollouts and {size} others"
        axes.plot(sweep.cutoffs, values, color=colours[place], marker=markers[place], markersize=3, label=label)
    axes.axhline(LEAST_JACCARD, color="grey", linewidth=0.8)
    if sweep.top_k is not None:
        axes.axvline(sweep.top_k, color="grey", linestyle=":", label=f"chosen: K = {sweep.top_k}")
    axes.set_ylim(0.0, 1.02)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="x-small")
    _save(figure, path)


def plot_forest(result: dict, path: str | os.PathLike) -> None:
    """Draw the effects of forbidding tokens with their intervals, the largest at the ends.

    Args:
        result (`dict`): Result of the probe.
        path (`str` or `os.PathLike`): The PNG file.
    """
    arms = [arm for arm in result["arms"] if arm["ci95"] is not None]
    arms = arms if len(arms) <= MOST_ROWS else [*arms[: MOST_ROWS // 2], *arms[-MOST_ROWS // 2 :]]
    figure, axes = _figure(
        "What forbidding a token does to the reward",
        f"difference of the mean reward, {result['problems']} problems",
        "",
    )
    figure.set_figheight(1.6 + 0.22 * max(len(arms), 4))
    for place, arm in enumerate(reversed(arms)):
        colour, marker = KIND_STYLES[arm["kind"]]
        low, high = arm["ci95"]
        axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
        axes.plot(arm["effect"], place, marker, color=colour, markersize=5)
    names = [ascii("".join(arm["texts"])) if len(arm["ids"]) == 1 else f"all {arm['kind']}" for arm in reversed(arms)]
    axes.set_yticks(range(len(arms)), names, fontsize="x-small")
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_ylim(-1, len(arms))
    for kind in sorted({arm["kind"] for arm in arms}):
        colour, marker = KIND_STYLES[kind]
        axes.plot([], [], marker, color=colour, label=kind)
    if arms:
        axes.legend(frameon=False, fontsize="x-small")
    _save(figure, path)


def plot_gradients(found: Study, path: str | os.PathLike) -> None:
    """Draw four panels: norm over count, norms by group, cosines by group, and divergence early against late.

    Args:
        found (`Study`): Result of the gradient study.
        path (`str` or `os.PathLike`): The PNG file.
    """
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    (scatter, norms), (cosines, change) = figure.subplots(2, 2)
    figure.suptitle("Gradients of the logits by token type", x=0.01, ha="left")
    for group, (colour, marker) in GROUP_STYLES.items():
        chosen = found.columns["group"] == group
        points = {"color": colour, "marker": marker, "s": 14, "alpha": 0.7, "label": GROUPS[group]}
        scatter.scatter(found.columns["count"][chosen], found.columns["norm"][chosen], **points)
        if found.has_early:
            change.scatter(found.columns["mean_kl_early"][chosen], found.columns["mean_kl"][chosen], **points)
    scatter.set(xscale="log", yscale="log", xlabel="occurrences n", ylabel="norm of the mean gradient")
    count, norm = found.columns["count"], found.columns["norm"]
    edge = np.array([count.min(), count.max()])
    noise = np.median(norm * np.sqrt(count)) / np.sqrt(edge)
    scatter.plot(edge, noise, "--", color="grey", label="1/sqrt(n): noise alone")
    scatter.legend(frameon=False, fontsize="x-small")
    for axes, names, title in (
        (norms, ("norm", "norm_unbiased", "norm_matched"), "norm of the mean gradient"),
        (cosines, ("cos_balanced", "cos_balanced_without", "cos_matched"), "cosine to G_balanced"),
    ):
        for place, group in enumerate(GROUP_STYLES):
            boxes = axes.boxplot(
                [found.of(group, name) for name in names],
                positions=[column + 0.25 * (place - 1) for column in range(3)],
                widths=0.2,
                showfliers=False,
                medianprops={"color": "black"},
                patch_artist=True,
            )
            for box in boxes["boxes"]:
                box.set_facecolor(GROUP_STYLES[group][0])
        axes.set_xticks(range(3), ["as published", "corrected", "equal n"])
        axes.set_ylabel(title)
    if found.has_early:
        top = np.nanmax([found.columns["mean_kl_early"], found.columns["mean_kl"]])
        change.plot([0, top], [0, top], color="grey", linewidth=0.8)
        change.set(xlabel="mean KL, early (nats)", ylabel="mean KL, late (nats)")
    else:
        change.set_axis_off()
        change.text(0.0, 0.5, "No earlier occurrences were given (--early).", fontsize="small")
    _save(figure, path)


def _arm_label(arm: str) -> str:
    return {"uniform": "uniform (nothing frozen)", "random": "random positions frozen"}.get(arm, f"{arm}s frozen")


def _figure(title: str, x: str, y: str):
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: str | os.PathLike) -> None:
    FigureCanvasAgg(figure)
    with complete_file(path) as part:
        figure.savefig(part, format="png", dpi=144)
