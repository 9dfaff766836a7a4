"""Runs `trl-opd demo`: distils, finds the tokens that never converge, freezes them, and compares with a control arm."""

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
from .arms import CURVE_PROBLEMS, EVAL_PROBLEMS, ArmResult, eval_problems, load, run_arm, solve

ARMS = TOKEN_WEIGHTINGS
TASK = "word problems of three-digit addition, answered in worked steps"


def run_demo(output_dir: Path, *, seed: int, steps: int, arms: list[str]) -> tuple[dict, list[str]]:
    """Run the demo, except what an earlier call finished, and write `summary.json`, two plots, cards and the report.

    Args:
        output_dir (`Path`): Folder for all output; arms that it has with the same settings are not run again.
        seed (`int`): Seed of prompts, rollouts and controls.
        steps (`int`): Optimizer steps of each arm.
        arms (`list[str]`): Arms to run in addition to "uniform".

    Returns:
        `tuple[dict, list[str]]`: the summary, and for each arm that could not run the reason.

    Raises:
        `ValueError`: if the folder of an arm has files that no demo made.
    """
    logging.disable_progress_bar()  # of loading and saving, because each arm has a bar over its steps
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    start = _accuracy("student")
    teacher = _accuracy("teacher")

    results, rock_set, notes = _run_arms(output_dir, seed=seed, steps=steps, arms=arms)
    differences = {}
    for arm, result in results.items():
        if arm != "uniform":
            differences[arm] = _difference(result, results["uniform"], seed)

    arm_seconds = sum(result.seconds for result in results.values())
    summary = {
        "version": SUMMARY_VERSION,
        # Arms that an earlier call finished took no time in this call, so we count the time that they took then.
        "seconds": max(time.perf_counter() - started, arm_seconds),
        "task": TASK,
        "eval_problems": EVAL_PROBLEMS,
        "start": {"accuracy": start},
        "teacher": {"accuracy": teacher},
        "arms": {arm: _arm_summary(result, steps) for arm, result in results.items()},
        "differences": differences,
        "rocks": _rock_summary(rock_set),
    }
    write_json(output_dir / SUMMARY_FILE, summary)
    _plot(output_dir, results, rock_set)
    for arm in results:  # each arm has a card already, but without the comparison that the summary makes possible
        write_card(output_dir / arm, name=f"trl_opd-demo-{arm}")
    write_report(output_dir, output_dir / REPORT_FILE)
    return summary, notes


def _accuracy(name: str) -> float:
    """Return the accuracy of a shipped model on the held-out problems."""
    model, tokenizer = load(name)
    correct = solve(model, tokenizer, eval_problems())
    return sum(correct) / len(correct)


def _run_arms(
    output_dir: Path, *, seed: int, steps: int, arms: list[str]
) -> tuple[dict[str, ArmResult], RockSet, list[str]]:
    """Run the uniform arm, find its rocks and run the other arms; return results, rocks, and reasons for gaps."""
    wanted = [arm for arm in ARMS if arm == "uniform" or arm in arms]
    path = output_dir / ROCK_SET_FILE
    results: dict[str, ArmResult] = {}
    notes: list[str] = []
    rock_set = None  # until the uniform arm, which comes first, has shown the rocks
    for place, arm in enumerate(wanted, 1):
        reason = None if rock_set is None else _cannot_run(arm, rock_set)
        if reason is not None:
            notes.append(reason)
            continue
        results[arm] = run_arm(
            arm,
            output_dir / arm,
            seed=seed,
            steps=steps,
            rock_set=None if rock_set is None else path,
            label=f"{arm} ({place} of {len(wanted)})",
        )
        if rock_set is None:
            rock_set = find_rocks(find_checkpoints(output_dir / arm), seed)
            rock_set.save(path)
    return results, rock_set, notes


def find_rocks(windows: list[tuple[int, Path]], seed: int) -> RockSet:
    """Return the rocks of the uniform arm with mass-matched controls.

    Rocks are selected on the last quarter of the run, and their earlier divergence is that of its first window. `top_k`
    is the number of planted types, so precision equals recall when the list is full.

    Args:
        windows (`list[tuple[int, Path]]`): Last step and checkpoint of each window of statistics, in order.
        seed (`int`): Seed of the controls.
    """
    last, _ = merge_last_quarter(windows)
    before = TokenStats.load(windows[0][1]) if len(windows) > 1 else None
    rock_set = detect_rocks(last, before, top_k=len(PLANTED_ROCKS))
    if rock_set.rocks:
        rock_set = dataclasses.replace(rock_set, controls=mass_matched_controls(last, rock_set, seed))
    _, tokenizer = load("student")
    return with_texts(rock_set, tokenizer)


def _cannot_run(arm: str, found: RockSet) -> str | None:
    """Return why an arm that freezes tokens cannot run, `None` if it can."""
    if not found.rocks:
        return f"{arm}: not run, no rocks were found."
    if arm == "control" and not found.controls.matched:
        return (
            "control: not run, no other token types occur as often as the rocks; `--arms random` freezes the same "
            "number of positions."
        )
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
    return {"estimate": estimate, "ci95": None if interval is None else list(interval), "over": "problems"}


def _rock_summary(found: RockSet) -> dict:
    texts = [rock.text for rock in found.rocks]
    if not texts:
        return {
            "tokens": [],
            "token_share": None,
            "kl_share": None,
            "planted_precision": None,
            "planted_recall": None,
        }
    planted = len(set(texts).intersection(PLANTED_ROCKS))
    return {
        "tokens": texts,
        "token_share": found.token_share,
        "kl_share": sum(rock.score for rock in found.rocks) / found.corpus["kl_sum"],
        "planted_precision": planted / len(texts),
        "planted_recall": planted / len(PLANTED_ROCKS),
    }


def _plot(output_dir: Path, results: dict[str, ArmResult], found: RockSet) -> None:
    ids = found.ids.tolist()
    accuracy = {}
    divergence = {}
    for arm, result in results.items():
        accuracy[arm] = [_with_interval(step, value) for step, value in result.curve]
        # Controls count as other types here: one more line for each arm would make the plot hard to read.
        divergence[arm] = kind_means(find_checkpoints(output_dir / arm), ids, controls=[])
    save_png(plot_accuracy(accuracy, CURVE_PROBLEMS), output_dir / "accuracy.png")
    save_png(plot_divergence(divergence, "KL(student ‖ teacher)"), output_dir / "divergence.png")


def _with_interval(step: int, accuracy: float) -> tuple[int, float, float, float]:
    """Return a point of the accuracy curve with its interval: step, accuracy, and both ends."""
    right = round(accuracy * CURVE_PROBLEMS)
    low, high = accuracy_interval([place < right for place in range(CURVE_PROBLEMS)])
    return step, accuracy, low, high
