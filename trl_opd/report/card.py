"""The card of a student, in TRL's manner, from what its run left in a folder: how it was made, and with what effect."""

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
WEIGHTINGS = {
    "uniform": "nothing weighs less",
    "rock": "the rock types of the rock set",
    "control": "its mass-matched control types",
    "random": "random positions, as many as rocks have",
}


def render_card(folder: Path, *, name: str | None, repo_id: str | None, tags: Sequence[str] = ()) -> ModelCard:
    """Return the card of the student in a folder.

    Args:
        folder (`Path`): The run's output folder, with its `opd_run.json`.
        name (`str`, *optional*): Name of the student; the folder's when omitted.
        repo_id (`str`, *optional*): Where it lies on the Hub; the folder's name when omitted.
        tags (`Sequence[str]`, *optional*): Tags beside those of every student of this package.

    Raises:
        `ValueError`: for a folder without a run, or a broken file in it.
    """
    contents = read_contents(folder)
    if (folder not in {run.folder for run in contents.runs.values()}) or contents.main_run is None:
        raise ValueError(f"{folder} holds no run of trl_opd, so there is nothing to write a card of.")
    run = contents.main_run
    merged = run.record["arguments"].get("merge_adapter") is True
    is_adapter = run.record["student"].get("adapter") is not None and not merged
    name = name or folder.resolve().name
    environment = Environment(
        loader=PackageLoader("trl_opd.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown: `_plain` escapes what others wrote
        finalize=lambda value: "" if value is None else value,
    )
    environment.filters["plain"] = _plain
    text = environment.get_template("card.md.jinja").render(
        card_data=_data(run, name, tags, is_adapter=is_adapter).to_yaml(),
        name=name,
        teacher=model_name(run.record["teacher"].get("name")),
        quantization=run.record["teacher"].get("quantization"),
        is_adapter=is_adapter,
        is_merged=merged,
        four_bit=_four_bit(run.record["student"].get("quantization")),
        place=repo_id or folder.resolve().name,
        facts=_facts(run),
        effect=_effect(contents),
        rocks=_rocks(contents),
        other_rocks=contents.other_rocks,
        command=visible(run.record["command"], 4000).replace("```", "'''"),
        versions=run.record["versions"],
        paper=distillation_paper(),
    )
    return ModelCard(text)


def _data(run: Run, name: str, tags: Sequence[str], *, is_adapter: bool) -> ModelCardData:
    """Return the head of the card, which the Hub reads."""
    base, data = run.record["student"].get("name"), run.record["dataset"].get("name")
    base = base if _on_hub(base) else None
    return ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        datasets=data if _on_hub(data) and "/" in data else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *tags])),
    )


def _on_hub(name: Any) -> bool:
    """Return whether a name can be one of the Hub's: no path of this machine is put into a card's metadata."""
    known = isinstance(name, str) and HUB_NAME.fullmatch(name) is not None
    return known and not Path(name).exists() and Path(name).suffix not in DATA_FILES


def _four_bit(quantization: Any) -> str | None:
    """Return the kind of 4-bit numbers of a student's base, `None` where it has none."""
    found = re.fullmatch(r"4-bit (nf4|fp4)", str(quantization))
    return found[1] if found else None


def _facts(run: Run) -> list[tuple[str, str]]:
    arguments, wanted = (
        run.record["arguments"],
        ("student", "teacher", "divergence", "data", "steps", "seed", "hardware"),
    )
    found = dict(run_facts(run))
    facts = [(name, found[name]) for name in wanted if name in found]
    weighting = str(arguments.get("token_weighting", "uniform"))
    shares = [line["weight/zero_share"] for line in run.log if "weight/zero_share" in line]
    text = WEIGHTINGS.get(weighting, weighting)
    if weighting != "uniform":
        text += f", weight {arguments.get('rock_weight', 0.0)} in the loss"
        text += f"; {sum(shares) / len(shares):.1%} of the tokens had weight 0 (no interval)" if shares else ""
    return [*facts, ("weighting", text), ("rollouts per prompt", str(arguments.get("num_generations", 1)))]


def _effect(contents: Contents) -> dict[str, Any]:
    """Return accuracies with intervals, of the run and of the arms that it is compared with, and its divergence."""
    run, folder = contents.main_run, contents.folder.resolve()
    points = [line for line in run.log if "eval_accuracy" in line]
    divergence = run.curve("kl/mean")
    summary, arms = None, []
    path = folder.parent / SUMMARY_FILE
    if path.is_file():
        found = read_summary(path)
        summary = found if folder.name in found["arms"] else None
    if summary is not None:
        results, differences, _ = arm_results(Contents(folder, summary=summary))
        for arm, result in results.items():
            difference = _with_interval(*differences[arm], "+") if arm in differences else "–"
            arms.append((arm, _with_interval(*result), difference, summary["arms"][arm]["frozen_token_share"]))
    return {
        "accuracy": [
            (int(line["step"]), _with_interval(line["eval_accuracy"], *(_end(line, end) for end in ("low", "high"))))
            for line in (points if len(points) < 3 else [points[0], points[-1]])
        ],
        "problems": int(points[-1].get("eval_accuracy_problems", 0)) if points else None,
        "measure": DIVERGENCES.get(str(run.record["measure"].get("divergence")), "divergence"),
        "divergence": (divergence[0][1], divergence[-1][1]) if len(divergence) > 1 else None,
        "arms": arms,
        "arm": folder.name,
        "task": summary["task"] if summary else None,
        "arm_problems": summary["eval_problems"] if summary else None,
    }


def _end(line: dict[str, float], which: str) -> float | None:
    return line.get(f"eval_accuracy_ci95_{which}")


def _with_interval(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    form = f"{sign}.3f"
    interval = None if low is None or high is None else (low, high)
    return f"{value:{form}} {interval_text(interval, form)}"


def _rocks(contents: Contents) -> dict[str, Any] | None:
    found = contents.rocks
    if found is None or contents.other_rocks:
        return None
    held = found.heldout
    return {
        "all": len(found.rocks),
        "top": [
            (rank, rock, text := contents.names.text_of(rock.id), rock.family or family_of(text))
            for rank, rock in enumerate(found.rocks[:TOP_ROCKS], 1)
        ],
        "token_share": found.token_share,
        "heldout": held,
        "controls": found.controls,
    }


def _plain(value: Any, limit: int = 300) -> str:
    """Return a text of others as Markdown that is only text: what could be markup is a character reference."""
    shown = named("" if value is None else str(value), limit)
    return "".join(sign if sign.isalnum() or sign in " ,.-+=%()‖" else f"&#{ord(sign)};" for sign in shown)
