"""Sections of a report about training runs: what was run, and what changed over its steps."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ...artefacts.run_files import Log
from ..blocks import Block, Facts, Note, Plot, Section, Table
from ..contents import Contents, Run
from ..plots.canvas import to_svg
from ..plots.runs import plot_accuracy, plot_curves, plot_divergence, plot_phases
from ..token_types import kind_means

DIVERGENCES = {"reverse_kl": "KL(student ‖ teacher)", "forward_kl": "KL(teacher ‖ student)", "jsd": "JSD"}
# Metric of the log -> title of its plot, its axis, and whether it is a share.
CURVES = {
    "entropy": ("Entropy of the student's distribution", "mean entropy (nats per token)", False),
    "completions/mean_length": ("Length of completions", "mean length (tokens)", False),
    "completions/clipped_ratio": ("Completions cut at the length limit", "share of the completions", True),
    "completions/repetition": (
        "Repetition: 4-grams that stood before in the completion",
        "share of the 4-grams",
        True,
    ),
    "batch/padding_share": ("Padding in the student's forwards", "share of the positions", True),
}
# Arguments that have a line of their own.
SHOWN_ELSEWHERE = {"teacher_model_name_or_path", "seed", "teacher_quantization"}


def what_was_run(contents: Contents) -> Section | None:
    """Return models, data, versions, command, seeds, hardware and time of the runs, or of a collection."""
    blocks: list[Block] = []
    run = contents.main_run
    if run is not None:
        blocks.append(Facts(run_facts(run)))
        if len(contents.runs) > 1:
            blocks.append(_arms(contents))
        blocks += _phases(contents)
    if contents.occurrences is not None:
        blocks.append(Facts(_collection_facts(contents.occurrences.metadata, contents.occurrences.rows)))
    if contents.summary is not None:
        start, teacher = (contents.summary[name]["accuracy"] for name in ("start", "teacher"))
        text = f"{contents.summary['task']}: {contents.summary['eval_problems']} held-out problems, greedy. "
        blocks.insert(0, Note(f"{text}Teacher {teacher:.3f}, student at the start {start:.3f} (no intervals)."))
    return Section("run", "What was run", blocks) if blocks else None


def training(contents: Contents) -> Section | None:
    """Return what changed over the steps of the runs, a line for each run."""
    blocks: list[Block] = []
    plots = [_divergence_plot(contents), _accuracy_plot(contents), *_metric_plots(contents)]
    for figure, label in plots:
        if figure is not None:
            blocks.append(Plot(to_svg(figure, f"t{len(blocks)}-"), label))
    note = "Figures of the log, of a window of steps each: token means over the rollouts, and shares. No intervals but "
    note += "those of the accuracy, which are over the problems, of one training seed."
    return Section("training", "Training", [Note(note), *blocks]) if blocks else None


def run_facts(run: Run) -> list[tuple[str, str]]:
    """Return what a run's record says of it, in words."""
    record = run.record
    student, teacher, measure, data = (record[name] for name in ("student", "teacher", "measure", "dataset"))
    arguments = {name: value for name, value in record["arguments"].items() if name not in SHOWN_ELSEWHERE}
    hardware = record["hardware"]
    facts = [
        ("command", record["command"]),
        ("student", _model(student)),
        ("teacher", _model(teacher)),
        ("divergence", DIVERGENCES.get(str(measure.get("divergence")), "?")),
        ("data", _joined([data.get("name"), _rows(data.get("rows"))]) or "not named"),
        ("steps", f"{record.get('steps')} of {record.get('max_steps')}"),
        ("started (or resumed), and time since", _time(record)),
        ("seed", str(record["arguments"].get("seed", 42))),
        ("hardware", _joined([hardware.get("name"), _processes(hardware.get("processes"))])),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ("other settings", ", ".join(f"{name} {_value(value)}" for name, value in arguments.items())),
    ]
    return [(name, text) for name, text in facts if text]


def _model(model: dict[str, Any]) -> str:
    parameters, trained = model.get("parameters"), model.get("trainable_parameters")
    size = None if not isinstance(parameters, int) else f"{parameters / 1e9:.2f} billion parameters"
    if isinstance(parameters, int) and parameters < 10_000_000:
        size = f"{parameters:,} parameters".replace(",", " ")
    adapter = model.get("adapter")
    if adapter is not None and isinstance(trained, int) and isinstance(parameters, int) and parameters:
        adapter = f"{adapter} ({trained / parameters:.2%} trained)"
    return _joined([model_name(model.get("name")), size, model.get("dtype"), model.get("quantization"), adapter])


def model_name(name: Any) -> str:
    """Return a model's name; of a path on this machine the last part, since reports and cards travel."""
    if not isinstance(name, str) or not name:
        return "not named"
    return Path(name).name if Path(name).is_absolute() else name


def _joined(parts: Sequence[Any]) -> str:
    return ", ".join(str(part) for part in parts if part)


def _rows(rows: Any) -> str | None:
    return None if rows is None else f"{rows} rows"


def _processes(count: Any) -> str | None:
    return f"{count} processes" if isinstance(count, int) and count > 1 else None


def _time(record: dict[str, Any]) -> str:
    try:
        seconds = (
            datetime.fromisoformat(record["written"]) - datetime.fromisoformat(record["started"])
        ).total_seconds()
    except (ValueError, TypeError):
        return ""
    return (
        f"{record['started']}, {seconds / 60:.0f} minutes"
        if seconds >= 120
        else f"{record['started']}, {seconds:.0f} s"
    )


def _value(value: Any) -> str:
    return shlex.quote(value) if isinstance(value, str) else str(value)


def _collection_facts(metadata: dict[str, Any], rows: int) -> list[tuple[str, str]]:
    facts = [(name, metadata.get(name)) for name in ("student", "reference", "teacher", "temperature")]
    settings = metadata.get("settings") if isinstance(metadata.get("settings"), dict) else {}
    facts += [("data", settings.get("dataset_name")), ("seed", settings.get("seed"))]
    facts += [("rollouts", metadata.get("num_rollouts")), ("tokens", rows)]
    return [(f"collected: {name}", str(value)) for name, value in facts if value is not None]


def _arms(contents: Contents) -> Table:
    rows = []
    for name, run in contents.runs.items():
        weighting = str(run.record["arguments"].get("token_weighting", "uniform"))
        shares = [line["weight/zero_share"] for line in run.log if "weight/zero_share" in line]
        share = sum(shares) / len(shares) if shares else None
        rows.append((name, weighting, run.record.get("steps"), share, _last(run.log, "kl/mean")))
    columns = {"arm": "", "weighting": "", "steps": "d", "tokens frozen": ".1%", "mean KL at the end (nats)": ".4f"}
    return Table("The arms: what each froze, and where its divergence ended; no intervals", columns, rows)


def _last(log: Log, name: str) -> float | None:
    return next((line[name] for line in reversed(log) if name in line), None)


def _phases(contents: Contents) -> list[Block]:
    seconds = {}
    for name, run in contents.runs.items():
        found: dict[str, list[float]] = {}
        for line in run.log:
            for key, value in line.items():
                if key.startswith("phase/"):
                    found.setdefault(key.removeprefix("phase/").removesuffix("_s"), []).append(value)
        if found:
            seconds[name] = {phase: sum(values) / len(values) for phase, values in found.items()}
    if not seconds:
        return []
    label = "; ".join(
        f"{arm}: " + ", ".join(f"{phase} {value:.3g} s" for phase, value in phases.items())
        for arm, phases in seconds.items()
    )
    return [Plot(to_svg(plot_phases(seconds), "p-"), f"Mean seconds of an optimizer step by phase. {label}")]


def _divergence_plot(contents: Contents) -> tuple[Any, str]:
    kinds = {"rock": [], "control": [], "other": []}
    curves, measure = {}, "divergence"
    for name, run in contents.runs.items():
        measure = DIVERGENCES.get(str(run.record["measure"].get("divergence")), "divergence")
        found = {kind: dict(run.curve(f"{kind}/mean_kl")) for kind in kinds}
        steps = sorted({step for kind in found.values() for step in kind})
        points = [(step, *(found[kind].get(step) for kind in kinds)) for step in steps]
        if not points and contents.rocks is not None and run.windows:
            controls = contents.rocks.controls.ids if contents.rocks.controls else []
            points = kind_means(run.windows, [rock.id for rock in contents.rocks.rocks], controls)
        if points:
            curves[name] = points
    if curves:
        return plot_divergence(
            curves, measure
        ), f"Mean {measure} of rocks, controls and the rest over steps, nats per token"
    means = {name: run.curve("kl/mean") for name, run in contents.runs.items()}
    means = {name: points for name, points in means.items() if points}
    if not means:
        return None, ""
    title = f"Mean {measure} over all tokens"
    return plot_curves(means, title, f"mean {measure} per token (nats)"), f"{title} over steps, nats per token"


def _accuracy_plot(contents: Contents) -> tuple[Any, str]:
    curves, problems = {}, set()
    for name, run in contents.runs.items():
        points = {int(line["step"]): line for line in run.log if "eval_accuracy" in line}
        keys = ("eval_accuracy", "eval_accuracy_ci95_low", "eval_accuracy_ci95_high")
        if points:
            curves[name] = [(step, *(line.get(key) for key in keys)) for step, line in sorted(points.items())]
            problems |= {line.get("eval_accuracy_problems") for line in points.values()}
    if not curves:
        return None, ""
    count = problems.pop() if len(problems) == 1 else None
    ends = ", ".join(f"{name} {points[-1][1]:.3f}" for name, points in curves.items())
    return plot_accuracy(curves, None if count is None else int(count)), f"Accuracy over steps; at the end: {ends}"


def _metric_plots(contents: Contents) -> list[tuple[Any, str]]:
    found = []
    for name, (title, y, share) in CURVES.items():
        curves = {arm: run.curve(name) for arm, run in contents.runs.items()}
        curves = {arm: points for arm, points in curves.items() if points}
        if curves:
            found.append((plot_curves(curves, title, y, share=share), f"{title} over steps: {y}"))
    return found
