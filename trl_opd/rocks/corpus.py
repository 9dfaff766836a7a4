"""Occurrences of one half of the prompts, in memory: the half that selects rocks; the other half judges them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..artefacts.occurrences import Occurrences
from ..statistics import ratio_interval

# No neighbour there: the window ends with the completion.
NO_TOKEN = -1


@dataclass(frozen=True)
class Corpus:
    """Columns of occurrences in the order of (rollout, position), each of shape `(N,)`.

    Args:
        rollout, position, token_id (`np.ndarray`): As in the file, int32.
        kl (`np.ndarray`): Divergence, nats, float32.
        kl_pre (`np.ndarray`, *optional*): The same under the reference student.
    """

    rollout: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    kl: np.ndarray
    kl_pre: np.ndarray | None = None

    @property
    def rollouts(self) -> int:
        """Number of rollouts."""
        return len(self.starts)

    @property
    def starts(self) -> np.ndarray:
        """First row of every rollout."""
        if len(self.rollout) == 0:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(np.concatenate([[True], self.rollout[1:] != self.rollout[:-1]]))

    def take(self, places: np.ndarray) -> Corpus:
        """Return the corpus of the rollouts at some places, in ascending order."""
        places = np.sort(places)
        starts = self.starts
        ends = np.append(starts[1:], len(self.rollout))
        rows = np.concatenate([np.arange(starts[place], ends[place]) for place in places])
        columns = (self.rollout, self.position, self.token_id, self.kl)
        return Corpus(*(column[rows] for column in columns), None if self.kl_pre is None else self.kl_pre[rows])

    def windows(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Return the tokens around some rows, `(len(rows), 2 * width)`: the left ones from near to far, then the right.

        `NO_TOKEN` beyond the ends of the completion, and where a position between is missing.
        """
        found = np.full((len(rows), 2 * width), NO_TOKEN, dtype=np.int32)
        for place, offset in enumerate(window_offsets(width)):
            other = rows + offset
            inside = (other >= 0) & (other < len(self.token_id))
            other = np.where(inside, other, rows)
            inside &= self.rollout[other] == self.rollout[rows]
            inside &= self.position[other] == self.position[rows] + offset
            found[inside, place] = self.token_id[other[inside]]
        return found


def window_offsets(width: int) -> list[int]:
    """Return the offsets of a window in the order of its columns: -1, -2, ..., 1, 2, ..."""
    return [*range(-1, -width - 1, -1), *range(1, width + 1)]


def split_units(occurrences: Occurrences) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts (rollouts, where there is no prompt) that select rocks and those that judge them.

    In ascending order, counted from 0: the even ones select.

    Raises:
        `ValueError`: if there is one rollout only.
    """
    units = occurrences.units()
    return units[::2], units[1::2]


def read_selection(occurrences: Occurrences, units: np.ndarray) -> Corpus:
    """Return the rows of some prompts; every row of the file is checked on the way.

    Raises:
        `ValueError`: as [`Occurrences.batches`] does, and if the file has one rollout only.
    """
    names = ["rollout", "position", "token_id", "kl", *(["kl_pre"] if occurrences.has_pre else [])]
    # Room for all rows: what is never written to takes no memory.
    columns = {name: np.empty(occurrences.rows, np.float32 if name.startswith("kl") else np.int32) for name in names}
    first, several, count = None, False, 0
    for batch in occurrences.batches():
        first = batch["rollout"][0] if first is None else first
        several |= bool(batch["rollout"][-1] != first)
        chosen = is_among(batch["unit"], units)
        end = count + int(chosen.sum())
        for name, column in columns.items():
            column[count:end] = batch[name][chosen]
        count = end
    if not several:
        raise ValueError(
            f"{occurrences.path} has one rollout only: nothing could be told apart from chance. Collect more prompts."
        )
    return Corpus(**{name: column[:count] for name, column in columns.items()})


def heldout_shares(occurrences: Occurrences, units: np.ndarray, rocks: np.ndarray, seed: int) -> dict | None:
    """Return the rocks' share of the tokens and of the divergence in some prompts, with bootstrap intervals over them.

    `None` without a prompt.
    """
    if len(units) == 0:
        return None
    sums = np.zeros((4, len(units)))  # rocks' tokens, tokens, rocks' divergence, divergence
    for batch in occurrences.batches():
        chosen = is_among(batch["unit"], units)
        place = np.searchsorted(units, batch["unit"][chosen])
        is_rock, kl = np.isin(batch["token_id"][chosen], rocks), batch["kl"][chosen].astype(np.float64)
        for row, weights in enumerate((is_rock, np.ones(len(place)), is_rock * kl, kl)):
            sums[row] += np.bincount(place, weights, len(units))
    found = {}
    for name, (part, whole) in (("token_share", sums[:2]), ("kl_share", sums[2:])):
        total = whole.sum()
        found[name] = float(part.sum() / total) if total > 0 else 0.0
        interval = ratio_interval(part, whole, seed=seed)
        found[f"{name}_ci95"] = interval and list(interval)
    return found | {"prompts": len(units)}


def is_among(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return which values stand in a sorted array."""
    if len(units) == 0:
        return np.zeros(len(values), dtype=bool)
    return units[np.searchsorted(units, values).clip(max=len(units) - 1)] == values
