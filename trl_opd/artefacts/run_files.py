"""The folder of a run or a study: names of its files, its checkpoints, and readers that check its JSON results.

This module does not import torch, so that the command line can use it without waiting for torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import json_checks

# Files of a training run, in its output folder.
RUN_FILE = "opd_run.json"
ROLLOUT_SAMPLES_FILE = "rollout_samples.parquet"
# With `save_occurrences`, this folder holds one file for each step whose rollouts were saved.
OCCURRENCES_FOLDER = "occurrences"
CARD_FILE = "README.md"
# The one in the output folder covers the whole run, the one in a checkpoint the steps since the checkpoint before it.
TOKEN_STATS_FILE = "token_stats.safetensors"
# Last file that is written to a checkpoint: names and sizes of the other files.
MANIFEST_FILE = "opd_complete.json"
# Files that the studies write or read.
OCCURRENCES_FILE = "occurrences.parquet"
PROMPTS_FILE = "prompts.parquet"
ROCK_SET_FILE = "rock_set.json"
KNOCKOUT_FILE = "knockout.json"
GRADIENTS_FILE = "gradients.parquet"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
# Written by transformers with every tokenizer.
TOKENIZER_FILE = "tokenizer_config.json"

RUN_FORMAT = "trl_opd.run"
RUN_VERSION = 1
KNOCKOUT_FORMAT = "trl_opd.knockout"
KNOCKOUT_VERSION = 1
SUMMARY_VERSION = 1
# The log of a hundred thousand steps. A larger file is a mistake and is not read, because it could fill the memory.
MAX_BYTES = 100 * 2**20
KINDS = ("rock", "control", "other", "rocks", "controls")
LABELS = ("pillar", "stumbling", "neutral")

# transformers names the folder of a checkpoint by its step.
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STEP_PART = re.compile(r"step-(\d+)\.parquet")

Log = list[dict[str, float]]


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint folder, or `None` if it is not the name of a checkpoint."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return None if match is None else int(match[1])


def find_checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoint folders in a run's folder, each with its step, ordered by step."""
    found = []
    for folder in run_folder.glob("checkpoint-*"):
        step = checkpoint_step(folder)
        if step is not None and folder.is_dir():
            found.append((step, folder))
    return sorted(found)


def step_part(folder: Path, step: int) -> Path:
    """Return the path of the part file for one step; a table that grows during a run has one part file per step."""
    return folder / f"step-{step}.parquet"


def find_step_parts(folder: Path) -> list[tuple[int, Path]]:
    """Return the part files in a folder, each with its step, ordered by step."""
    found = []
    for path in folder.glob("step-*.parquet"):
        match = _STEP_PART.fullmatch(path.name)
        if match is not None:
            found.append((int(match[1]), path))
    return sorted(found)


def read_run(path: Path) -> dict[str, Any]:
    """Return the record of a run; each line of its `log` holds only finite numbers, and a `step` among them.

    Raises:
        `ValueError`: if the file is not the record of a run; the message names the file and the reason.
        `OSError`: if there is no such file.
    """
    what = "the record of a run"
    content = json_checks.read_json(path, what, format=RUN_FORMAT, version=RUN_VERSION, max_bytes=MAX_BYTES)
    with json_checks.name_file_in_errors(path, what):
        for name in ("student", "teacher", "dataset", "versions", "hardware", "arguments", "measure"):
            json_checks.section(content, name, {})
        json_checks.require(content, dict.fromkeys(("command", "started", "written"), json_checks.text), "run")
        json_checks.require(content, dict.fromkeys(("steps", "max_steps"), json_checks.whole), "run", null=True)

        sizes = dict.fromkeys(("parameters", "trainable_parameters"), json_checks.whole)
        json_checks.require(content["student"], sizes, "student", null=True)
        json_checks.require(content["student"], {"starts_at_base": json_checks.truth}, "student", null=True)
        json_checks.require(content["teacher"], sizes, "teacher", null=True)

        if content.get("rocks") is not None:
            for id in json_checks.entries(content, "rocks"):
                json_checks.whole(id, "rocks")
        content["log"] = [_log_line(line, place) for place, line in enumerate(json_checks.entries(content, "log"))]
    return content


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary of a demo.

    Raises:
        `ValueError`: if the file is not the summary of a demo; the message names the file and the reason.
        `OSError`: if there is no such file.
    """
    what = "the summary of a demo"
    content = json_checks.read_json(path, what, format=None, version=SUMMARY_VERSION, max_bytes=MAX_BYTES)
    with json_checks.name_file_in_errors(path, what):
        json_checks.require(content, {"task": json_checks.text, "eval_problems": json_checks.whole}, "summary")
        json_checks.section(content, "start", {"accuracy": json_checks.number})
        json_checks.section(content, "teacher", {"accuracy": json_checks.number})
        json_checks.section(content, "rocks", {})

        of_arm = dict.fromkeys(("accuracy", "seconds", "frozen_token_share"), json_checks.number)
        of_arm["steps"] = json_checks.whole
        arms = json_checks.section(content, "arms", {})
        for arm in arms:
            found = json_checks.section(arms, arm, of_arm)
            _check_interval(found.get("accuracy_ci95"), f"arms.{arm}.accuracy_ci95")

        differences = json_checks.section(content, "differences", {})
        for arm in differences:
            found = json_checks.section(differences, arm, {"estimate": json_checks.number})
            _check_interval(found.get("ci95"), f"differences.{arm}.ci95")
    return content


def read_knockout(path: Path) -> dict[str, Any]:
    """Return the result of a probe.

    Raises:
        `ValueError`: if the file is not the result of a probe; the message names the file and the reason.
        `OSError`: if there is no such file.
    """
    what = "the result of a probe"
    content = json_checks.read_json(path, what, format=KNOCKOUT_FORMAT, version=KNOCKOUT_VERSION, max_bytes=MAX_BYTES)
    with json_checks.name_file_in_errors(path, what):
        kinds = {"problems": json_checks.whole, "discordance": json_checks.number, "minimal_effect": json_checks.number}
        json_checks.require(content, kinds, "knockout")
        baseline = json_checks.section(content, "baseline", {"reward": json_checks.number})
        _check_interval(baseline.get("ci95"), "baseline.ci95")
        json_checks.section(content, "rocks_against_controls", {"p": json_checks.number}, null=True)
        for place, arm in enumerate(json_checks.entries(content, "arms")):
            _check_arm(arm, f"arms[{place}]")
    return content


def _check_arm(arm: Any, where: str) -> None:
    if not isinstance(arm, dict):
        raise ValueError(f"{where} is not an object")
    numbers = {
        "effect": json_checks.number,
        "p": json_checks.number,
        "better": json_checks.whole,
        "worse": json_checks.whole,
    }
    json_checks.require(arm, numbers, where)
    json_checks.require(arm, {"kind": _check_kind, "label": _check_label, "ci95": _check_interval}, where)

    ids = json_checks.entries(arm, "ids", f"{where}.")
    texts = json_checks.entries(arm, "texts", f"{where}.")
    if len(ids) != len(texts) or not ids:
        raise ValueError(f"{where}.texts is not as long as its ids")
    for id, text in zip(ids, texts, strict=True):
        json_checks.whole(id, f"{where}.ids")
        json_checks.text(text, f"{where}.texts")
    json_checks.require(arm, {"p_bh": json_checks.number, "p_holm": json_checks.number}, where, null=True)


def _check_kind(value: Any, where: str) -> None:
    if value not in KINDS:
        raise ValueError(f"{where} is {json_checks.short(value)}, known are {', '.join(KINDS)}")


def _check_label(value: Any, where: str) -> None:
    if value is not None and value not in LABELS:
        raise ValueError(f"{where} is {json_checks.short(value)}, known are {', '.join(LABELS)} and null")


def _check_interval(value: Any, where: str) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} is {json_checks.short(value)}, not two numbers")
    for end in value:
        json_checks.number(end, where)


def _log_line(line: Any, place: int) -> dict[str, float]:
    """Return the numbers of a line of the log; its other values are left out."""
    where = f"log[{place}]"
    if not isinstance(line, dict):
        raise ValueError(f"{where} is not an object")
    json_checks.require(line, {"step": json_checks.whole}, where)
    numbers = {}
    for name, value in line.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            json_checks.number(value, f"{where}.{name}")
            numbers[name] = value
    return numbers
