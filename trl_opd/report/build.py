"""A folder -> its report: one HTML file of whatever it holds; a part without data is left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..files import complete_file, require_writable
from .blocks import Block, Note, Page, Rollouts, Section, ShownRollout
from .contents import Contents, read_contents
from .evidence_section import evidence
from .page import render
from .rock_section import rocks
from .rollouts import MOST_TOKENS, shown_of_collection, shown_of_run
from .run_section import training, what_was_run

PARTS: dict[str, Callable[[Contents], Section | None]] = {
    "what was run": what_was_run,
    "training": training,
    "rocks": rocks,
    "rollouts": lambda contents: rollouts(contents),
    "evidence": evidence,
}


def write_report(folder: str | os.PathLike, output: str | os.PathLike) -> list[str]:
    """Write the report of a folder; the file appears under its name only when it is complete.

    Args:
        folder (`str` or `os.PathLike`): What a run, a demo or a collection wrote.
        output (`str` or `os.PathLike`): The HTML file.

    Returns:
        `list[str]`: the titles of its parts.

    Raises:
        `ValueError`: for a folder that holds nothing, a broken file in it, or an output that cannot be written.
        `OSError`: if there is no such folder.
    """
    contents, output = read_contents(Path(folder)), Path(output)
    require_writable(output)
    sections = []
    for _, part in (bar := tqdm(PARTS.items(), desc="report", unit="part", leave=False)):
        bar.refresh()
        section = part(contents)
        sections += [] if section is None else [section]
    name = contents.folder.resolve().name
    text = render(Page(f"{name}: on-policy distillation, token by token", _lead(contents), sections))
    with complete_file(output) as part:
        part.write_text(text, encoding="utf-8")
    return [section.title for section in sections]


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


def _lead(contents: Contents) -> str:
    run = contents.main_run
    parts = []
    if run is not None:
        parts.append(f"Run of {run.record['started']}.")
    if contents.rocks is not None:
        parts.append(f"{len(contents.rocks.rocks)} rock types.")
    return " ".join(parts)
