"""`trl-opd demo`: distil, find the tokens that never converge, freeze them, and compare with a control."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from transformers.utils import logging

from ..artefacts.atomic import write_json
from ..artefacts.run_files import REPORT_FILE, ROCK_SET_FILE, SUMMARY_FILE, SUMMARY_VERSION, find_checkpoints
from ..artefacts.token_stats import TokenStats, merge_last_quarter
from ..opd_config import TOKEN_WEIGHTINGS
from ..report.build import write_report
from ..report.plots.canvas import save_png
from ..report.plots.runs import plot_accuracy, plot_divergence
from ..report.token_types import kind_means
from ..rocks.controls import mass_matched_controls, with_texts
from ..rocks.from_statistics import detect_rocks
from ..rocks.rock_set import RockSet
from ..saving.student import write_card
from ..statistics import accuracy_interval, paired_difference
from .arithmetic import PLANTED_ROCKS
from .arms import (
    CURVE_PROBLEMS,
    EVAL_PROBLEMS,
    ArmResult,
    eval_problems,
    load,
    run_arm,
    solve,
)

ARMS = TOKEN_WEIGHTINGS
TASK = "word problems of three-digit addition, answered in worked steps"


def run_demo(output_dir: Path, *, seed: int, steps: int, arms: list[str]) -> tuple[dict, list[str]]:
    """Run the demo, or what is missing of it, and write `summary.json`, two plots, cards and the report.

    Args:
        output_dir (`Path`): Where everything goes; arms that are finished there with the same settings are kept.
        seed (`int`): Seed of prompts, rollouts and controls.
        steps (`int`): Optimizer steps of each arm.
        arms (`list[str]`): The arms to run beside "uniform".

    Returns:
        `tuple[dict, list[str]]`: the summary, and a sentence for each arm that could not run.
    """
    logging.disable_progress_bar()  # of loading and saving: one bar is enough
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    shipped = {name: solve(*load(name), eval_problems()) for name in ("student", "teacher")}
    wanted = [arm for arm in ARMS if arm in {"uniform", *arms}]
    path = output_dir / ROCK_SET_FILE
    results: dict[str, ArmResult] = {}
    notes: list[str] = []
    found = None
    for place, arm in enumerate(wanted):
        if reason := None if arm == "uniform" else _cannot_run(arm, found):
            notes.append(reason)
            continue
        rock_set = None if arm == "uniform" else path
        label = f"{arm} ({place + 1} of {len(wanted)})"
        results[arm] = run_arm(arm, output_dir / arm, seed=seed, steps=steps, rock_set=rock_set, label=label)
        if arm == "uniform":
            found = find_rocks(find_checkpoints(output_dir / "uniform"), seed)
            found.save(path)
    summary = {
        "version": SUMMARY_VERSION,
        # Of this call; of arms that were kept from an earlier one, their own time counts.
        "seconds": max(time.perf_counter() - started, sum(result.seconds for result in results.values())),
        "task": TASK,
        "eval_problems": EVAL_PROBLEMS,
        **{key: {"accuracy": sum(shipped[name]) / EVAL_PROBLEMS} for key, name in _SHIPPED.items()},
        "arms": {arm: _arm_summary(result, steps) for arm, result in results.items()},
        "differences": {
            arm: _difference(result, results["uniform"], seed) for arm, result in results.items() if arm != "uniform"
        },
        "rocks": _rock_summary(found),
    }
    write_json(output_dir / SUMMARY_FILE, summary)
    _plot(output_dir, results, found)
    for arm in results:  # again, now that the arms can be compared
        write_card(output_dir / arm, name=f"trl_opd-demo-{arm}")
    write_report(output_dir, output_dir / REPORT_FILE)
    return summary, notes


_SHIPPED = {"start": "student", "teacher": "teacher"}


def find_rocks(windows: list[tuple[int, Path]], seed: int) -> RockSet:
    """Return the rocks of the uniform arm with mass-matched controls.

    Chosen on the last quarter of the run, `before` is its first window. `top_k` is the number of planted types, so that
    precision equals recall when the list is full.

    Args:
        windows (`list[tuple[int, Path]]`): Last step and checkpoint of each window of statistics, in order.
        seed (`int`): Seed of the controls.
    """
    last, _ = merge_last_quarter(windows)
    before = TokenStats.load(windows[0][1]) if len(windows) > 1 else None
    rock_set = detect_rocks(last, before, top_k=len(PLANTED_ROCKS))
    if rock_set.rocks:
        rock_set = dataclasses.replace(rock_set, controls=mass_matched_controls(last, rock_set, seed))
    return with_texts(rock_set, load("student")[1])


def _cannot_run(arm: str, found: RockSet) -> str | None:
    if not found.rocks:
        return f"{arm}: not run, no rocks were found."
    if arm == "control" and not found.controls.matched:
        return "control: not run, no types have the token mass of the rocks; `--arms random` freezes as many positions."
    return None


def _arm_summary(result: ArmResult, steps: int) -> dict:
    return {
        "accuracy": result.accuracy,
        "accuracy_ci95": list(accuracy_interval(result.correct)),
        "seconds": result.seconds,
        "steps": steps,
        "frozen_token_share": result.frozen_token_share,
    }


def _difference(result: ArmResult, baseline: ArmResult, seed: int) -> dict:
    estimate, interval = paired_difference(result.correct, baseline.correct, seed=seed)
    return {"estimate": estimate, "ci95": interval and list(interval), "over": "problems"}


def _rock_summary(found: RockSet) -> dict:
    texts = [rock.text for rock in found.rocks]
    if not texts:
        return {"tokens": [], **dict.fromkeys(("token_share", "kl_share", "planted_precision", "planted_recall"))}
    planted = len(set(texts) & set(PLANTED_ROCKS))
    return {
        "tokens": texts,
        "token_share": found.token_share,
        "kl_share": sum(rock.score for rock in found.rocks) / found.corpus["kl_sum"],
        "planted_precision": planted / len(texts),
        "planted_recall": planted / len(PLANTED_ROCKS),
    }


def _plot(output_dir: Path, results: dict[str, ArmResult], found: RockSet) -> None:
    accuracy = {arm: [_with_interval(*point) for point in result.curve] for arm, result in results.items()}
    save_png(plot_accuracy(accuracy, CURVE_PROBLEMS), output_dir / "accuracy.png")
    # Controls are of the rest: a line of their own for each arm would be too many.
    ids = found.ids.tolist()
    curves = {arm: kind_means(find_checkpoints(output_dir / arm), ids, []) for arm in results}
    save_png(plot_divergence(curves, "KL(student ‖ teacher)"), output_dir / "divergence.png")


def _with_interval(step: int, accuracy: float) -> tuple[int, float, float, float]:
    right = round(accuracy * CURVE_PROBLEMS)
    return step, accuracy, *accuracy_interval([True] * right + [False] * (CURVE_PROBLEMS - right))
