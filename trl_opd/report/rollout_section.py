"""Section of a report about completions, token by token."""

from __future__ import annotations

from .blocks import Block, Note, Rollouts, Section, ShownRollout
from .contents import Contents
from .rollouts import MOST_TOKENS, shown_of_collection, shown_of_run


def rollouts(contents: Contents) -> Section | None:
    """Return completions that can be looked at, of the runs or of a collection."""
    ids = frozenset(rock.id for rock in contents.rocks.rocks) if contents.rocks else frozenset()
    blocks: list[Block] = []
    sampled = {name: run.samples for name, run in contents.runs.items() if run.samples}
    for name, files in sampled.items():
        shown = shown_of_run(files, contents.names.decode, most_tokens=MOST_TOKENS // len(sampled))
        title = f"Rollouts of the arm {name}. " if len(sampled) > 1 else ""
        blocks += _viewer(shown.rollouts, title + shown.note, contents, ids)
    if contents.occurrences is not None and not sampled:
        shown = shown_of_collection(contents.occurrences.path, contents.prompts, contents.names.decode)
        blocks += _viewer(shown.rollouts, shown.note, contents, ids)
    return Section("rollouts", "Rollouts", blocks) if blocks else None


def _viewer(shown: list[ShownRollout], note: str, contents: Contents, rocks: frozenset[int]) -> list[Block]:
    ids = {int(id) for rollout in shown for id in rollout.token_ids}
    for rollout in shown:
        for top in (rollout.student_top, rollout.teacher_top):
            ids |= set() if top is None else {int(id) for id in top[0].ravel()}
    texts = {id: text for id in sorted(ids) if (text := contents.names.text_of(id)) is not None}
    notes = [Note(note)] if note.strip() else []
    if not contents.names.complete:
        notes.append(Note("No tokenizer of these ids is on this machine, so tokens stand as their ids."))
    return [*notes, Rollouts(shown, texts, rocks)] if shown else []
