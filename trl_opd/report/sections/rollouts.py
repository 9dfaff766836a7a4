"""Section of a report about rollouts: which completions are shown, a few of many, evenly taken, and their columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ...artefacts.occurrences import MAX_VOCABULARY, read_prompts
from ...artefacts.rollout_rows import Span, find_rollouts, read_rollout
from ...artefacts.sampled_rollouts import LISTS, MEASURES, read_metadata
from ..blocks import Block, Note, Rollouts, Section, ShownRollout
from ..contents import Contents

# Tokens that are shown of all rollouts of a page, and of one rollout; a token takes about 250 bytes of the page.
MOST_TOKENS = 10_000
MOST_OF_ONE = 600
# Steps of a run, and rollouts of a step or of a collection, that are shown.
MOST_STEPS = 12
MOST_OF_A_STEP = 4
MOST_OF_A_COLLECTION = 12
# Columns that collected occurrences may have in common with sampled rollouts.
COLLECTED = ("kl", "kl_pre", "entropy", "weight")

# Ids of a prompt -> its text.
Decode = Callable[[Sequence[int]], str | None]
# A rollout: its file, and its place in there.
Place = tuple[Path, Span]


@dataclass(frozen=True)
class Shown:
    """Rollouts that are shown, of how many, and what was left out, in words."""

    rollouts: list[ShownRollout]
    note: str


def rollouts(contents: Contents) -> Section | None:
    """Return completions that can be looked at, of the runs or of a collection."""
    rocks = frozenset(rock.id for rock in contents.rocks.rocks) if contents.rocks else frozenset()
    blocks: list[Block] = []
    sampled = {name: run.samples for name, run in contents.runs.items() if run.samples}
    for name, files in sampled.items():
        shown = shown_of_run(files, contents.names.decode, most_tokens=MOST_TOKENS // len(sampled))
        title = f"Rollouts of the arm {name}. " if len(sampled) > 1 else ""
        blocks += _viewer(shown.rollouts, title + shown.note, contents, rocks)
    if contents.occurrences is not None and not sampled:
        shown = shown_of_collection(contents.occurrences.path, contents.prompts, contents.names.decode)
        blocks += _viewer(shown.rollouts, shown.note, contents, rocks)
    return Section("rollouts", "Rollouts", blocks) if blocks else None


def shown_of_run(files: Sequence[Path], decode: Decode, *, most_tokens: int = MOST_TOKENS) -> Shown:
    """Return rollouts of the steps of a run, the first and the last among them.

    Args:
        files (`Sequence[Path]`): `rollout_samples.parquet`, or the parts of a run that has not ended.
        decode (`Callable`): Token ids of a prompt to its text, or `None`.
        most_tokens (`int`, *optional*): Tokens that are shown at most.

    Raises:
        `ValueError`: for a file that is none, cut, or with values that cannot be.
    """
    places = [(path, span) for path in files for span in find_rollouts(path, by_step=True)]
    picked = _pick_from_steps(places, most_tokens)
    prompts = {path: read_metadata(path).get("prompts") for path in {path for path, _ in picked}}
    names = MEASURES + LISTS
    shown = []
    for path, span in picked:
        columns = read_rollout(path, span, names, most_tokens=MOST_OF_ONE)
        ids = None
        if "prompt" in columns and isinstance(prompts[path], dict):
            ids = prompts[path].get(f"{span.step}/{columns['prompt'][0]}")
        prompt = decode(ids) if _are_ids(ids) else None
        shown.append(_shown_rollout(span, columns, prompt, step=span.step))

    steps = len({span.step for _, span in picked})
    all_steps = len({span.step for _, span in places})
    return Shown(shown, _note(picked, len(places), f" of {steps} of {all_steps} steps that were kept"))


def shown_of_collection(path: Path, prompts: Path, decode: Decode) -> Shown:
    """Return rollouts of collected occurrences.

    Args:
        path (`Path`): `occurrences.parquet`, whose rows were checked.
        prompts (`Path`): `prompts.parquet`, which may be absent.
        decode (`Callable`): Token ids of a prompt to its text, or `None`.

    Raises:
        `ValueError`: for a file that is cut, or with values that cannot be.
    """
    places = [(path, span) for span in find_rollouts(path, by_step=False)]
    picked = _pick_within(places, MOST_OF_A_COLLECTION, MOST_TOKENS)
    present = pq.read_schema(path).names
    names = [name for name in COLLECTED if name in present]
    prompt_text = _prompt_texts(prompts, decode)
    shown = []
    for _, span in picked:
        columns = read_rollout(path, span, names, most_tokens=MOST_OF_ONE)
        prompt = prompt_text(int(columns["prompt"][0])) if "prompt" in columns else None
        shown.append(_shown_rollout(span, columns, prompt, step=None))
    return Shown(shown, _note(picked, len(places), ""))


def _pick_from_steps(places: list[Place], tokens: int) -> list[Place]:
    """Return rollouts of as many steps as show at most `tokens` tokens, of two steps at least."""
    steps = sorted({span.step for _, span in places})
    for most in range(MOST_STEPS, 1, -1):
        chosen = [steps[place] for place in _spread(len(steps), most)]
        picked: list[Place] = []
        for step in chosen:
            of_step = [(path, span) for path, span in places if span.step == step]
            picked += _pick_within(of_step, MOST_OF_A_STEP, tokens // len(chosen))
        if _shown_tokens(picked) <= tokens:
            break
    return picked


def _pick_within(places: list[Place], most: int, tokens: int) -> list[Place]:
    """Return some of the rollouts, evenly, at least one, that together show at most `tokens` tokens."""
    while True:
        picked = [places[place] for place in _spread(len(places), most)]
        if most == 1 or _shown_tokens(picked) <= tokens:
            return picked
        most -= 1


def _spread(count: int, most: int) -> list[int]:
    """Return at most so many of `count` indices, evenly spread, the first and the last among them."""
    if count == 0:
        return []
    indices = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return sorted(set(indices.tolist()))


def _shown_tokens(picked: list[Place]) -> int:
    return sum(min(span.end - span.first, MOST_OF_ONE) for _, span in picked)


def _note(picked: list[Place], total: int, steps: str) -> str:
    cut = sum(span.end - span.first > MOST_OF_ONE for _, span in picked)
    texts = []
    if len(picked) < total:
        texts.append(f"A sample: {len(picked)} of {total} rollouts{steps}, taken evenly.")
    if cut > 0:
        texts.append(f"Of {cut} only the first {MOST_OF_ONE} tokens are shown.")
    return " ".join(texts)


def _shown_rollout(span: Span, columns: dict[str, np.ndarray], prompt: str | None, *, step: int | None) -> ShownRollout:
    """Return a rollout as the page shows it; a measure without any value is left out, but for the divergence."""
    known = {}
    for name in MEASURES:
        values = columns.get(name)
        if name == "kl" or (values is not None and not np.isnan(values).all()):
            known[name] = values
    for who in ("student", "teacher"):
        if f"{who}_top_ids" in columns:
            known[f"{who}_top"] = columns[f"{who}_top_ids"], columns[f"{who}_top_p"]
    return ShownRollout(step, span.rollout, prompt, columns["token_id"], **known)


def _prompt_texts(path: Path, decode: Decode) -> Callable[[int], str | None]:
    """Return a function from the index of a prompt to its text."""
    if not path.is_file():
        return lambda prompt: None
    ids_of = read_prompts(path)

    def text_of(prompt: int) -> str | None:
        ids = ids_of(prompt)
        return decode(ids) if _are_ids(ids) else None

    return text_of


def _are_ids(value) -> bool:
    return isinstance(value, list) and all(type(id) is int and 0 <= id < MAX_VOCABULARY for id in value)


def _viewer(shown: list[ShownRollout], note: str, contents: Contents, rocks: frozenset[int]) -> list[Block]:
    """Return the blocks that show some rollouts, with the texts of all tokens in them."""
    if not shown:
        return []
    ids: set[int] = set()
    for rollout in shown:
        ids.update(rollout.token_ids.tolist())
        for top in (rollout.student_top, rollout.teacher_top):
            if top is not None:
                ids.update(top[0].ravel().tolist())
    texts = {id: contents.names.text_of(id) for id in sorted(ids)}
    texts = {id: text for id, text in texts.items() if text is not None}

    blocks: list[Block] = []
    if note.strip():
        blocks.append(Note(note))
    if not contents.names.complete:
        blocks.append(Note("No tokenizer of these ids is on this machine, so tokens stand as their ids."))
    return [*blocks, Rollouts(shown, texts, rocks)]
