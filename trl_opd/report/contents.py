"""Finds, checks and reads everything in a folder that a report or a model card is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

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
from .plots.runs import ARMS, Estimate

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A training run in a folder.

    Args:
        folder (`Path`): Its output folder.
        record (`dict`): Content of its `opd_run.json`: models, arguments, versions and the log.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def log(self) -> Log:
        """Lines of the run's log."""
        return self.record["log"]

    @cached_property
    def windows(self) -> list[tuple[int, Path]]:
        """Last step and file of the token statistics in each checkpoint, in order."""
        found = []
        for step, checkpoint in find_checkpoints(self.folder):
            path = checkpoint / TOKEN_STATS_FILE
            if path.is_file():
                found.append((step, path))
        return found

    @property
    def samples(self) -> list[Path]:
        """Files of the run's sampled rollouts."""
        return find_sample_files(self.folder)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return a metric of the log over steps; of a step that was repeated after a resume, only the last value."""
        values = {int(line["step"]): line[name] for line in self.lines_with(name)}
        return sorted(values.items())

    def lines_with(self, name: str) -> Log:
        """Return the lines of the log that have a metric."""
        return [line for line in self.log if name in line]

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric over the lines of the log that have it, `None` without a line."""
        values = [line[name] for line in self.lines_with(name)]
        if not values:
            return None
        return sum(values) / len(values)


@dataclass(frozen=True)
class Contents:
    """Contents of a folder that a report is made from; missing parts are `None` or empty.

    Args:
        folder (`Path`): The folder.
        runs (`dict[str, Run]`): Training runs by name: the folder's own run under its weighting, or the run in each
            subfolder under the subfolder's name.
        summary (`dict`, *optional*): Summary of a demo.
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
        """Table of a gradient study."""
        path = self.folder / GRADIENTS_FILE
        if not path.is_file():
            return None
        return path

    @property
    def rock_ids(self) -> list[int]:
        """Ids of the rocks in rank order, empty without a rock set."""
        if self.rocks is None:
            return []
        return [rock.id for rock in self.rocks.rocks]

    @property
    def other_rocks(self) -> bool:
        """Whether a run was trained with rocks that differ from the rock set now in this folder."""
        here = self.rock_ids if self.rocks else None
        given = [run.record.get("rocks") for run in self.runs.values()]
        return any(ids not in (None, here) for ids in given)

    @property
    def prompts(self) -> Path:
        """Path that the prompts of collected rollouts have, whether or not the file exists."""
        return self.folder / PROMPTS_FILE

    @property
    def main_run(self) -> Run | None:
        """Run whose tokens the report shows: the first one, which is the `uniform` arm if there is one."""
        return next(iter(self.runs.values()), None)

    @cached_property
    def names(self) -> Names:
        """Texts of token ids, from the tokenizer that the folder's files were made with."""
        return Names(self)


class Names:
    """Texts of token ids: from the tokenizer with the recorded fingerprint if it can be found, else of the rocks only.

    Args:
        contents (`Contents`): The folder.
    """

    def __init__(self, contents: Contents):
        self._known = {} if contents.rocks is None else _texts_of(contents.rocks)
        self._tokenizer = _find_tokenizer(contents)
        self._size = 0 if self._tokenizer is None else len(self._tokenizer)

    @property
    def complete(self) -> bool:
        """Whether every id has a text."""
        return self._tokenizer is not None

    def text_of(self, id: int) -> str | None:
        """Return the text of a token, `None` where it is not known."""
        if id not in self._known and id < self._size:
            self._known[id] = self._tokenizer.decode([id])
        return self._known.get(id)

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of several tokens, `None` without a tokenizer."""
        if self._tokenizer is None:
            return None
        known = [id for id in ids if id < self._size]
        return self._tokenizer.decode(known)


def _texts_of(rock_set: RockSet) -> dict[int, str]:
    """Return the texts of rocks and controls by id, as far as the rock set has them."""
    texts = {rock.id: rock.text for rock in rock_set.rocks}
    controls = rock_set.controls
    if controls and controls.texts:
        texts.update(zip(controls.ids, controls.texts, strict=True))
    return {id: text for id, text in texts.items() if text is not None}


def _find_tokenizer(contents: Contents):
    """Return the tokenizer that the folder's files name, `None` where no tokenizer has its fingerprint."""
    runs = contents.runs.values()
    recorded = [run.record["measure"].get("tokenizer") for run in runs]
    if contents.occurrences is not None:
        recorded.append(contents.occurrences.metadata.get("tokenizer"))
    if contents.rocks is not None:
        recorded.append(contents.rocks.tokenizer)
    wanted = next(filter(_has_fingerprint, recorded), None)
    if wanted is None:
        return None

    folders = [contents.folder]
    folders += [run.folder for run in runs]
    for run in runs:
        if run.windows:
            _, path = run.windows[-1]
            folders.append(path.parent)
    places = [str(folder) for folder in folders if (folder / TOKENIZER_FILE).is_file()]
    places.append(wanted.get("name"))
    for place in places:
        tokenizer = load_tokenizer(place, wanted["fingerprint"])
        if tokenizer:
            return tokenizer
    return None


def accuracy_in(line: dict[str, Any]) -> Estimate:
    """Return the accuracy in a line of a log, and the two ends of its 95 % interval, which may be `None`."""
    low = line.get("eval_accuracy_ci95_low")
    high = line.get("eval_accuracy_ci95_high")
    return line["eval_accuracy"], low, high


def _has_fingerprint(recorded: Any) -> bool:
    return isinstance(recorded, dict) and bool(recorded.get("fingerprint"))


def read_contents(folder: Path) -> Contents:
    """Return everything in a folder that a report can show.

    Args:
        folder (`Path`): Output folder of a run, a demo or a collection.

    Raises:
        `ValueError`: if the folder holds no file of this package, or a broken one.
        `OSError`: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = Contents(
        folder,
        runs=_read_runs(folder),
        summary=_read_if_present(folder / SUMMARY_FILE, read_summary),
        rocks=_read_if_present(folder / ROCK_SET_FILE, RockSet.load),
        occurrences=_read_if_present(folder / OCCURRENCES_FILE, Occurrences),
        knockout=_read_if_present(folder / KNOCKOUT_FILE, read_knockout),
    )
    parts = (found.runs, found.summary, found.rocks, found.occurrences, found.knockout, found.gradients)
    if not any(parts):
        raise ValueError(
            f"{folder} holds nothing to report: name the output folder of `trl-opd train`, `demo` or `collect`, or one "
            f"with {ROCK_SET_FILE}, {KNOCKOUT_FILE} or {GRADIENTS_FILE}."
        )
    return found


def _read_if_present(path: Path, read: Callable[[Path], T]) -> T | None:
    if not path.is_file():
        return None
    return read(path)


def _read_runs(folder: Path) -> dict[str, Run]:
    """Return the run of a folder, or those of its subfolders: first the arms in their usual order, then the others."""
    own = folder / RUN_FILE
    if own.is_file():
        record = read_run(own)
        weighting = record["arguments"].get("token_weighting", "uniform")
        return {str(weighting): Run(folder, record)}

    found = {path.parent.name: path for path in sorted(folder.glob(f"*/{RUN_FILE}"))}
    order = [arm for arm in ARMS if arm in found]
    order += [name for name in found if name not in ARMS]
    runs = {}
    for name in order:
        path = found[name]
        runs[name] = Run(path.parent, read_run(path))
    return runs
