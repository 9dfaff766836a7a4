"""Token statistics of given positions, and their slow twin, which adds up a dict per token in Python."""

import math

import pytest
import torch
from hypothesis import strategies as st

from trl_opd import TokenSignals, TokenStats

V = 5
MEASURE = {
    "divergence": "reverse_kl",
    "beta": 1.0,
    "temperature": 0.7,
    "dropout": 0.0,
    "student": "a/student",
    "teacher": "ä/teacher",
    "tokenizer": {"name": "a/student", "vocab_size": V, "fingerprint": None},
}
COUNTS, SUMS = ["seen", "count"], ["kl_sum", "kl_sq_sum", "entropy_sum"]
NAMES = COUNTS + SUMS
NAN = float("nan")
divergences = st.floats(0, 1e4, width=32) | st.just(NAN)
positions = st.lists(st.tuples(st.integers(0, V - 1), divergences, st.floats(0, 20, width=32)), max_size=40)
ROWS = [(3, 0.5, 2.0), (1, NAN, 1.0), (3, 1.5, 0.25), (0, 0.0, 0.0), (1, NAN, 3.0), (4, 2.0, 1.0), (4, NAN, 1.0)]


def signals(rows: list[tuple[int, float, float]]) -> TokenSignals:
    """Return rows of (id, divergence, entropy) as signals; an entropy is NaN where the divergence is."""
    ids, divergence, entropy = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    entropy = [NAN if math.isnan(kl) else value for kl, value in zip(divergence, entropy, strict=True)]
    weights = [0.0 if place % 2 else 1.0 for place in range(len(rows))]
    return TokenSignals(
        torch.tensor(ids, dtype=torch.int64), *(torch.tensor(column) for column in (divergence, entropy, weights))
    )


def stats_of(rows: list[tuple[int, float, float]], measure: dict = MEASURE) -> TokenStats:
    stats = TokenStats(V, measure)
    stats.update(signals(rows))
    return stats


def slow_sums(rows: list[tuple[int, float, float]]) -> dict[str, list]:
    """Return the five sums per type of rows of (id, divergence, entropy)."""
    types = [{"seen": 0, "count": 0, "kl_sum": [], "kl_sq_sum": [], "entropy_sum": []} for _ in range(V)]
    for id, divergence, entropy in rows:
        types[id]["seen"] += 1
        if not math.isnan(divergence):
            types[id]["count"] += 1
            types[id]["kl_sum"].append(divergence)
            types[id]["kl_sq_sum"].append(divergence**2)
            types[id]["entropy_sum"].append(entropy)
    result = {name: [kind[name] for kind in types] for name in COUNTS}
    return result | {name: [math.fsum(kind[name]) for kind in types] for name in SUMS}


def assert_sums(stats: TokenStats, expected: dict[str, list]) -> None:
    for name in COUNTS:
        assert getattr(stats, name).tolist() == expected[name]
    for name in SUMS:
        assert getattr(stats, name).tolist() == pytest.approx(expected[name], rel=1e-9, abs=0)


def equal(one: TokenStats, two: TokenStats) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in NAMES) and one.measure == two.measure
