"""What a folder holds that a report or a card is made of: everything is found, checked and named here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..artefacts.fingerprint import load_tokenizer
from ..artefacts.occurrences import Occurrences
from ..artefacts.run_files import (
    GRADIENTS_FILE,
    KNOCKOUT_FILE,
    OCCURRENCES_FILE,
    PROMPTS_FILE,
    ROCK_SET_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    TOKEN_STATS_FILE,
    TOKENIZER_FILE,
    Log,
    find_checkpoints,
    read_knockout,
    read_run,
    read_summary,
)
from ..artefacts.sampled_rollouts import find_sample_files
from ..rocks.rock_set import RockSet
from .plots.runs import ARMS


@dataclass(frozen=True)
class Run:
    """A training run in a folder.

    Args:
        folder (`Path`): Its output folder.
        record (`dict`): What it says of itself (`opd_run.json`).
    """

    folder: Path
    record: dict[str, Any]

    @property
    def log(self) -> Log:
        """Lines of its log."""
        return self.record["log"]

    @cached_property
    def windows(self) -> list[tuple[int, Path]]:
        """Last step and file of the statistics in each checkpoint, in order."""
        files = [(step, folder / TOKEN_STATS_FILE) for step, folder in find_checkpoints(self.folder)]
        return [(step, path) for step, path in files if path.is_file()]

    @property
    def samples(self) -> list[Path]:
        """Files of its sampled rollouts."""
        return find_sample_files(self.folder)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return a metric of the log over steps; a step that was done again counts once, the last time."""
        return sorted({int(line["step"]): line[name] for line in self.log if name in line}.items())


@dataclass(frozen=True)
class Contents:
    """Contents of a folder that a report is made of; missing parts are `None` or empty.

    Args:
        folder (`Path`): The folder.
        runs (`dict[str, Run]`): Training runs: the folder's own (named by its weighting), or an arm for each subfolder.
        summary (`dict`, *optional*): Of a demo.
        rocks (`RockSet`, *optional*): The rock set.
        occurrences (`Occurrences`, *optional*): Collected rollouts.
        knockout (`dict`, *optional*): Result of a probe.
    """

    folder: Path
    runs: dict[str, Run] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    rocks: RockSet | None = None
    occurrences: Occurrences | None = None
    knockout: dict[str, Any] | None = None

    @property
    def gradients(self) -> Path | None:
        """The table of the gradient study."""
        path = self.folder / GRADIENTS_FILE
        return path if path.is_file() else None

    @property
    def other_rocks(self) -> bool:
        """Whether a run was given other rocks than those of the rock set that lies here now."""
        here = None if self.rocks is None else [rock.id for rock in self.rocks.rocks]
        given = (run.record.get("rocks") for run in self.runs.values())
        return any(ids is not None and ids != here for ids in given)

    @property
    def prompts(self) -> Path:
        """Where the prompts of collected rollouts would lie."""
        return self.folder / PROMPTS_FILE

    @property
    def main_run(self) -> Run | None:
        """The run whose tokens are looked at: the first, which is `uniform` where there is one."""
        return next(iter(self.runs.values()), None)

    @cached_property
    def names(self) -> Names:
        """Texts of token ids, by the tokenizer that the folder's files were made with."""
        return Names(self)


class Names:
    """Texts of token ids: of the tokenizer of the same fingerprint where it is here, else those of the rocks.

    Args:
        contents (`Contents`): The folder.
    """

    def __init__(self, contents: Contents):
        sections = [run.record["measure"].get("tokenizer") for run in contents.runs.values()]
        sections += [contents.occurrences.metadata.get("tokenizer")] if contents.occurrences else []
        sections += [contents.rocks.tokenizer] if contents.rocks else []
        sections = [section for section in sections if isinstance(section, dict) and section.get("fingerprint")]
        folders = [contents.folder, *(run.folder for run in contents.runs.values())]
        folders += [path.parent for run in contents.runs.values() for _, path in run.windows[-1:]]
        places = [str(folder) for folder in folders if (folder / TOKENIZER_FILE).is_file()]
        texts = {rock.id: rock.text for rock in contents.rocks.rocks} if contents.rocks else {}
        if contents.rocks and contents.rocks.controls and contents.rocks.controls.texts:
            texts |= dict(zip(contents.rocks.controls.ids, contents.rocks.controls.texts, strict=True))
        self._known = {id: text for id, text in texts.items() if text is not None}
        self._tokenizer = None
        for section in sections[:1]:
            for place in [*places, section.get("name")]:
                self._tokenizer = self._tokenizer or load_tokenizer(place, section["fingerprint"])

    @property
    def complete(self) -> bool:
        """Whether every id has a text."""
        return self._tokenizer is not None

    def text_of(self, id: int) -> str | None:
        """Return the text of a token, `None` where nothing names it."""
        if id not in self._known and self._tokenizer is not None:
            self._known[id] = self._tokenizer.decode([id]) if id < len(self._tokenizer) else None
        return self._known.get(id)

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of several tokens, `None` without a tokenizer."""
        return (
            None if self._tokenizer is None else self._tokenizer.decode([id for id in ids if id < len(self._tokenizer)])
        )


def read_contents(folder: Path) -> Contents:
    """Return what a folder holds.

    Raises:
        `ValueError`: for a folder that holds nothing of this package's, and for a file that is broken.
        `OSError`: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    occurrences = folder / OCCURRENCES_FILE
    knockout = folder / KNOCKOUT_FILE
    summary = folder / SUMMARY_FILE
    rocks = folder / ROCK_SET_FILE
    found = Contents(
        folder,
        runs=_runs(folder),
        summary=read_summary(summary) if summary.is_file() else None,
        rocks=RockSet.load(rocks) if rocks.is_file() else None,
        occurrences=Occurrences(occurrences) if occurrences.is_file() else None,
        knockout=read_knockout(knockout) if knockout.is_file() else None,
    )
    parts = found.runs, found.summary, found.rocks, found.occurrences, found.knockout, found.gradients
    if not any(parts):
        raise ValueError(
            f"{folder} holds nothing to report: name the output folder of `trl-opd train`, `demo` or `collect`, or one "
            f"with {ROCK_SET_FILE}, {KNOCKOUT_FILE} or {GRADIENTS_FILE}."
        )
    return found


def _runs(folder: Path) -> dict[str, Run]:
    if (folder / RUN_FILE).is_file():
        record = read_run(folder / RUN_FILE)
        return {str(record["arguments"].get("token_weighting", "uniform")): Run(folder, record)}
    found = {path.parent.name: path for path in sorted(folder.glob(f"*/{RUN_FILE}"))}
    order = [*(arm for arm in ARMS if arm in found), *(name for name in found if name not in ARMS)]
    return {name: Run(found[name].parent, read_run(found[name])) for name in order}
