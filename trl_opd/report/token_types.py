"""Counts and mean divergences of token types, from the statistics of a run or from collected rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artefacts.occurrences import Occurrences
from ..artefacts.token_stats import TokenStats, load_matching, merge_last_quarter
from ..rocks.cutoff import Sweep
from ..rocks.families import family_of

# Types that are named for families, those of the largest divergence first; the rest has less than a thousandth of it.
NAMED_TYPES = 20_000
CUTOFFS = 300


@dataclass(frozen=True)
class TokenTypes:
    """What is known of every token type, `(V,)` each.

    Args:
        count (`np.ndarray`): How often it was emitted.
        mean_kl (`np.ndarray`): Its mean divergence, nats per token; NaN where it was not measured.
        before (`np.ndarray`, *optional*): The same before the distillation, or early in it.
        source (`str`): Which rollouts these are, in words.
        before_source (`str`): Which rollouts `before` is of, in words.
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
        """Return which types are rocks, bool, `(V,)`."""
        found = np.zeros(len(self.count), dtype=bool)
        found[[id for id in ids if id < len(found)]] = True
        return found

    def coverage(self, top_k: int | None) -> Sweep:
        """Return the share of the divergence that the top K types carry, over K; no draws are compared."""
        mass = self.mass
        covered = np.cumsum(np.sort(mass)[::-1]) / max(mass.sum(), np.finfo(float).tiny)
        most = int(min(CUTOFFS, (mass > 0).sum()))
        cutoffs = sorted({*range(1, most + 1, max(1, most // 60)), most} - {0})
        return Sweep(cutoffs, [float(covered[cutoff - 1]) for cutoff in cutoffs], {}, top_k)

    def families(self, text_of: Callable[[int], str | None]) -> dict[str, tuple[float, float]]:
        """Return for each family its share of the tokens and of the divergence, the largest divergence first."""
        mass = self.mass
        tokens = self.count / max(self.count.sum(), 1.0)
        kl = mass / max(mass.sum(), np.finfo(float).tiny)
        sums: dict[str, list[float]] = {}
        for id in np.argsort(-mass, kind="stable")[:NAMED_TYPES].tolist():
            if self.count[id] > 0 and (family := family_of(text_of(id))) is not None:
                share = sums.setdefault(family, [0.0, 0.0])
                share[0] += float(tokens[id])
                share[1] += float(kl[id])
        return {name: (share[0], share[1]) for name, share in sorted(sums.items(), key=lambda item: -item[1][1])}


def types_of_last_quarter(windows: list[tuple[int, Path]]) -> TokenTypes:
    """Return the types of the last quarter of a run, and before: of its first window.

    Args:
        windows (`list[tuple[int, Path]]`): Last step and file of each window, in order, at least one.
    """
    stats, start = merge_last_quarter(windows)
    first_step, first_path = windows[0]
    before = None
    if start > 0:  # else the first window is in the last quarter
        before = load_matching(first_path, stats, ignore=("student",)).mean_kl.numpy()
    return TokenTypes(
        count=stats.seen.numpy().astype(np.float64),
        mean_kl=stats.mean_kl.numpy(),
        before=before,
        source=f"the rollouts of steps {start + 1} to {windows[-1][0]}",
        before_source=f"those of steps 1 to {first_step}",
        measure=str(stats.measure.get("divergence", "divergence")),
    )


def types_of_statistics(path: Path) -> TokenTypes:
    """Return the types of a whole run."""
    stats = TokenStats.load(path)
    return TokenTypes(
        count=stats.seen.numpy().astype(np.float64),
        mean_kl=stats.mean_kl.numpy(),
        before=None,
        source="all rollouts of the run",
        before_source="",
        measure=str(stats.measure.get("divergence", "divergence")),
    )


def types_of_occurrences(file: Occurrences) -> TokenTypes:
    """Return the types of collected rollouts, before the distillation too where the file has that.

    Raises:
        `ValueError`: for a row that cannot be.
    """
    sums = {"count": np.zeros(0), "kl": np.zeros(0), "kl_pre": np.zeros(0)}
    for batch in file.batches():
        size = max(len(sums["count"]), int(batch["token_id"].max()) + 1)
        sums = {name: np.pad(values, (0, size - len(values))) for name, values in sums.items()}
        sums["count"] += np.bincount(batch["token_id"], minlength=size)
        for name in ("kl", "kl_pre"):
            if name in batch:
                sums[name] += np.bincount(batch["token_id"], batch[name], size)
    with np.errstate(invalid="ignore"):
        mean_kl = sums["kl"] / sums["count"]
        before = sums["kl_pre"] / sums["count"]
    return TokenTypes(
        count=sums["count"],
        mean_kl=mean_kl,
        before=before if file.has_pre else None,
        source="the collected rollouts",
        before_source="the same rollouts under the student before the distillation",
        measure="reverse_kl",
    )


def kind_means(
    windows: list[tuple[int, Path]], rocks: list[int], controls: list[int]
) -> list[tuple[int, float | None, float | None, float | None]]:
    """Return for each window its last step and the mean divergence of rocks, of controls and of the rest, nats.

    Each type counts as often as it was seen: a frozen type is measured in some steps only. `None` without positions.
    """
    points = []
    for step, path in windows:
        stats = TokenStats.load(path)
        known = (stats.count > 0).numpy()
        seen, mean = stats.seen.numpy() * known, np.nan_to_num(stats.mean_kl.numpy())
        kinds = np.zeros((3, len(seen)), dtype=bool)
        for place, ids in enumerate((rocks, controls)):
            kinds[place, [id for id in ids if id < len(seen)]] = True
        kinds[2] = ~kinds[:2].any(0)
        means = [float((mean * seen)[kind].sum() / seen[kind].sum()) if seen[kind].any() else None for kind in kinds]
        points.append((step, *means))
    return points
