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
from .contents import Contents, Run, read_contents
from .sections.evidence import arm_results
from .sections.run import DIVERGENCES, model_name, run_facts
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
SAFE_SIGNS = frozenset(" ,.-+=%()‖")  # never markup in Markdown


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
    is_merged = record["arguments"].get("merge_adapter") is True
    is_adapter = student.get("adapter") is not None and not is_merged
    folder_name = folder.resolve().name
    name = name or folder_name
    text = _template().render(
        card_data=_data(run, name, tags, is_adapter=is_adapter).to_yaml(),
        name=name,
        teacher=model_name(record["teacher"].get("name")),
        quantization=record["teacher"].get("quantization"),
        is_adapter=is_adapter,
        is_merged=is_merged,
        four_bit=_four_bit(student.get("quantization")),
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
    if not isinstance(name, str) or HUB_NAME.fullmatch(name) is None:
        return False
    path = Path(name)
    return path.suffix not in DATA_FILES and not path.exists()


def _four_bit(quantization: Any) -> str | None:
    """Return the 4-bit data type of the student's base model, `None` if that is not in 4 bits."""
    found = re.fullmatch(r"4-bit (nf4|fp4)", str(quantization))
    return found[1] if found else None


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return the rows of the table of how the student was made: name and text."""
    arguments = run.record["arguments"]
    known = dict(run_facts(run))
    facts = [(name, known[name]) for name in FACTS if name in known]

    weighting = str(arguments.get("token_weighting", "uniform"))
    text = WEIGHTINGS.get(weighting, weighting)
    if weighting != "uniform":
        text += f", weight {arguments.get('rock_weight', 0.0)} in the loss"
        shares = [line["weight/zero_share"] for line in run.log if "weight/zero_share" in line]
        if shares:
            text += f"; {sum(shares) / len(shares):.1%} of the tokens had weight 0 (no interval)"
    facts.append(("weighting", text))
    facts.append(("rollouts per prompt", str(arguments.get("num_generations", 1))))
    return facts


def _effect(contents: Contents) -> dict[str, Any]:
    """Return the accuracies of the run with intervals, its divergence, and a comparison with the other arms if any."""
    run = contents.main_run
    points = [line for line in run.log if "eval_accuracy" in line]
    shown = points if len(points) < 3 else [points[0], points[-1]]
    accuracy = []
    for line in shown:
        low = line.get("eval_accuracy_ci95_low")
        high = line.get("eval_accuracy_ci95_high")
        accuracy.append((int(line["step"]), _with_interval(line["eval_accuracy"], low, high)))

    divergence = run.curve("kl/mean")
    return _arms(contents.folder.resolve()) | {
        "accuracy": accuracy,
        "problems": int(points[-1].get("eval_accuracy_problems", 0)) if points else None,
        "measure": DIVERGENCES.get(str(run.record["measure"].get("divergence")), "divergence"),
        "divergence": (divergence[0][1], divergence[-1][1]) if len(divergence) > 1 else None,
    }


def _arms(folder: Path) -> dict[str, Any]:
    """Return the comparison of a demo's arms, empty if the folder is not one of these arms."""
    path = folder.parent / SUMMARY_FILE
    summary = read_summary(path) if path.is_file() else None
    if summary is None or folder.name not in summary["arms"]:
        return {"arms": [], "arm": folder.name, "task": None, "arm_problems": None}

    results, differences, _ = arm_results(Contents(folder, summary=summary))
    arms = []
    for arm, (value, low, high) in results.items():
        difference = "–"
        if arm in differences:
            estimate, difference_low, difference_high = differences[arm]
            difference = _with_interval(estimate, difference_low, difference_high, "+")
        arms.append((arm, _with_interval(value, low, high), difference, summary["arms"][arm]["frozen_token_share"]))
    return {"arms": arms, "arm": folder.name, "task": summary["task"], "arm_problems": summary["eval_problems"]}


def _with_interval(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    form = f"{sign}.3f"
    interval = None if low is None or high is None else (low, high)
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
    shown = named("" if value is None else str(value), limit)
    return "".join(sign if sign.isalnum() or sign in SAFE_SIGNS else f"&#{ord(sign)};" for sign in shown)
