"""A folder -> its report: one HTML file of whatever it holds; a part without data is left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..artefacts.atomic import complete_file, require_writable
from .blocks import Page, Section
from .contents import Contents, read_contents
from .page import render
from .sections.evidence import evidence
from .sections.rocks import rocks
from .sections.rollouts import rollouts
from .sections.run import training, what_was_run

PARTS: dict[str, Callable[[Contents], Section | None]] = {
    "what was run": what_was_run,
    "training": training,
    "rocks": rocks,
    "rollouts": rollouts,
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
    if output.suffix.lower() not in (".html", ".htm"):  # so that no file is written over that a report is made of
        raise ValueError(f"The report is an HTML file: name one that ends in .html, got {output}.")
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


def _lead(contents: Contents) -> str:
    run = contents.main_run
    parts = []
    if run is not None:
        parts.append(f"Run of {run.record['started']}.")
    if contents.rocks is not None:
        parts.append(f"{len(contents.rocks.rocks)} rock types.")
    return " ".join(parts)
