"""In-memory occurrences of the prompts that select the rocks, and the rocks' shares on the other prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..artefacts.occurrences import Occurrences
from ..statistics import ratio_interval

# Value of a missing neighbour, because a window ends with its completion.
NO_TOKEN = -1


@dataclass(frozen=True)
class Corpus:
    """Columns of a file of occurrences, ordered by (rollout, position), each of shape `(N,)`.

    Args:
        rollout, position, token_id (`np.ndarray`): The columns of the file, int32.
        kl (`np.ndarray`): Divergence, nats, float32.
        kl_pre (`np.ndarray`, *optional*): Divergence under the reference student, nats, float32.
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
        """First row of every rollout, `(rollouts,)`."""
        if len(self.rollout) == 0:
            return np.empty(0, dtype=np.int64)
        is_new = self.rollout[1:] != self.rollout[:-1]
        return np.flatnonzero(np.append(True, is_new))

    def take(self, places: np.ndarray) -> Corpus:
        """Return the corpus of the rollouts at `places` (0 for the first rollout), in ascending order."""
        places = np.sort(places)
        starts = self.starts
        ends = np.append(starts[1:], len(self.rollout))
        rows = np.concatenate([np.arange(starts[place], ends[place]) for place in places])
        return Corpus(
            rollout=self.rollout[rows],
            position=self.position[rows],
            token_id=self.token_id[rows],
            kl=self.kl[rows],
            kl_pre=None if self.kl_pre is None else self.kl_pre[rows],
        )

    def windows(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Return the tokens around each row, `(len(rows), 2 * width)`: the left ones from near to far, then the right.

        An entry is `NO_TOKEN` beyond the ends of the completion and across a missing position.
        """
        found = np.full((len(rows), 2 * width), NO_TOKEN, dtype=np.int32)
        for place, offset in enumerate(window_offsets(width)):
            other = rows + offset
            inside = (other >= 0) & (other < len(self.token_id))
            # A neighbour outside the arrays is replaced by the row itself, which the test of the position drops.
            other = np.where(inside, other, rows)
            inside &= self.rollout[other] == self.rollout[rows]
            inside &= self.position[other] == self.position[rows] + offset
            found[inside, place] = self.token_id[other[inside]]
        return found


def window_offsets(width: int) -> list[int]:
    """Return the offsets of a window in the order of its columns: -1, -2, ..., 1, 2, ..."""
    return [*range(-1, -width - 1, -1), *range(1, width + 1)]


def split_units(occurrences: Occurrences) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts that select rocks and those that judge them; rollouts if the file has no prompts.

    The prompts are numbered from 0 in ascending order: the even ones select, the odd ones judge.
    """
    units = occurrences.units()
    return units[::2], units[1::2]


def read_selection(occurrences: Occurrences, units: np.ndarray) -> Corpus:
    """Return the rows of the prompts `units`, after checks of every row of the file.

    Raises:
        `ValueError`: if [`Occurrences.batches`] finds a faulty row, or the file has only one rollout.
    """
    types = {"rollout": np.int32, "position": np.int32, "token_id": np.int32, "kl": np.float32}
    if occurrences.has_pre:
        types["kl_pre"] = np.float32
    # The columns have room for all rows; pages that are never written to take no memory.
    columns = {name: np.empty(occurrences.rows, type) for name, type in types.items()}

    first = None
    several = False
    count = 0
    for batch in occurrences.batches():
        if first is None:
            first = batch["rollout"][0]
        several |= bool(batch["rollout"][-1] != first)
        chosen = is_among(batch["unit"], units)
        end = count + int(chosen.sum())
        for name, column in columns.items():
            column[count:end] = batch[name][chosen]
        count = end
    if not several:
        raise ValueError(
            f"{occurrences.path} has one rollout only, so rocks cannot be distinguished from chance. Collect more "
            "prompts."
        )
    return Corpus(**{name: column[:count] for name, column in columns.items()})


def heldout_shares(occurrences: Occurrences, units: np.ndarray, rocks: np.ndarray, seed: int) -> dict | None:
    """Return the rocks' share of the tokens and of the divergence in the prompts `units`; `None` if there are none.

    The intervals come from a bootstrap over the prompts.
    """
    if len(units) == 0:
        return None
    rock_tokens = np.zeros(len(units))
    tokens = np.zeros(len(units))
    rock_kl = np.zeros(len(units))
    all_kl = np.zeros(len(units))
    for batch in occurrences.batches():
        chosen = is_among(batch["unit"], units)
        place = np.searchsorted(units, batch["unit"][chosen])
        is_rock = np.isin(batch["token_id"][chosen], rocks)
        kl = batch["kl"][chosen].astype(np.float64)
        rock_tokens += np.bincount(place, is_rock, len(units))
        tokens += np.bincount(place, minlength=len(units))
        rock_kl += np.bincount(place, is_rock * kl, len(units))
        all_kl += np.bincount(place, kl, len(units))

    token_share, token_interval = _share(rock_tokens, tokens, seed)
    kl_share, kl_interval = _share(rock_kl, all_kl, seed)
    return {
        "token_share": token_share,
        "token_share_ci95": token_interval,
        "kl_share": kl_share,
        "kl_share_ci95": kl_interval,
        "prompts": len(units),
    }


def _share(parts: np.ndarray, wholes: np.ndarray, seed: int) -> tuple[float, list[float] | None]:
    """Return `sum(parts) / sum(wholes)`, 0 for an empty whole, and its bootstrap interval."""
    total = wholes.sum()
    share = float(parts.sum() / total) if total > 0 else 0.0
    interval = ratio_interval(parts, wholes, seed=seed)
    return share, interval and list(interval)


def is_among(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return which values are in the sorted array `units`, bool, shape of `values`."""
    if len(units) == 0:
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(units, values).clip(max=len(units) - 1)
    return units[places] == values
