"""Sections of a report about training runs: what was run, and which metrics changed over its steps."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..blocks import Block, Facts, Note, Plot, Section, Table
from ..contents import Contents, Run, accuracy_in
from ..plots.canvas import to_svg
from ..plots.runs import plot_accuracy, plot_curves, plot_divergence, plot_phases
from ..token_types import kind_means

DIVERGENCES = {"reverse_kl": "KL(student ‖ teacher)", "forward_kl": "KL(teacher ‖ student)", "jsd": "JSD"}
# Metric of the log -> title of its plot, label of its axis, and whether it is a share.
CURVES = {
    "entropy": ("Entropy of the student's distribution", "mean entropy (nats per token)", False),
    "completions/mean_length": ("Length of completions", "mean length (tokens)", False),
    "completions/clipped_ratio": ("Completions cut at the length limit", "share of the completions", True),
    "completions/repetition": (
        "Repetition: 4-grams that already occurred in the completion",
        "share of the 4-grams",
        True,
    ),
    "batch/padding_share": ("Padding in the student's forward passes", "share of the positions", True),
}
# Arguments that are not among the other settings: teacher and seed have their own facts.
SHOWN_ELSEWHERE = {"teacher_model_name_or_path", "seed", "teacher_quantization"}
# Names of the three kinds of tokens in the log.
KINDS = ("rock", "control", "other")
# Models below this size are given with all digits.
SMALL_MODEL = 10_000_000


def what_was_run(contents: Contents) -> Section | None:
    """Return the section with models, data, versions, command, seed, hardware and times of a run or a collection.

    Returns `None` if the folder has neither a run, a collection nor the summary of a demo.
    """
    blocks: list[Block] = []
    summary = contents.summary
    if summary is not None:
        teacher = summary["teacher"]["accuracy"]
        start = summary["start"]["accuracy"]
        text = f"{summary['task']}: {summary['eval_problems']} held-out problems, greedy. "
        text += f"Teacher {teacher:.3f}, student at the start {start:.3f} (no intervals)."
        blocks.append(Note(text))

    run = contents.main_run
    if run is not None:
        blocks.append(Facts(run_facts(run)))
        if len(contents.runs) > 1:
            table = _arms(contents)
            blocks.append(table)
        blocks += _phases(contents)
    collected = contents.occurrences
    if collected is not None:
        facts = _collection_facts(collected.metadata, collected.rows)
        blocks.append(Facts(facts))
    if not blocks:
        return None
    return Section("run", "What was run", blocks)


def training(contents: Contents) -> Section | None:
    """Return the section with the metrics of the runs over their steps; `None` if nothing was logged.

    Raises:
        `ValueError`: if the statistics of a checkpoint are damaged.
    """
    plots = _divergence_plot(contents)
    plots += _accuracy_plot(contents)
    plots += _metric_plots(contents)
    if not plots:
        return None

    note = "Metrics from the log, each over a window of steps: means over the tokens of the rollouts, and shares. Only "
    note += "accuracies have intervals, which cover the choice of problems but not the training seed."
    blocks: list[Block] = [Note(note)]
    for place, (figure, label) in enumerate(plots):
        svg = to_svg(figure, f"t{place}-")
        blocks.append(Plot(svg, label))
    return Section("training", "Training", blocks)


def run_facts(run: Run) -> list[tuple[str, str]]:
    """Return the facts that the record of a run holds, as pairs of a name and a text; unknown ones are left out."""
    record = run.record
    data = [record["dataset"].get("name")]
    rows = record["dataset"].get("rows")
    if rows is not None:
        data.append(f"{rows} rows")

    hardware = [record["hardware"].get("name")]
    processes = record["hardware"].get("processes")
    if isinstance(processes, int) and processes > 1:
        hardware.append(f"{processes} processes")

    arguments = record["arguments"]
    settings = []
    for name, value in arguments.items():
        if name not in SHOWN_ELSEWHERE:
            if isinstance(value, str):
                value = shlex.quote(value)
            settings.append(f"{name} {value}")
    versions = [f"{name} {version}" for name, version in record["versions"].items()]

    facts = [
        ("command", record["command"]),
        ("student", _model(record["student"])),
        ("teacher", _model(record["teacher"])),
        ("divergence", divergence_name(run, unknown="?")),
        ("data", _joined(data) or "not named"),
        ("steps", f"{record.get('steps')} of {record.get('max_steps')}"),
        ("started (or resumed), and time since", _time(record)),
        ("seed", str(arguments.get("seed", 42))),
        ("hardware", _joined(hardware)),
        ("versions", _joined(versions)),
        ("other settings", _joined(settings)),
    ]
    return [(name, text) for name, text in facts if text]


def divergence_name(run: Run, *, unknown: str = "divergence") -> str:
    """Return the divergence that a run minimises as a formula, or a text for one that is not known."""
    name = run.record["measure"].get("divergence")
    return DIVERGENCES.get(str(name), unknown)


def model_name(name: Any) -> str:
    """Return the name of a model, or of a path on this machine the last part only, since reports and cards travel."""
    if not isinstance(name, str) or not name:
        return "not named"
    path = Path(name)
    if path.is_absolute():
        return path.name
    return name


def _model(model: dict[str, Any]) -> str:
    adapter = model.get("adapter")
    parameters = model.get("parameters")
    size = None
    if isinstance(parameters, int):
        if parameters < SMALL_MODEL:
            size = f"{parameters:,} parameters".replace(",", " ")
        else:
            size = f"{parameters / 1e9:.2f} billion parameters"
        trained = model.get("trainable_parameters")
        if adapter is not None and isinstance(trained, int) and parameters:
            adapter = f"{adapter} ({trained / parameters:.2%} trained)"
    name = model_name(model.get("name"))
    return _joined([name, size, model.get("dtype"), model.get("quantization"), adapter])


def _joined(parts: Sequence[Any]) -> str:
    return ", ".join(str(part) for part in parts if part)


def _time(record: dict[str, Any]) -> str:
    """Return the time at which a run started and its duration; empty if the record has no valid times."""
    started = record["started"]
    try:
        first = datetime.fromisoformat(started)
        last = datetime.fromisoformat(record["written"])
        seconds = (last - first).total_seconds()
    except (ValueError, TypeError):
        return ""
    duration = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
    return f"{started}, {duration}"


def _collection_facts(metadata: dict[str, Any], rows: int) -> list[tuple[str, str]]:
    facts = {}
    for name in ("student", "reference", "teacher", "temperature"):
        facts[name] = metadata.get(name)
    settings = metadata.get("settings")
    if isinstance(settings, dict):
        facts["data"] = settings.get("dataset_name")
        facts["seed"] = settings.get("seed")
    facts["rollouts"] = metadata.get("num_rollouts")
    facts["tokens"] = rows
    return [(f"collected: {name}", str(value)) for name, value in facts.items() if value is not None]


def _arms(contents: Contents) -> Table:
    rows = []
    for name, run in contents.runs.items():
        record = run.record
        weighting = str(record["arguments"].get("token_weighting", "uniform"))
        frozen = run.mean("weight/zero_share")
        lines = run.lines_with("kl/mean")
        last = lines[-1]["kl/mean"] if lines else None
        rows.append((name, weighting, record.get("steps"), frozen, last))
    columns = {"arm": "", "weighting": "", "steps": "d", "tokens frozen": ".1%", "mean KL at the end (nats)": ".4f"}
    caption = "The arms: which share of the tokens each froze, and its divergence at the end; no intervals"
    return Table(caption, columns, rows)


def _phases(contents: Contents) -> list[Block]:
    seconds = {}
    texts = []
    for arm, run in contents.runs.items():
        means = {}
        for name in dict.fromkeys(itertools.chain.from_iterable(run.log)):
            if name.startswith("phase/"):
                phase = name.removeprefix("phase/").removesuffix("_s")
                means[phase] = run.mean(name)
        if not means:
            continue
        seconds[arm] = means
        phases = ", ".join(f"{phase} {mean:.3g} s" for phase, mean in means.items())
        texts.append(f"{arm}: {phases}")
    if not seconds:
        return []
    label = f"Mean seconds of an optimizer step by phase. {'; '.join(texts)}"
    return [Plot(to_svg(plot_phases(seconds), "p-"), label)]


def _divergence_plot(contents: Contents) -> list[tuple[Figure, str]]:
    """Return the plot of the divergence by kind of token, or over all tokens if no run has it by kind."""
    curves = {}
    measure = "divergence"
    for arm, run in contents.runs.items():
        measure = divergence_name(run)
        points = _logged_by_kind(run)
        if not points and contents.rocks is not None and run.windows:
            controls = contents.rocks.controls.ids if contents.rocks.controls else []
            points = kind_means(run.windows, contents.rock_ids, controls)
        if points:
            curves[arm] = points
    if curves:
        label = f"Mean {measure} of rocks, controls and the rest over steps, nats per token"
        return [(plot_divergence(curves, measure), label)]

    means = _curves(contents, "kl/mean")
    if not means:
        return []
    title = f"Mean {measure} over all tokens"
    figure = plot_curves(means, title, f"mean {measure} per token (nats)")
    return [(figure, f"{title} over steps, nats per token")]


def _logged_by_kind(run: Run) -> list[tuple[int, float | None, float | None, float | None]]:
    """Return step and mean divergence of rocks, controls and the rest, nats, from the log of a run."""
    points: dict[int, dict[str, float]] = {}
    for kind in KINDS:
        for step, mean in run.curve(f"{kind}/mean_kl"):
            points.setdefault(step, {})[kind] = mean
    logged = []
    for step, means in sorted(points.items()):
        logged.append((step, means.get("rock"), means.get("control"), means.get("other")))
    return logged


def _accuracy_plot(contents: Contents) -> list[tuple[Figure, str]]:
    curves = {}
    ends = []
    problems = set()
    for arm, run in contents.runs.items():
        # A step that was repeated after a resume counts once, with the last accuracy.
        lines = {int(line["step"]): line for line in run.lines_with("eval_accuracy")}
        if not lines:
            continue
        points = []
        for step, line in sorted(lines.items()):
            accuracy, low, high = accuracy_in(line)
            points.append((step, accuracy, low, high))
            problems.add(line.get("eval_accuracy_problems"))
        curves[arm] = points
        ends.append(f"{arm} {accuracy:.3f}")
    if not curves:
        return []

    # The axis names the number of problems only if all accuracies have the same.
    count = None
    if len(problems) == 1:
        (count,) = problems
    figure = plot_accuracy(curves, None if count is None else int(count))
    return [(figure, f"Accuracy over steps; at the end: {', '.join(ends)}")]


def _metric_plots(contents: Contents) -> list[tuple[Figure, str]]:
    found = []
    for name, (title, y, share) in CURVES.items():
        curves = _curves(contents, name)
        if curves:
            found.append((plot_curves(curves, title, y, share=share), f"{title} over steps: {y}"))
    return found


def _curves(contents: Contents, name: str) -> dict[str, list[tuple[int, float]]]:
    """Return a metric over steps for each run that logged it."""
    curves = {}
    for arm, run in contents.runs.items():
        points = run.curve(name)
        if points:
            curves[arm] = points
    return curves
