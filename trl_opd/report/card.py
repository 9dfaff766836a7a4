"""Writes the model card of a student, in TRL's style, from its run's folder: how it was trained and what came out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from .._trl import distillation_paper
from ..artefacts.run_files import SUMMARY_FILE, read_summary
from ..rocks.families import family_of
from ..statistics import interval_text
from .contents import Contents, Run, accuracy_in, read_contents
from .plots.runs import Estimate
from .sections.evidence import arm_results
from .sections.run import divergence_name, model_name, run_facts
from .text import named, visible

TAGS = ("generated_from_trainer", "trl", "distillation", "trl-opd", "on-policy-distillation")
TOP_ROCKS = 20
HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
DATA_FILES = (".json", ".jsonl", ".parquet", ".csv")
FACTS = ("student", "teacher", "divergence", "data", "steps", "seed", "hardware")
WEIGHTINGS = {
    "uniform": "all tokens weigh the same",
    "rock": "the rock types of the rock set",
    "control": "its mass-matched control types",
    "random": "as many random positions as the rocks have",
}
# Every sign that can be markup in Markdown: all but letters, digits and a few others.
UNSAFE_SIGN = re.compile(r"[^\w ,.+=%()‖-]|_")
FOUR_BIT = {"4-bit nf4": "nf4", "4-bit fp4": "fp4"}


def render_card(folder: Path, *, name: str | None, repo_id: str | None, tags: Sequence[str] = ()) -> ModelCard:
    """Return the model card of the student in a folder.

    Args:
        folder (`Path`): The run's output folder, with its `opd_run.json`.
        name (`str`, *optional*): Name of the student; the folder's name when omitted.
        repo_id (`str`, *optional*): Its repository on the Hub, from which the card's code loads it; the folder's name
            when omitted.
        tags (`Sequence[str]`, *optional*): Tags to add to those that every student of this package has.

    Raises:
        `ValueError`: if the folder has no run, or a broken file.
        `OSError`: if there is no such folder.
    """
    contents = read_contents(folder)
    run = contents.main_run
    if run is None or run.folder != folder:
        raise ValueError(f"{folder} holds no run of trl_opd, so there is nothing to write a card of.")

    record = run.record
    student = record["student"]
    teacher = record["teacher"]
    is_merged = record["arguments"].get("merge_adapter") is True
    is_adapter = student.get("adapter") is not None and not is_merged
    folder_name = folder.resolve().name
    name = name or folder_name
    text = _template().render(
        card_data=_data(run, name, tags, is_adapter=is_adapter).to_yaml(),
        name=name,
        teacher=model_name(teacher.get("name")),
        quantization=teacher.get("quantization"),
        is_adapter=is_adapter,
        is_merged=is_merged,
        four_bit=FOUR_BIT.get(str(student.get("quantization"))),  # of the base model
        place=repo_id or folder_name,
        facts=_facts(run),
        effect=_effect(contents),
        rocks=_rocks(contents),
        other_rocks=contents.other_rocks,
        command=visible(record["command"], 4000).replace("```", "'''"),
        versions=record["versions"],
        paper=distillation_paper(),
    )
    return ModelCard(text)


def _template():
    environment = Environment(
        loader=PackageLoader("trl_opd.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # the card is Markdown, which `_plain` escapes
        finalize=lambda value: "" if value is None else value,
    )
    environment.filters["plain"] = _plain
    return environment.get_template("card.md.jinja")


def _data(run: Run, name: str, tags: Sequence[str], *, is_adapter: bool) -> ModelCardData:
    """Return the metadata at the head of the card, which the Hub reads."""
    base = run.record["student"].get("name")
    if not _is_hub_name(base):
        base = None
    dataset = run.record["dataset"].get("name")
    if not _is_hub_name(dataset) or "/" not in dataset:
        dataset = None

    relation = "adapter" if is_adapter else "finetune"
    return ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation=relation if base is not None else None,
        datasets=dataset,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *tags])),
    )


def _is_hub_name(name: Any) -> bool:
    """Return whether a name can be one on the Hub; a path on this machine must not get into a card's metadata."""
    if not (isinstance(name, str) and HUB_NAME.fullmatch(name)):
        return False
    path = Path(name)
    return path.suffix not in DATA_FILES and not path.exists()


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return the rows of the table of how the student was made: name and text."""
    arguments = run.record["arguments"]
    known = dict(run_facts(run))
    facts = [(name, known[name]) for name in FACTS if name in known]

    weighting = str(arguments.get("token_weighting", "uniform"))
    text = WEIGHTINGS.get(weighting, weighting)
    if weighting != "uniform":
        text += f", weight {arguments.get('rock_weight', 0.0)} in the loss"
        share = run.mean("weight/zero_share")
        if share is not None:
            text += f"; {share:.1%} of the tokens had weight 0 (no interval)"
    facts.append(("weighting", text))
    facts.append(("rollouts per prompt", str(arguments.get("num_generations", 1))))
    return facts


def _effect(contents: Contents) -> dict[str, Any]:
    """Return the accuracies of the run with intervals, its divergence, and a comparison with the other arms if any."""
    run = contents.main_run
    lines = run.lines_with("eval_accuracy")
    shown = lines if len(lines) < 3 else [lines[0], lines[-1]]
    accuracy = []
    for line in shown:
        text = _with_interval(accuracy_in(line))
        accuracy.append((int(line["step"]), text))
    problems = None
    if lines:
        problems = int(lines[-1].get("eval_accuracy_problems", 0))

    ends = None
    divergence = run.curve("kl/mean")
    if len(divergence) > 1:
        _, first = divergence[0]
        _, last = divergence[-1]
        ends = (first, last)
    return _arms(contents.folder.resolve()) | {
        "accuracy": accuracy,
        "problems": problems,
        "measure": divergence_name(run),
        "divergence": ends,
    }


def _arms(folder: Path) -> dict[str, Any]:
    """Return the comparison of a demo's arms, empty if the folder is not one of these arms."""
    path = folder.parent / SUMMARY_FILE
    summary = read_summary(path) if path.is_file() else None
    if summary is None or folder.name not in summary["arms"]:
        return {"arms": [], "arm": folder.name, "task": None, "arm_problems": None}

    results, differences, _ = arm_results(Contents(folder, summary=summary))
    arms = []
    for arm, estimate in results.items():
        difference = "–"
        if arm in differences:
            difference = _with_interval(differences[arm], "+")
        share = summary["arms"][arm]["frozen_token_share"]
        arms.append((arm, _with_interval(estimate), difference, share))
    return {"arms": arms, "arm": folder.name, "task": summary["task"], "arm_problems": summary["eval_problems"]}


def _with_interval(estimate: Estimate, sign: str = "") -> str:
    value, low, high = estimate
    form = f"{sign}.3f"
    interval = None
    if low is not None and high is not None:
        interval = (low, high)
    return f"{value:{form}} {interval_text(interval, form)}"


def _rocks(contents: Contents) -> dict[str, Any] | None:
    """Return the card's text about the rock set; `None` without one, or if the run was trained with other rocks."""
    rock_set = contents.rocks
    if rock_set is None or contents.other_rocks:
        return None
    top = []
    for rank, rock in enumerate(rock_set.rocks[:TOP_ROCKS], 1):
        text = contents.names.text_of(rock.id)
        top.append((rank, rock, text, rock.family or family_of(text)))
    return {
        "all": len(rock_set.rocks),
        "top": top,
        "token_share": rock_set.token_share,
        "heldout": rock_set.heldout,
        "controls": rock_set.controls,
    }


def _plain(value: Any, limit: int = 300) -> str:
    """Return a value as Markdown that renders as text only: every other sign becomes a character reference."""
    text = "" if value is None else str(value)
    shown = named(text, limit)
    return UNSAFE_SIGN.sub(lambda sign: f"&#{ord(sign[0])};", shown)
