"""What a report is made of: sections of facts, tables, plots, notes and rollouts, before they are a page."""

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
    """Names and what they are, in order; both are plain text."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        caption (`str`): What one sees, with the units.
        columns (`Mapping[str, str]`): Head of each column, and how its numbers are formatted (a format of Python such
            as ".4f"), or "" for text.
        rows (`Sequence[Sequence]`): A text, a number or `None` (not known) for each column.
        tool (`bool`, *optional*, defaults to `False`): Whether it can be sorted and searched.
    """

    caption: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[str | float | int | None]]
    tool: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot: its SVG (`canvas.to_svg`), what it shows in words, and a note below it."""

    svg: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class ShownRollout:
    """A completion, token by token, `n` of them; a column that is not known is `None`, a value that is not is NaN.

    Args:
        step (`int`, *optional*): Optimizer step that sampled it; `None` for a collection.
        rollout (`int`): Its index in that step, or in the collection.
        prompt (`str`, *optional*): Text of its prompt.
        token_ids (`np.ndarray`): Emitted tokens, `(n,)`.
        kl (`np.ndarray`): KL(student ‖ teacher) of the distributions that predicted each, nats, `(n,)`.
        kl_pre (`np.ndarray`, *optional*): The same before the distillation, `(n,)`.
        entropy (`np.ndarray`, *optional*): Of the student, nats, `(n,)`.
        weight (`np.ndarray`, *optional*): In the loss; 0 is frozen, `(n,)`.
        student_p, teacher_p (`np.ndarray`, *optional*): Probability of the emitted token, `(n,)`.
        student_top, teacher_top (`tuple[np.ndarray, np.ndarray]`, *optional*):
            Ids and probabilities of the five likeliest tokens, `(n, 5)` each.
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


@dataclass(frozen=True)
class Rollouts:
    """Completions that can be looked at.

    Args:
        rollouts (`Sequence[ShownRollout]`): The rollouts, ordered by step.
        texts (`Mapping[int, str]`): Text of each token id as the tokenizer decodes it, raw; ids may be missing.
        rocks (`frozenset[int]`): Ids of the rocks.
    """

    rollouts: Sequence[ShownRollout]
    texts: Mapping[int, str]
    rocks: frozenset[int]


Block = Note | Facts | Table | Plot | Rollouts


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor (letters only), title and blocks."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    lead: str
    sections: Sequence[Section] = field(default_factory=tuple)
