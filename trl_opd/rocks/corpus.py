"""Occurrences in memory: those of the prompts that select the rocks, and the rocks' shares on the held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..artefacts.occurrences import Occurrences
from ..statistics import ratio_interval

# Token id in a window where the completion has no token.
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
        # Indices of rollouts are at least 0, so the first row differs from the -1 before it.
        steps = np.diff(self.rollout, prepend=np.int32(-1))
        return np.flatnonzero(steps)

    def take(self, places: np.ndarray) -> Corpus:
        """Return the corpus of the rollouts at `places` (0 for the first rollout), in the order of this corpus."""
        chosen = self.rollout[self.starts[places]]
        rows = np.flatnonzero(np.isin(self.rollout, chosen))
        kl_pre = self.kl_pre
        if kl_pre is not None:
            kl_pre = kl_pre[rows]
        return Corpus(
            rollout=self.rollout[rows],
            position=self.position[rows],
            token_id=self.token_id[rows],
            kl=self.kl[rows],
            kl_pre=kl_pre,
        )

    def windows(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Return the tokens around each row, `(len(rows), 2 * width)`: the left ones from near to far, then the right.

        An entry is `NO_TOKEN` beyond the ends of the completion and across a missing position.
        """
        rollout = self.rollout[rows]
        position = self.position[rows]
        found = np.empty((len(rows), 2 * width), dtype=np.int32)
        for place, offset in enumerate(window_offsets(width)):
            neighbour = rows + offset
            is_row = (neighbour >= 0) & (neighbour < len(self.token_id))
            # A neighbour outside the corpus is replaced by the row itself, whose position is never the right one.
            neighbour = np.where(is_row, neighbour, rows)
            same_rollout = self.rollout[neighbour] == rollout
            right_position = self.position[neighbour] == position + offset
            found[:, place] = np.where(same_rollout & right_position, self.token_id[neighbour], NO_TOKEN)
        return found


def window_offsets(width: int) -> np.ndarray:
    """Return the offsets of a window in the order of its columns, `(2 * width,)`: -1, -2, ..., 1, 2, ..."""
    distances = np.arange(1, width + 1)
    return np.concatenate([-distances, distances])


def split_units(occurrences: Occurrences) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts that select rocks and the held-out prompts; rollouts if the file has no prompts.

    In ascending order, the first, third, ... prompt selects, and the second, fourth, ... is held out.
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
    last = None
    count = 0
    for batch in occurrences.batches():
        rollout = batch["rollout"]
        last = rollout[-1]
        if first is None:
            first = rollout[0]
        chosen = np.isin(batch["unit"], units)
        end = count + np.count_nonzero(chosen)
        for name, column in columns.items():
            column[count:end] = batch[name][chosen]
        count = end
    if first == last:
        raise ValueError(
            f"{occurrences.path} has one rollout only, so rocks cannot be distinguished from chance. Collect more "
            "prompts."
        )
    return Corpus(**{name: column[:count] for name, column in columns.items()})


def heldout_shares(occurrences: Occurrences, units: np.ndarray, rocks: np.ndarray, seed: int) -> dict | None:
    """Return the rocks' share of the tokens and of the divergence in the prompts `units`; `None` if there are none.

    The intervals come from a bootstrap over the prompts.
    """
    prompts = len(units)
    if prompts == 0:
        return None
    tokens = np.zeros(prompts)
    rock_tokens = np.zeros(prompts)
    all_kl = np.zeros(prompts)
    rock_kl = np.zeros(prompts)
    for batch in occurrences.batches():
        chosen = np.isin(batch["unit"], units)
        place = np.searchsorted(units, batch["unit"][chosen])
        is_rock = np.isin(batch["token_id"][chosen], rocks)
        kl = batch["kl"][chosen]
        tokens += np.bincount(place, minlength=prompts)
        rock_tokens += np.bincount(place, is_rock, prompts)
        all_kl += np.bincount(place, kl, prompts)
        rock_kl += np.bincount(place, is_rock * kl, prompts)

    token_share, token_interval = _share(rock_tokens, tokens, seed)
    kl_share, kl_interval = _share(rock_kl, all_kl, seed)
    return {
        "token_share": token_share,
        "token_share_ci95": token_interval,
        "kl_share": kl_share,
        "kl_share_ci95": kl_interval,
        "prompts": prompts,
    }


def _share(parts: np.ndarray, wholes: np.ndarray, seed: int) -> tuple[float, list[float] | None]:
    """Return `sum(parts) / sum(wholes)`, or 0 if the wholes sum to 0, and its bootstrap interval."""
    total = wholes.sum()
    if total <= 0:
        return 0.0, None
    share = float(parts.sum() / total)
    interval = ratio_interval(parts, wholes, seed=seed)
    if interval is None:
        return share, None
    return share, list(interval)
