"""The JSON files that a report is made of; they come from outside, and are checked before use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import json_checks

# A hundred thousand lines of a log; a larger file is a mistake, and is refused before it fills the memory.
MAX_BYTES = 100 * 2**20
RUN_FORMAT, KNOCKOUT_FORMAT = "trl_opd.run", "trl_opd.knockout"
RUN_FILE, SUMMARY_FILE, KNOCKOUT_FILE = "opd_run.json", "summary.json", "knockout.json"
KINDS = ("rock", "control", "other", "rocks", "controls")
LABELS = ("pillar", "stumbling", "neutral")

Log = list[dict[str, float]]


def read_run(path: Path) -> dict[str, Any]:
    """Return the record of a run; its `log` holds finite numbers only, and a `step` in each line.

    Raises:
        `ValueError`: if the file is none, with the file and the reason.
    """
    content = _read(path, RUN_FORMAT, "the record of a run")
    with _named(path, "the record of a run"):
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
    content = _read(path, None, "the summary of a demo")
    with _named(path, "the summary of a demo"):
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
    content = _read(path, KNOCKOUT_FORMAT, "the result of a probe")
    with _named(path, "the result of a probe"):
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


def _read(path: Path, format: str | None, what: str) -> dict[str, Any]:
    with _named(path, what):
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, at most {MAX_BYTES} are read")
        content = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=json_checks.refuse_constant, parse_float=json_checks.finite
        )
        if not isinstance(content, dict) or (format is not None and content.get("format") != format):
            raise ValueError("it is not an object" if format is None else f'its "format" is not "{format}"')
        if content.get("version") is True or content.get("version") != 1:
            version = json_checks.short(content.get("version"))
            raise ValueError(f"version {version}, this trl_opd reads version 1: upgrade it")
    return content


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Say of an error which file it is of, and what that should be."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not {what}: {reason}.") from error
