"""Counts and mean divergences of token types, from the statistics of a run or from collected rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artefacts.occurrences import Occurrences
from ..artefacts.token_stats import TokenStats, load_matching, merge_last_quarter
from ..rocks.cutoff import Sweep
from ..rocks.families import family_of

# Types whose text is assigned to a family, largest divergence first; the others carry less than a thousandth of it.
NAMED_TYPES = 20_000
CUTOFFS = 300
TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class TokenTypes:
    """Counts and mean divergences of all token types in some rollouts, `(V,)` each.

    Args:
        count (`np.ndarray`): How often each type was emitted.
        mean_kl (`np.ndarray`): Mean divergence of each type, nats per token; NaN where it was not measured.
        before (`np.ndarray`, *optional*): Mean divergence before the distillation, or early in it.
        source (`str`): Which rollouts these are, in words.
        before_source (`str`): Which rollouts `before` is from, in words.
        measure (`str`): Name of the divergence.
    """

    count: np.ndarray
    mean_kl: np.ndarray
    before: np.ndarray | None
    source: str
    before_source: str
    measure: str

    @property
    def mass(self) -> np.ndarray:
        """Divergence that each type carries, R(v) = count x mean, nats, `(V,)`."""
        return self.count * np.nan_to_num(self.mean_kl)

    def is_rock(self, ids: list[int]) -> np.ndarray:
        """Return which types are in a list of rocks, bool, `(V,)`."""
        return _is_among(ids, len(self.count))

    def coverage(self, top_k: int | None) -> Sweep:
        """Return the share of the divergence that the top K types carry, over K, without overlaps between samples.

        Args:
            top_k (`int`, *optional*): Number of rocks, for the result's `top_k`.
        """
        mass = self.mass
        descending = np.sort(mass)[::-1]
        total = max(mass.sum(), TINY)
        covered = np.cumsum(descending) / total

        most = min(CUTOFFS, np.count_nonzero(mass > 0))
        stride = max(1, most // 60)
        cutoffs = list(range(1, most, stride))
        if most > 0:
            cutoffs.append(most)
        shares = [float(covered[cutoff - 1]) for cutoff in cutoffs]
        return Sweep(cutoffs=cutoffs, coverage=shares, stability={}, top_k=top_k)

    def families(self, text_of: Callable[[int], str | None]) -> dict[str, tuple[float, float]]:
        """Return each family's share of the tokens and of the divergence, largest divergence first.

        Args:
            text_of (`Callable[[int], str | None]`): Returns the text of a token id, `None` where it is not known.
        """
        mass = self.mass
        tokens = max(self.count.sum(), 1.0)
        token_share = self.count / tokens
        nats = max(mass.sum(), TINY)
        kl_share = mass / nats

        tokens_of = Counter()
        kl_of = Counter()
        largest = np.argsort(-mass, kind="stable")[:NAMED_TYPES]
        for id in largest[self.count[largest] > 0].tolist():
            family = family_of(text_of(id))
            if family is not None:
                tokens_of[family] += float(token_share[id])
                kl_of[family] += float(kl_share[id])
        return {family: (tokens_of[family], share) for family, share in kl_of.most_common()}


def types_of_last_quarter(windows: list[tuple[int, Path]]) -> TokenTypes:
    """Return the types in the last quarter of a run, with the divergences of its first window as `before`.

    Args:
        windows (`list[tuple[int, Path]]`): Last step and file of each window, in order, at least one.

    Raises:
        `ValueError`: if a file is broken, or has another divergence or vocabulary than the last one.
    """
    stats, start = merge_last_quarter(windows)
    last_step = windows[-1][0]
    first_step, first_path = windows[0]
    before = None
    if start > 0:  # otherwise the last quarter includes the first window
        before = load_matching(first_path, stats, ignore=("student",)).mean_kl.numpy()
    return _types_of(
        stats,
        before=before,
        source=f"the rollouts of steps {start + 1} to {last_step}",
        before_source=f"those of steps 1 to {first_step}",
    )


def types_of_statistics(path: Path) -> TokenTypes:
    """Return the types in all rollouts of a run.

    Args:
        path (`Path`): File of the run's token statistics.

    Raises:
        `ValueError`: if the file is broken.
    """
    return _types_of(TokenStats.load(path), before=None, source="all rollouts of the run", before_source="")


def _types_of(stats: TokenStats, *, before: np.ndarray | None, source: str, before_source: str) -> TokenTypes:
    return TokenTypes(
        count=stats.seen.numpy().astype(np.float64),
        mean_kl=stats.mean_kl.numpy(),
        before=before,
        source=source,
        before_source=before_source,
        measure=str(stats.measure.get("divergence", "divergence")),
    )


def types_of_occurrences(file: Occurrences) -> TokenTypes:
    """Return the types in collected rollouts, with divergences before the distillation if the file has them.

    Raises:
        `ValueError`: if a row of the file has an impossible value.
    """
    divergences = ["kl"]
    if file.has_pre:
        divergences.append("kl_pre")
    sums = dict.fromkeys(["count", *divergences], np.zeros(0))
    size = 0
    for batch in file.batches():
        ids = batch["token_id"]
        size = max(size, int(ids.max()) + 1)
        for name, total in sums.items():
            weights = None if name == "count" else batch[name]
            grown = np.pad(total, (0, size - len(total)))
            sums[name] = grown + np.bincount(ids, weights, size)

    with np.errstate(invalid="ignore"):  # a type that never occurs has no mean: 0 / 0 is NaN
        means = {name: sums[name] / sums["count"] for name in divergences}
    return TokenTypes(
        count=sums["count"],
        mean_kl=means["kl"],
        before=means.get("kl_pre"),
        source="the collected rollouts",
        before_source="the same rollouts under the student before the distillation",
        measure="reverse_kl",
    )


def kind_means(
    windows: list[tuple[int, Path]], rocks: list[int], controls: list[int]
) -> list[tuple[int, float | None, float | None, float | None]]:
    """Return for each window its last step and the mean divergence of rocks, controls and all other types, nats.

    A type is weighted by how often it was emitted, because a frozen type is measured in some steps only. A mean without
    positions is `None`.

    Args:
        windows (`list[tuple[int, Path]]`): Last step and file of each window, in order.
        rocks (`list[int]`): Ids of the rocks.
        controls (`list[int]`): Ids of the controls.

    Raises:
        `ValueError`: if a file is broken.
    """
    points = []
    for step, path in windows:
        stats = TokenStats.load(path)
        seen = (stats.seen * (stats.count > 0)).numpy()
        mass = np.nan_to_num(stats.mean_kl.numpy()) * seen
        is_rock = _is_among(rocks, len(seen))
        is_control = _is_among(controls, len(seen))
        is_other = ~(is_rock | is_control)
        means = []
        for kind in (is_rock, is_control, is_other):
            count = seen[kind].sum()
            mean = float(mass[kind].sum() / count) if count > 0 else None
            means.append(mean)
        points.append((step, *means))
    return points


def _is_among(ids: list[int], size: int) -> np.ndarray:
    """Return which of the ids 0 to size - 1 are in a list; larger ids are ignored."""
    found = np.zeros(size, dtype=bool)
    for id in ids:
        if id < size:
            found[id] = True
    return found
