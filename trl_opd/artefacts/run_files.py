"""What lies in a folder of a run or a study: the names of its files, its checkpoints, and its JSON results, checked.

Nothing here needs torch, so that every module, also of the command line, can take a name from here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import json_checks

# Files of a training run, in its output folder.
RUN_FILE = "opd_run.json"
ROLLOUT_SAMPLES_FILE = "rollout_samples.parquet"
# With `save_occurrences` a file of each of its steps lies in this folder.
OCCURRENCES_FOLDER = "occurrences"
CARD_FILE = "README.md"
# In the output folder for the whole run, in every checkpoint for the steps since the one before.
TOKEN_STATS_FILE = "token_stats.safetensors"
# In every checkpoint, its last file: the names and sizes of the others.
MANIFEST_FILE = "opd_complete.json"
# Files of the studies, and of what they read.
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
# A hundred thousand lines of a log; a larger file is a mistake, and is refused before it fills the memory.
MAX_BYTES = 100 * 2**20
KINDS = ("rock", "control", "other", "rocks", "controls")
LABELS = ("pillar", "stumbling", "neutral")

# transformers names the folder of a checkpoint by its step.
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STEP_PART = re.compile(r"step-(\d+)\.parquet")

Log = list[dict[str, float]]


def checkpoint_step(folder: Path) -> int | None:
    """Return the step of a folder that is named as a checkpoint, `None` for another folder."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return None if match is None else int(match[1])


def find_checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a run's folder with their steps, in order of the steps."""
    found = []
    for folder in run_folder.glob("checkpoint-*"):
        step = checkpoint_step(folder)
        if step is not None and folder.is_dir():
            found.append((step, folder))
    return sorted(found)


def step_part(folder: Path, step: int) -> Path:
    """Return the path of the part that holds one step of a table which is written step by step."""
    return folder / f"step-{step}.parquet"


def find_step_parts(folder: Path) -> list[tuple[int, Path]]:
    """Return the parts in a folder with their steps, in order of the steps."""
    found = []
    for path in folder.glob("step-*.parquet"):
        match = _STEP_PART.fullmatch(path.name)
        if match is not None:
            found.append((int(match[1]), path))
    return sorted(found)


def read_run(path: Path) -> dict[str, Any]:
    """Return the record of a run; its `log` holds finite numbers only, and a `step` in each line.

    Raises:
        `ValueError`: if the file is none, with the file and the reason.
    """
    what = "the record of a run"
    content = json_checks.read_json(path, what, format=RUN_FORMAT, version=RUN_VERSION, max_bytes=MAX_BYTES)
    with json_checks.name_file_in_errors(path, what):
        for name in ("student", "teacher", "dataset", "versions", "hardware", "arguments", "measure"):
            json_checks.section(content, name, {})
        for name in ("command", "started", "written"):
            json_checks.require(content, {name: json_checks.text}, "run")
        json_checks.require(content, {"steps": json_checks.whole, "max_steps": json_checks.whole}, "run", null=True)
        for name in ("student", "teacher"):
            kinds = {"parameters": json_checks.whole, "trainable_parameters": json_checks.whole}
            json_checks.require(content[name], kinds, name, null=True)
        if content.get("rocks") is not None:
            for id in json_checks.entries(content, "rocks"):
                json_checks.whole(id, "rocks")
        content["log"] = [_log_line(line, place) for place, line in enumerate(json_checks.entries(content, "log"))]
    return content


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary of a demo.

    Raises:
        `ValueError`: if the file is none, with the file and the reason.
    """
    what = "the summary of a demo"
    content = json_checks.read_json(path, what, format=None, version=SUMMARY_VERSION, max_bytes=MAX_BYTES)
    with json_checks.name_file_in_errors(path, what):
        json_checks.require(content, {"task": json_checks.text, "eval_problems": json_checks.whole}, "summary")
        for name in ("start", "teacher"):
            json_checks.section(content, name, {"accuracy": json_checks.number})
        json_checks.section(content, "rocks", {})
        kinds = {
            "accuracy": json_checks.number,
            "seconds": json_checks.number,
            "frozen_token_share": json_checks.number,
        }
        for arm in json_checks.section(content, "arms", {}):
            found = json_checks.section(content["arms"], arm, kinds | {"steps": json_checks.whole})
            _interval(found.get("accuracy_ci95"), f"arms.{arm}.accuracy_ci95")
        for arm in json_checks.section(content, "differences", {}):
            found = json_checks.section(content["differences"], arm, {"estimate": json_checks.number})
            _interval(found.get("ci95"), f"differences.{arm}.ci95")
    return content


def read_knockout(path: Path) -> dict[str, Any]:
    """Return the result of a probe.

    Raises:
        `ValueError`: if the file is none, with the file and the reason.
    """
    what = "the result of a probe"
    content = json_checks.read_json(path, what, format=KNOCKOUT_FORMAT, version=KNOCKOUT_VERSION, max_bytes=MAX_BYTES)
    with json_checks.name_file_in_errors(path, what):
        kinds = {"problems": json_checks.whole, "discordance": json_checks.number, "minimal_effect": json_checks.number}
        json_checks.require(content, kinds, "knockout")
        _interval(json_checks.section(content, "baseline", {"reward": json_checks.number}).get("ci95"), "baseline.ci95")
        json_checks.section(content, "rocks_against_controls", {"p": json_checks.number}, null=True)
        for place, arm in enumerate(json_checks.entries(content, "arms")):
            _check_arm(arm, f"arms[{place}]")
    return content


def _check_arm(arm: Any, where: str) -> None:
    if not isinstance(arm, dict):
        raise ValueError(f"{where} is not an object")
    kinds = {
        "effect": json_checks.number,
        "p": json_checks.number,
        "better": json_checks.whole,
        "worse": json_checks.whole,
    }
    json_checks.require(arm, kinds, where)
    if missing := [name for name in ("kind", "label", "ci95") if name not in arm]:
        raise ValueError(f'"{where}.{missing[0]}" is missing')
    for name, known in (("kind", KINDS), ("label", (*LABELS, None))):
        if arm[name] not in known:
            raise ValueError(
                f"{where}.{name} is {json_checks.short(arm[name])}, known are {', '.join(map(str, known))}"
            )
    ids, texts = (json_checks.entries(arm, name, f"{where}.") for name in ("ids", "texts"))
    if len(ids) != len(texts) or not ids:
        raise ValueError(f"{where}.texts is not as long as its ids")
    for id, text in zip(ids, texts, strict=True):
        json_checks.whole(id, f"{where}.ids")
        json_checks.text(text, f"{where}.texts")
    json_checks.require(arm, {"p_bh": json_checks.number, "p_holm": json_checks.number}, where, null=True)
    _interval(arm["ci95"], f"{where}.ci95")


def _interval(value: Any, where: str) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} is {json_checks.short(value)}, not two numbers")
    for end in value:
        json_checks.number(end, where)


def _log_line(line: Any, place: int) -> dict[str, float]:
    if not isinstance(line, dict):
        raise ValueError(f"log[{place}] is not an object")
    json_checks.require(line, {"step": json_checks.whole}, f"log[{place}]")
    numbers = {}
    for name, value in line.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            json_checks.number(value, f"log[{place}].{name}")
            numbers[name] = value
    return numbers
