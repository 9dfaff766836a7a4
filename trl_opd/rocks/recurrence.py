"""Context filter: it finds the occurrences of a token that diverge strongly in surroundings that recur.

This is stage B of arXiv:2605.09253, with its O_PH, rho and CCR. An occurrence is persistently high (in O_PH) if its
divergence reaches a threshold under the student and another one under the reference student. Its surroundings are the
tokens at the offsets -w..-1 and 1..w, as a normalised vector with an entry `1 / |offset|` for each pair (offset,
token). Two occurrences of one type are similar if the dot product of their vectors is at least gamma. rho is the share
of the type's other persistently high occurrences that are similar. An occurrence whose rho is at least eta is a rock
occurrence. CCR is the number of rock occurrences divided by the number of all occurrences of the type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .corpus import NO_TOKEN, Corpus, window_offsets

# Number of pairs of occurrences that are compared at once, so that three temporary arrays fit in the processor's cache.
BLOCK = 2**18
# Float32 products that are equal in exact arithmetic differ by at most this much.
ROUNDING = 1e-6


@dataclass(frozen=True)
class ContextSettings:
    """Parameters of the context filter; docs/detection.md shows how the defaults were chosen.

    Args:
        tau_pre, tau_post (`float` or `str`):
            Smallest divergence of a persistently high occurrence under the reference student and under the student: in
            nats, or "q0.8" for the quantile 0.8 of all occurrences.
        window (`int`): Number of tokens on each side, w.
        gamma (`float`): Smallest similarity, in (0, 1].
        eta (`float`): Smallest share of similar occurrences, in [0, 1].
        max_occurrences (`int`):
            Largest number of persistently high occurrences of a type that are compared; if there are more, a seeded
            sample of this size is compared.
        seed (`int`): Seed of the sample, and of every other random draw of a detection.
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
    """Statistics of every token type, shape `(V,)` each, and the thresholds that they depend on.

    Args:
        count (`np.ndarray`): Number of occurrences, int64.
        kl_sum (`np.ndarray`): R(v), the sum of the divergences, nats, float64.
        kl_pre_sum (`np.ndarray`, *optional*): The same sum under the reference student.
        persistent (`np.ndarray`): |O_PH(v)|, the number of persistently high occurrences, int64.
        rock_occurrences (`np.ndarray`): |R_v|, the number of rock occurrences, float64; an estimate for sampled types.
        sampled (`np.ndarray`): Ids of the types of which only a sample was compared.
        tau_pre, tau_post (`float`, *optional*):
            The thresholds in nats. `tau_pre` is `None` without a reference student, and both are `None` if no
            surroundings were compared.
    """

    count: np.ndarray
    kl_sum: np.ndarray
    kl_pre_sum: np.ndarray | None
    persistent: np.ndarray
    rock_occurrences: np.ndarray
    sampled: np.ndarray
    tau_pre: float | None
    tau_post: float | None

    @property
    def types(self) -> int:
        """Number of types that occur."""
        return int(np.count_nonzero(self.count))

    @cached_property
    def ccr(self) -> np.ndarray:
        """Share of a type's occurrences that are rock occurrences, `(V,)`."""
        return self.rock_occurrences / np.maximum(self.count, 1)

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
        context (`bool`, *optional*, defaults to `True`):
            Whether surroundings are compared. Otherwise `persistent` and `rock_occurrences` are 0.
    """
    ids = corpus.token_id
    count = _sums(ids, vocab_size)
    statistics = TypeStatistics(
        count=count.astype(np.int64),
        kl_sum=_sums(ids, vocab_size, corpus.kl),
        kl_pre_sum=None if corpus.kl_pre is None else _sums(ids, vocab_size, corpus.kl_pre),
        persistent=np.zeros(vocab_size, dtype=np.int64),
        rock_occurrences=np.zeros(vocab_size),
        sampled=np.empty(0, dtype=np.int64),
        tau_pre=None,
        tau_post=None,
    )
    if not context:
        return statistics

    tau_post = threshold(settings.tau_post, corpus.kl)
    tau_pre = None
    is_high = corpus.kl >= tau_post
    if corpus.kl_pre is not None:
        tau_pre = threshold(settings.tau_pre, corpus.kl_pre)
        is_high &= corpus.kl_pre >= tau_pre

    rows = np.flatnonzero(is_high)
    persistent = np.bincount(ids[rows], minlength=vocab_size)
    counted, sampled = rock_occurrences(corpus, rows, persistent, settings)
    return replace(
        statistics,
        persistent=persistent,
        rock_occurrences=counted,
        sampled=sampled,
        tau_pre=tau_pre,
        tau_post=tau_post,
    )


def _sums(ids: np.ndarray, vocab_size: int, values: np.ndarray | None = None) -> np.ndarray:
    """Return the sum of the values of every id, or its number of occurrences without values, float64, `(V,)`."""
    total = np.zeros(vocab_size)
    step = max(2**16, vocab_size)
    # Only a part of the rows is summed at a time, because NumPy converts a copy of them to 64 bits.
    for first in range(0, len(ids), step):
        part = slice(first, first + step)
        weights = None if values is None else values[part]
        total += np.bincount(ids[part], weights, vocab_size)
    return total


def threshold(value: float | str, divergences: np.ndarray) -> float:
    """Return a threshold in nats; "q0.8" means the quantile 0.8 of the divergences."""
    text = str(value)
    if text.startswith("q"):
        level = float(text[1:])
        return float(np.quantile(divergences, level))
    return float(value)


def rock_occurrences(
    corpus: Corpus, rows: np.ndarray, persistent: np.ndarray, settings: ContextSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Return |R_v| of every type, `(V,)`, and the ids of the types of which only a sample was compared.

    Args:
        corpus (`Corpus`): The occurrences.
        rows (`np.ndarray`): Rows of the persistently high occurrences, ascending.
        persistent (`np.ndarray`): |O_PH(v)|, `(V,)`.
        settings (`ContextSettings`): Parameters of the filter.
    """
    by_type = np.argsort(corpus.token_id[rows], kind="stable")
    rows = rows[by_type]
    ends = np.cumsum(persistent)
    starts = ends - persistent

    # An occurrence is compared with others, so a type needs at least two. Types of similar size share a block, so that
    # little of it is padding.
    by_size = np.argsort(persistent, kind="stable")
    types = by_size[persistent[by_size] > 1]
    totals = persistent[types]
    sizes = np.minimum(totals, settings.max_occurrences)

    found = np.zeros(len(persistent))
    for block in _blocks(sizes):
        members = []
        for type in types[block]:
            own = rows[starts[type] : ends[type]]
            members.append(_members(own, type, settings))
        kept = _kept(corpus, members, settings)
        # The count in a sample is scaled to all occurrences of the type.
        found[types[block]] = kept * totals[block] / sizes[block]
    sampled = np.flatnonzero(persistent > settings.max_occurrences)
    return found, sampled


def _blocks(sizes: np.ndarray) -> Iterator[slice]:
    """Yield slices of types whose comparisons fit in a block.

    Args:
        sizes (`np.ndarray`): Number of occurrences of each type, ascending. A block is padded to its largest type.
    """
    start = 0
    for stop in range(1, len(sizes)):
        largest = int(sizes[stop])
        types = stop + 1 - start
        if types * largest**2 > BLOCK:
            yield slice(start, stop)
            start = stop
    if len(sizes):
        yield slice(start, len(sizes))


def _members(rows: np.ndarray, type: int, settings: ContextSettings) -> np.ndarray:
    """Return the rows of a type to compare: all of them, or a seeded sample that does not depend on other types."""
    if len(rows) <= settings.max_occurrences:
        return rows
    rng = np.random.default_rng([settings.seed, int(type)])
    places = rng.choice(len(rows), settings.max_occurrences, replace=False)
    return rows[places]


def _kept(corpus: Corpus, members: list[np.ndarray], settings: ContextSettings) -> np.ndarray:
    """Return the number of rock occurrences among the rows of each type: those whose rho is at least eta, `(T,)`."""
    offsets = window_offsets(settings.window)
    squares = (1.0 / offsets**2).astype(np.float32)
    sizes = np.array([len(rows) for rows in members])[:, None]
    longest = sizes.max()
    windows = np.full((len(members), len(offsets), longest), NO_TOKEN, dtype=np.int32)
    for place, rows in enumerate(members):
        around = corpus.windows(rows, settings.window)
        windows[place, :, : len(rows)] = around.T

    squared_norms = np.einsum("tsn,s->tn", windows != NO_TOKEN, squares)
    # An infinite norm makes an empty window, and padding, similar to nothing.
    squared_norms[squared_norms == 0] = np.inf
    norms = np.sqrt(squared_norms)
    similar = _similar(windows, norms, squares, settings.gamma - ROUNDING)
    # Each window that is not empty was found similar to itself.
    similar -= np.isfinite(norms)

    # This is rho = similar / others >= eta without the division, which could round to the wrong side of eta.
    others = sizes - 1
    reaches_eta = similar >= settings.eta * others - ROUNDING
    is_row = np.arange(longest) < sizes
    kept = is_row & reaches_eta
    return kept.sum(axis=1)


def _similar(windows: np.ndarray, norms: np.ndarray, squares: np.ndarray, least: float) -> np.ndarray:
    """Return how many windows of its type each window is similar to, itself included, `(T, n)`.

    Args:
        windows (`np.ndarray`): Tokens `(T, slots, n)`.
        norms (`np.ndarray`): Norm of every window's vector, `(T, n)`.
        squares (`np.ndarray`): Contribution of an equal token in each slot to the dot product, `(slots,)`.
        least (`float`): Smallest similarity.
    """
    types, slots, count = windows.shape
    # A missing token has a different number on each side, so that two missing tokens are not equal.
    others = np.where(windows == NO_TOKEN, NO_TOKEN - 1, windows)
    step = max(1, BLOCK // (types * count))
    shape = (types, step, count)
    equal = np.empty(shape, dtype=bool)
    part = np.empty(shape, dtype=np.float32)
    product = np.empty(shape, dtype=np.float32)
    found = np.empty((types, count), dtype=np.int64)

    for first in range(0, count, step):
        rows = slice(first, first + step)
        norm = norms[:, rows, None]
        size = norm.shape[1]
        same = equal[:, :size]
        term = part[:, :size]
        block = product[:, :size]
        block[:] = 0
        for slot in range(slots):
            np.equal(windows[:, slot, rows, None], others[:, slot, None, :], out=same)
            np.multiply(same, squares[slot], out=term)
            block += term

        # This is cosine >= least, with both sides multiplied by the two norms.
        np.multiply(norm, np.float32(least) * norms[:, None, :], out=term)
        np.greater_equal(block, term, out=same)
        found[:, rows] = same.sum(axis=2)
    return found
