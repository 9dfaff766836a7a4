"""Writes the report of a folder: one HTML file with a section for everything that the folder has data for."""

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

PARTS: tuple[Callable[[Contents], Section | None], ...] = (what_was_run, training, rocks, rollouts, evidence)


def write_report(folder: str | os.PathLike, output: str | os.PathLike, *, show_progress: bool = True) -> list[str]:
    """Write the report of a folder to an HTML file, which replaces an older one only when it is complete.

    Args:
        folder (`str` or `os.PathLike`): Output folder of a run, a demo or a collection.
        output (`str` or `os.PathLike`): The HTML file.
        show_progress (`bool`, *optional*, defaults to `True`): Show a progress bar over the sections.

    Returns:
        `list[str]`: the titles of the sections.

    Raises:
        `ValueError`: if the folder holds nothing to report or a broken file, or if the output cannot be written.
        `OSError`: if there is no such folder.
    """
    contents = read_contents(Path(folder))
    output = Path(output)
    require_writable(output)
    if output.suffix.lower() not in (".html", ".htm"):
        # A wrong name could be one of the files that the report is made from.
        raise ValueError(f"The report is an HTML file: name one that ends in .html, got {output}.")

    sections = []
    with tqdm(PARTS, desc="report", unit="part", leave=False, delay=0, disable=not show_progress) as progress:
        for make_section in progress:
            progress.refresh()
            section = make_section(contents)
            if section is not None:
                sections.append(section)

    name = contents.folder.resolve().name
    page = Page(title=f"{name}: on-policy distillation, token by token", lead=_lead(contents), sections=sections)
    text = render(page)
    with complete_file(output) as part:
        part.write_text(text, encoding="utf-8")
    return [section.title for section in sections]


def _lead(contents: Contents) -> str:
    run = contents.main_run
    sentences = []
    if run is not None:
        sentences.append(f"Run of {run.record['started']}.")
    if contents.rocks is not None:
        sentences.append(f"{len(contents.rocks.rocks)} rock types.")
    return " ".join(sentences)
