"""Section of a report about rollouts: an evenly spaced sample of completions, with the measures of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ...artefacts.occurrences import MAX_VOCABULARY, read_prompts
from ...artefacts.rollout_rows import Span, find_rollouts, read_rollout
from ...artefacts.sampled_rollouts import LISTS, MEASURES, read_metadata
from ..blocks import Block, Note, Rollouts, Section, ShownRollout
from ..contents import Contents

# Most tokens shown on a page: a token takes about 250 bytes of it.
MOST_TOKENS = 10_000
# Most tokens shown of one rollout.
MOST_OF_ONE = 600
# Most steps of a run, most rollouts of each step, and most rollouts of a collection.
MOST_STEPS = 12
MOST_OF_A_STEP = 4
MOST_OF_A_COLLECTION = 12
# Measures that collected occurrences can have; sampled rollouts have more.
COLLECTED = ("kl", "kl_pre", "entropy", "weight")

# Ids of a prompt -> its text.
Decode = Callable[[Sequence[int]], str | None]
# A rollout: its file, and its place in there.
Place = tuple[Path, Span]


@dataclass(frozen=True)
class Shown:
    """Rollouts that a page shows, and a note on those that it leaves out or cuts; empty if there are none."""

    rollouts: list[ShownRollout]
    note: str


def rollouts(contents: Contents) -> Section | None:
    """Return the section with sampled rollouts of the runs, else of a collection; `None` if there are none.

    Raises:
        `ValueError`: if a file of rollouts is damaged or holds values that are not valid.
    """
    rocks = frozenset(contents.rock_ids)
    blocks: list[Block] = []
    decode = contents.names.decode
    sampled = {}
    for name, run in contents.runs.items():
        files = run.samples
        if files:
            sampled[name] = files

    arms = len(sampled)
    for name, files in sampled.items():
        shown = shown_of_run(files, decode, most_tokens=MOST_TOKENS // arms)
        note = shown.note
        if arms > 1:
            note = f"Rollouts of the arm {name}. {note}"
        blocks += _viewer(shown.rollouts, note, contents, rocks)
    if contents.occurrences is not None and not sampled:
        shown = shown_of_collection(contents.occurrences.path, contents.prompts, decode)
        blocks += _viewer(shown.rollouts, shown.note, contents, rocks)
    if not blocks:
        return None
    return Section("rollouts", "Rollouts", blocks)


def shown_of_run(files: Sequence[Path], decode: Decode, *, most_tokens: int = MOST_TOKENS) -> Shown:
    """Return a sample of the rollouts of a run, from evenly spaced steps with the first and the last among them.

    Args:
        files (`Sequence[Path]`): `rollout_samples.parquet`, or the parts of it while the run has not ended.
        decode (`Callable`): Returns the text of a prompt from its token ids, or `None`.
        most_tokens (`int`, *optional*): Limit of the tokens that are shown.

    Raises:
        `ValueError`: if a file is not Parquet, is damaged, or holds values that are not valid.
    """
    places = [(path, span) for path in files for span in find_rollouts(path, by_step=True)]
    picked = _pick_from_steps(places, most_tokens)
    names = MEASURES + LISTS
    prompts = {}
    shown = []
    for path, span in picked:
        if path not in prompts:
            prompts[path] = read_metadata(path).get("prompts")
        columns = read_rollout(path, span, names, most_tokens=MOST_OF_ONE)
        prompt = None
        if "prompt" in columns and isinstance(prompts[path], dict):
            ids = prompts[path].get(f"{span.step}/{columns['prompt'][0]}")
            prompt = _decoded(ids, decode)
        shown.append(_shown_rollout(span, columns, prompt, step=span.step))

    steps = {span.step for _, span in picked}
    all_steps = {span.step for _, span in places}
    note = _note(picked, len(places), f" from {len(steps)} of the {len(all_steps)} steps that were kept")
    return Shown(shown, note)


def shown_of_collection(path: Path, prompts: Path, decode: Decode) -> Shown:
    """Return a sample of collected rollouts, evenly spaced.

    Args:
        path (`Path`): `occurrences.parquet`, with rows that were checked.
        prompts (`Path`): `prompts.parquet`, which need not exist.
        decode (`Callable`): Returns the text of a prompt from its token ids, or `None`.

    Raises:
        `ValueError`: if a file is damaged or holds values that are not valid.
    """
    places = [(path, span) for span in find_rollouts(path, by_step=False)]
    picked = _pick_within(places, MOST_OF_A_COLLECTION, MOST_TOKENS)
    present = pq.read_schema(path).names
    names = [name for name in COLLECTED if name in present]
    prompt_text = _prompt_texts(prompts, decode)
    shown = []
    for _, span in picked:
        columns = read_rollout(path, span, names, most_tokens=MOST_OF_ONE)
        prompt = None
        if "prompt" in columns:
            first = columns["prompt"][0]
            prompt = prompt_text(int(first))
        shown.append(_shown_rollout(span, columns, prompt, step=None))
    note = _note(picked, len(places), "")
    return Shown(shown, note)


def _pick_from_steps(places: list[Place], tokens: int) -> list[Place]:
    """Return rollouts of evenly spaced steps: of the most steps, but at least two, that fit into `tokens` tokens."""
    by_step: dict[int, list[Place]] = {}
    for path, span in places:
        of_step = by_step.setdefault(span.step, [])
        of_step.append((path, span))
    steps = sorted(by_step)

    for most in range(MOST_STEPS, 1, -1):
        chosen = _spread(steps, most)
        picked: list[Place] = []
        for step in chosen:
            picked += _pick_within(by_step[step], MOST_OF_A_STEP, tokens // len(chosen))
        if _shown_tokens(picked) <= tokens:
            break
    return picked


def _pick_within(places: list[Place], most: int, tokens: int) -> list[Place]:
    """Return at most `most` evenly spaced rollouts: as many, but at least one, as fit into `tokens` tokens."""
    picked = _spread(places, most)
    while most > 1 and _shown_tokens(picked) > tokens:
        most -= 1
        picked = _spread(places, most)
    return picked


def _spread(items: list, most: int) -> list:
    """Return at most `most` evenly spaced items, with the first and, if `most` is above 1, the last among them."""
    count = len(items)
    if count <= most:
        return items
    places = np.linspace(0, count - 1, most).round()
    return [items[int(place)] for place in places]


def _shown_tokens(picked: list[Place]) -> int:
    return sum(min(span.end - span.first, MOST_OF_ONE) for _, span in picked)


def _note(picked: list[Place], total: int, steps: str) -> str:
    cut = 0
    for _, span in picked:
        if span.end - span.first > MOST_OF_ONE:
            cut += 1
    texts = []
    if len(picked) < total:
        texts.append(f"A sample: {len(picked)} of {total} rollouts{steps}, evenly spaced.")
    if cut > 0:
        what = "1 rollout is" if cut == 1 else f"{cut} rollouts are"
        texts.append(f"{what} cut: only the first {MOST_OF_ONE} tokens are shown.")
    return " ".join(texts)


def _shown_rollout(span: Span, columns: dict[str, np.ndarray], prompt: str | None, *, step: int | None) -> ShownRollout:
    """Return a rollout for the page; measures without any value are left out, except for the divergence."""
    known = {}
    for name in MEASURES:
        values = columns.get(name)
        if name == "kl" or (values is not None and not np.isnan(values).all()):
            known[name] = values
    for who in ("student", "teacher"):
        if f"{who}_top_ids" in columns:
            known[f"{who}_top"] = (columns[f"{who}_top_ids"], columns[f"{who}_top_p"])
    return ShownRollout(step, span.rollout, prompt, columns["token_id"], **known)


def _prompt_texts(path: Path, decode: Decode) -> Callable[[int], str | None]:
    """Return a function that gives the text of a prompt by its index, or `None` if it is not known."""
    if not path.is_file():
        return lambda prompt: None
    ids_of = read_prompts(path)

    def text_of(prompt: int) -> str | None:
        return _decoded(ids_of(prompt), decode)

    return text_of


def _decoded(ids: Any, decode: Decode) -> str | None:
    """Return the text of token ids from a file, `None` if they are not a list of ids, or not known."""
    if not isinstance(ids, list):
        return None
    for id in ids:
        if type(id) is not int or not 0 <= id < MAX_VOCABULARY:
            return None
    return decode(ids)


def _viewer(shown: list[ShownRollout], note: str, contents: Contents, rocks: frozenset[int]) -> list[Block]:
    """Return the blocks that show rollouts, with the texts of all tokens that occur in them."""
    if not shown:
        return []
    ids: set[int] = set()
    for rollout in shown:
        ids |= rollout.shown_ids()
    texts = {}
    for id in sorted(ids):
        text = contents.names.text_of(id)
        if text is not None:
            texts[id] = text

    blocks: list[Block] = []
    if note.strip():
        blocks.append(Note(note))
    if not contents.names.complete:
        blocks.append(Note("No tokenizer of these ids is on this machine, so tokens are shown as ids."))
    blocks.append(Rollouts(shown, texts, rocks))
    return blocks
