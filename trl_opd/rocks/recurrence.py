"""Which occurrences of a token stay hard in the same surroundings: O_PH, rho and CCR (arXiv:2605.09253, stage B).

An occurrence is persistently high when its divergence reaches a threshold under the student and under the reference
student. Its surroundings are the tokens at the offsets -w..-1 and 1..w, as a vector with an entry `1 / |offset|` for
each pair (offset, token), normalised. Two occurrences of one type are similar when the product of these vectors reaches
gamma; rho is the share of the type's other persistently high occurrences that are, and one whose rho reaches eta is a
rock occurrence. CCR is their number over all occurrences of the type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .corpus import NO_TOKEN, Corpus, window_offsets

# Entries of a block of comparisons: its three temporaries stay in the processor's cache.
BLOCK = 2**18
# Products of float32 that are equal on paper differ by this at most.
ROUNDING = 1e-6


@dataclass(frozen=True)
class ContextSettings:
    """Parameters of the filter; docs/detection.md has the measurements behind the defaults.

    Args:
        tau_pre, tau_post (`float` or `str`):
            Least divergence under the reference student and under the student: nats, or "q0.8" for the quantile 0.8 of
            all occurrences.
        window (`int`): Tokens on each side.
        gamma (`float`): Least similarity, in (0, 1].
        eta (`float`): Least share of similar occurrences, in [0, 1].
        max_occurrences (`int`): Persistent occurrences of a type that are compared; of more, a seeded sample.
        seed (`int`): Seed of the sample, and of everything else that a detection draws.
    """

    tau_pre: float | str = "q0.7"
    tau_post: float | str = "q0.8"
    window: int = 2
    gamma: float = 0.5
    eta: float = 0.05
    max_occurrences: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class TypeStatistics:
    """Statistics of every token type, shape `(V,)` each, and the thresholds in nats behind them.

    Args:
        count (`np.ndarray`): Occurrences, int64.
        kl_sum (`np.ndarray`): R(v), nats, float64.
        kl_pre_sum (`np.ndarray`, *optional*): The same under the reference student.
        persistent (`np.ndarray`): Occurrences in O_PH, int64.
        rock_occurrences (`np.ndarray`): |R_v|, float64: estimated where a type was sampled.
        sampled (`np.ndarray`): Ids of the types that were sampled.
        tau_pre, tau_post (`float`, *optional*):
            The thresholds; `tau_pre` is `None` without a reference student, both where no surroundings were compared.
    """

    count: np.ndarray
    kl_sum: np.ndarray
    kl_pre_sum: np.ndarray | None
    persistent: np.ndarray
    rock_occurrences: np.ndarray
    sampled: np.ndarray
    tau_pre: float | None
    tau_post: float | None

    @cached_property
    def ccr(self) -> np.ndarray:
        """Share of a type's occurrences that are rock occurrences, `(V,)`."""
        return np.minimum(self.rock_occurrences / np.maximum(self.count, 1), 1.0)

    @cached_property
    def context_score(self) -> np.ndarray:
        """R_ctx(v) = R(v) x CCR(v), nats, `(V,)`."""
        return self.kl_sum * self.ccr


def measure_types(
    corpus: Corpus, settings: ContextSettings, vocab_size: int, *, context: bool = True
) -> TypeStatistics:
    """Return the statistics of all types in a corpus.

    Args:
        corpus (`Corpus`): The occurrences.
        settings (`ContextSettings`): Parameters of the filter.
        vocab_size (`int`): V; above every id.
        context (`bool`, *optional*, defaults to `True`): Whether surroundings are compared; else what they give is 0.
    """
    count = _sums(corpus.token_id, vocab_size).astype(np.int64)
    kl_sum = _sums(corpus.token_id, vocab_size, corpus.kl)
    kl_pre_sum = None if corpus.kl_pre is None else _sums(corpus.token_id, vocab_size, corpus.kl_pre)
    if not context:
        return TypeStatistics(
            count=count,
            kl_sum=kl_sum,
            kl_pre_sum=kl_pre_sum,
            persistent=np.zeros(vocab_size, dtype=np.int64),
            rock_occurrences=np.zeros(vocab_size),
            sampled=np.empty(0, dtype=np.int64),
            tau_pre=None,
            tau_post=None,
        )

    tau_post = threshold(settings.tau_post, corpus.kl)
    tau_pre = None if corpus.kl_pre is None else threshold(settings.tau_pre, corpus.kl_pre)
    is_high = corpus.kl >= tau_post
    if tau_pre is not None:
        is_high &= corpus.kl_pre >= tau_pre
    rows = np.flatnonzero(is_high)
    persistent = np.bincount(corpus.token_id[rows], minlength=vocab_size)
    counted, sampled = rock_occurrences(corpus, rows, persistent, settings)
    return TypeStatistics(
        count=count,
        kl_sum=kl_sum,
        kl_pre_sum=kl_pre_sum,
        persistent=persistent,
        rock_occurrences=counted,
        sampled=sampled,
        tau_pre=tau_pre,
        tau_post=tau_post,
    )


def _sums(ids: np.ndarray, vocab_size: int, values: np.ndarray | None = None) -> np.ndarray:
    """Return the sum of the values of every id (or how often it stands there), float64, `(V,)`."""
    total, step = np.zeros(vocab_size), max(2**16, vocab_size)
    for first in range(0, len(ids), step):  # in parts, because NumPy makes wider copies of what it counts
        part = slice(first, first + step)
        total += np.bincount(ids[part], None if values is None else values[part], vocab_size)
    return total


def threshold(value: float | str, divergences: np.ndarray) -> float:
    """Return a threshold in nats; "q0.8" is the quantile 0.8 of the divergences."""
    if isinstance(value, str) and value.startswith("q"):
        return float(np.quantile(divergences, float(value[1:])))
    return float(value)


def rock_occurrences(
    corpus: Corpus, rows: np.ndarray, persistent: np.ndarray, settings: ContextSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Return |R_v| of every type, `(V,)`, and the ids of the types of which a sample was compared.

    Args:
        corpus (`Corpus`): The occurrences.
        rows (`np.ndarray`): Rows in O_PH.
        persistent (`np.ndarray`): |O_PH(v)|, `(V,)`.
        settings (`ContextSettings`): Parameters of the filter.
    """
    rows = rows[np.argsort(corpus.token_id[rows], kind="stable")]
    ends = np.cumsum(persistent)
    several = np.flatnonzero(persistent > 1)
    sampled = several[persistent[several] > settings.max_occurrences]
    found = np.zeros(len(persistent))
    # Like sizes together: so little of a block is padding.
    several = several[np.argsort(persistent[several], kind="stable")]
    sizes = np.minimum(persistent[several], settings.max_occurrences)
    start = 0
    while start < len(several):
        # As many types as a block holds when padded to the largest of them.
        stop = start + 1
        while stop < len(several) and (stop + 1 - start) * int(sizes[stop]) ** 2 <= BLOCK:
            stop += 1
        types = several[start:stop]
        members = [_members(rows[ends[type] - persistent[type] : ends[type]], type, settings) for type in types]
        kept = _kept(corpus, members, settings)
        found[types] = kept * persistent[types] / sizes[start:stop]
        start = stop
    return found, sampled


def _members(rows: np.ndarray, type: int, settings: ContextSettings) -> np.ndarray:
    """Return the rows of a type that are compared: all, or a seeded sample that does not depend on other types."""
    if len(rows) <= settings.max_occurrences:
        return rows
    rng = np.random.default_rng([settings.seed, int(type)])
    return rows[rng.choice(len(rows), settings.max_occurrences, replace=False)]


def _kept(corpus: Corpus, members: list[np.ndarray], settings: ContextSettings) -> np.ndarray:
    """Return how many of the rows of each type have a rho of at least eta, `(T,)`."""
    sizes = np.array([len(rows) for rows in members])
    longest, slots = sizes.max(), 2 * settings.window
    windows = np.full((len(members), slots, longest), NO_TOKEN, dtype=np.int32)
    for place, rows in enumerate(members):
        windows[place, :, : len(rows)] = corpus.windows(rows, settings.window).T
    squares = np.array([1.0 / offset**2 for offset in window_offsets(settings.window)], dtype=np.float32)
    norms = np.sqrt(np.einsum("tsn,s->tn", windows != NO_TOKEN, squares))
    # An empty window, and padding, is similar to nothing.
    norms = np.where(norms == 0, np.inf, norms).astype(np.float32)
    similar = _similar(windows, norms, squares, settings.gamma - ROUNDING)
    similar -= np.isfinite(norms)  # to itself
    inside = np.arange(longest) < sizes[:, None]
    # rho = similar / (n - 1) >= eta; without the division no rounding decides.
    return (inside & (similar >= settings.eta * (sizes - 1)[:, None] - ROUNDING)).sum(axis=1)


def _similar(windows: np.ndarray, norms: np.ndarray, squares: np.ndarray, least: float) -> np.ndarray:
    """Return how many windows of its type each window is similar to, itself included, `(T, n)`.

    Args:
        windows (`np.ndarray`): Tokens `(T, slots, n)`.
        norms (`np.ndarray`): `(T, n)`.
        squares (`np.ndarray`): What an equal token adds to the product, for each slot.
        least (`float`): Least similarity.
    """
    types, slots, count = windows.shape
    others = np.where(windows == NO_TOKEN, NO_TOKEN - 1, windows)  # what is missing equals nothing
    step = max(1, BLOCK // (types * count))
    equal = np.empty((types, step, count), dtype=bool)
    part, product = np.empty((2, types, step, count), dtype=np.float32)
    found = np.empty((types, count), dtype=np.int64)
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        size = rows.stop - rows.start
        block, term, same = product[:, :size], part[:, :size], equal[:, :size]
        block[:] = 0
        for slot in range(slots):
            np.equal(windows[:, slot, rows, None], others[:, slot, None, :], out=same)
            np.multiply(same, squares[slot], out=term)
            block += term
        np.multiply(norms[:, rows, None], np.float32(least) * norms[:, None, :], out=term)
        np.greater_equal(block, term, out=same)
        found[:, rows] = same.sum(axis=2)
    return found
