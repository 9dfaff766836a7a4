"""The parts of a report before it is rendered: sections of notes, facts, tables, plots and rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Note:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Facts:
    """A list of names and their values, both plain text, in the order in which they are shown."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table with a caption, whose numbers are formatted by column.

    Args:
        caption (`str`): What the table shows, with units.
        columns (`Mapping[str, str]`): Head of each column -> Python format of its numbers, for example ".4f", or "" for
            text.
        rows (`Sequence[Sequence]`): For each column a text, a number, or `None` where the value is not known.
        tool (`bool`, *optional*, defaults to `False`): Whether readers can sort and search the table.
    """

    caption: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[str | float | int | None]]
    tool: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot: its SVG from `canvas.to_svg`, a label that says in words what it shows, and a note below it."""

    svg: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class ShownRollout:
    """A completion of `n` tokens with the metrics of each; an unknown column is `None`, an unknown value NaN.

    Args:
        step (`int`, *optional*): Optimizer step that sampled it; `None` in a collection.
        rollout (`int`): Its index in that step or collection.
        prompt (`str`, *optional*): Text of its prompt.
        token_ids (`np.ndarray`): Emitted tokens, `(n,)`.
        kl (`np.ndarray`): KL(student ‖ teacher) of the distributions that predicted each token, nats, `(n,)`.
        kl_pre (`np.ndarray`, *optional*): This divergence before the distillation, nats, `(n,)`.
        entropy (`np.ndarray`, *optional*): Entropy of the student's distribution, nats, `(n,)`.
        weight (`np.ndarray`, *optional*): Weight in the loss, 0 for a frozen token, `(n,)`.
        student_p, teacher_p (`np.ndarray`, *optional*): Either model's probability of the emitted token, `(n,)`.
        student_top, teacher_top (`tuple[np.ndarray, np.ndarray]`, *optional*):
            Ids and probabilities of either model's five likeliest tokens, `(n, 5)` each.
    """

    step: int | None
    rollout: int
    prompt: str | None
    token_ids: np.ndarray
    kl: np.ndarray
    kl_pre: np.ndarray | None = None
    entropy: np.ndarray | None = None
    weight: np.ndarray | None = None
    student_p: np.ndarray | None = None
    teacher_p: np.ndarray | None = None
    student_top: tuple[np.ndarray, np.ndarray] | None = None
    teacher_top: tuple[np.ndarray, np.ndarray] | None = None

    def shown_ids(self) -> set[int]:
        """Return the ids of all tokens that are shown: the emitted ones, and the likeliest ones of either model."""
        ids = set(self.token_ids.tolist())
        for top in (self.student_top, self.teacher_top):
            if top is not None:
                top_ids, _ = top
                ids.update(np.ravel(top_ids).tolist())
        return ids


@dataclass(frozen=True)
class Rollouts:
    """Completions to show token by token.

    Args:
        rollouts (`Sequence[ShownRollout]`): The rollouts, ordered by step.
        texts (`Mapping[int, str]`): Token id -> its text as the tokenizer decodes it, unescaped; ids may be missing.
        rocks (`frozenset[int]`): Ids of the rocks.
    """

    rollouts: Sequence[ShownRollout]
    texts: Mapping[int, str]
    rocks: frozenset[int]


Block = Note | Facts | Table | Plot | Rollouts


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor (ASCII letters only), title and blocks."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: its title, a sentence below the title, and its sections."""

    title: str
    lead: str
    sections: Sequence[Section] = field(default_factory=tuple)
