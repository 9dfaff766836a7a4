"""Rocks of token statistics: they rank as a sort in plain Python ranks them.

Divergences are multiples of 1/4, so that scores are exact in float64 and equal scores are equal to the bit.
"""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opd import RockSet, TokenSignals, TokenStats, detect_rocks, mass_matched_controls

from tests.helpers.type_statistics import MEASURE, counted, ids, measured, stats_of


def slow_rocks(types, before, top_k, min_persistence, exclude) -> list[tuple]:
    """Return (id, count, mean, score, mean before) of the rocks, from types as (seen, count, mean)."""
    by_count = sorted(range(len(types)), key=lambda id: (-types[id][0], id))
    rocks = []
    for id, (seen, count, mean) in enumerate(types):
        earlier = before[id][2] if before is not None and before[id][1] else None
        fell = earlier is not None and mean < min_persistence * earlier
        if id not in by_count[:exclude] and count and mean > 0 and not fell:
            rocks.append((id, seen, mean, mean * seen, earlier))
    return sorted(rocks, key=lambda rock: (-rock[3], rock[0]))[:top_k]


def one_type(seen: int, hidden: int, quarters: int) -> tuple[int, int, float]:
    return seen, max(seen - hidden, 0), quarters / 4


types = st.builds(one_type, st.integers(0, 6), st.sampled_from([0, 0, 1, 6]), st.integers(0, 6))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(types, types), min_size=1, max_size=12),
    st.booleans(),
    st.integers(1, 14),
    st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.5]),
    st.integers(0, 14),
)
@pytest.mark.slow
def test_rocks_are_those_of_a_sort_in_python(pairs, persist, top_k, min_persistence, exclude):
    now, earlier = zip(*pairs, strict=True)
    found = detect_rocks(
        stats_of(*now),
        stats_of(*earlier) if persist else None,
        top_k=top_k,
        min_persistence=min_persistence,
        exclude_most_frequent=exclude,
    )
    expected = slow_rocks(now, earlier if persist else None, top_k, min_persistence, exclude)
    assert [(r.id, r.count, r.mean_kl, r.score, r.mean_kl_pre) for r in found.rocks] == expected
    assert found.ids.tolist() == ids(found)
    assert found.corpus["tokens"] == sum(seen for seen, *_ in now)
    assert found.corpus["kl_sum"] == sum(mean * seen for seen, count, mean in now if count)


def test_defaults_are_100_rocks_that_keep_0_8_of_their_earlier_mean():
    assert ids(detect_rocks(counted(*(150 * [1])))) == list(range(100))
    now, before = measured((1, 0.75), (1, 2.0), (1, 1.0)), measured((1, 1.0), (1, 1.0), (1, 1.25))
    assert ids(detect_rocks(now, before, top_k=10**9)) == [1, 2]


def test_ties_break_by_id():
    # Equal scores of unequal counts, and more of them than an unstable sort keeps in order.
    found = detect_rocks(measured(*(((2, 1.0), (4, 0.5), (1, 2.0)) * 100)), top_k=250)
    assert ids(found) == list(range(250))


def test_frozen_positions_of_real_signals_are_seen_and_not_measured():
    stats, nan = TokenStats(3, MEASURE), float("nan")
    divergence = torch.tensor([0.5, nan, nan, 1.0])
    stats.update(TokenSignals(torch.tensor([2, 2, 2, 0]), divergence, divergence, torch.tensor([1.0, 0, 0, 1])))
    rock = detect_rocks(stats).rocks[0]
    assert (rock.id, rock.count, rock.mean_kl, rock.score) == (2, 3, 0.5, 1.5)


def test_empty_statistics_have_no_rocks(tmp_path):
    found = detect_rocks(TokenStats(4, MEASURE))
    assert found.rocks == []
    assert found.corpus == {"rollouts": None, "tokens": 0, "kl_sum": 0.0}
    found.save(tmp_path / "rock_set.json")
    assert RockSet.load(tmp_path) == found


def test_statistics_are_not_changed():
    stats, before = stats_of((4, 2, 1.0), (0, 0, 0.0)), stats_of((4, 4, 2.0), (1, 1, 1.0))
    copies = stats.copy(), before.copy()
    detect_rocks(stats, before)
    for one, two in zip((stats, before), copies, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("seen", "count", "kl_sum"))
        assert one.measure == two.measure


# The rock set


def test_set_loads_as_it_was_saved(tmp_path):
    tokens = {"name": "a/student", "vocab_size": 3, "fingerprint": "sha256:" + 64 * "0"}
    measure = MEASURE | {"tokenizer": tokens}
    stats = measured((5, 0.3), (7, 0.1), (2, 0.7), measure=measure)
    found = detect_rocks(stats, measured((1, 0.1), (1, 0.1), (0, 0.0), measure=measure), top_k=2)
    found = dataclasses.replace(found, controls=mass_matched_controls(stats, found, 3))
    found.save(tmp_path / "rock_set.json")
    assert RockSet.load(tmp_path) == found
    assert (found.tokenizer, found.measure) == (tokens, MEASURE)


def test_set_records_how_it_was_made():
    stats = measured((1, 1.0), (2, 1.0))
    found = detect_rocks(stats, stats, top_k=7, min_persistence=0.5, exclude_most_frequent=1)
    assert found.measure == MEASURE
    assert found.tokenizer == {"name": None, "vocab_size": None, "fingerprint": None}
    expected = {"score": "aggregate", "top_k": 7, "min_persistence": 0.5, "exclude_most_frequent": 1}
    assert found.method == expected | dict.fromkeys(("tau_pre", "tau_post", "window", "gamma", "eta"))
    assert (found.controls, found.heldout, found.rocks[0].text) == (None, None, None)


# A vocabulary with more rows than the tokenizer has tokens


@pytest.mark.parametrize(
    ("size", "expected"), [(3, [1, 0, 2]), (10**30, [3, 1, 0, 2]), (4, [3, 1, 0, 2]), (-(10**30), []), (0, [])]
)
def test_padding_rows_are_neither_rocks_nor_controls(size, expected):
    measure = MEASURE | {"tokenizer": {"name": "a", "vocab_size": size, "fingerprint": None}}
    stats = measured((10, 1.0), (10, 2.0), (10, 0.5), (10, 9.0), measure=measure)
    assert ids(detect_rocks(stats)) == expected
    if size == 3:
        for seed in range(8):
            controls = mass_matched_controls(stats, [1], seed)
            assert controls.matched
            assert controls.ids != [3]


# Errors


@pytest.mark.parametrize("name", ["divergence", "temperature", "teacher", "dropout"])
def test_statistics_of_unequal_measures_are_an_error(name):
    with pytest.raises(ValueError, match=f"{name} is .*another"):
        detect_rocks(measured((1, 1.0)), measured((1, 1.0), measure=MEASURE | {name: "another"}))


def test_student_may_have_another_name_before():
    assert ids(detect_rocks(measured((1, 1.0)), measured((1, 1.0), measure=MEASURE | {"student": "first"}))) == [0]


def test_statistics_of_another_vocabulary_are_an_error():
    with pytest.raises(ValueError, match="2 vocabulary entries, the statistics 1"):
        detect_rocks(measured((1, 1.0)), measured((1, 1.0), (1, 1.0)))


@pytest.mark.parametrize("name", ["divergence", "temperature"])
def test_statistics_that_do_not_record_what_they_measured_are_an_error(name):
    measure = {key: value for key, value in MEASURE.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        detect_rocks(measured((1, 1.0), measure=measure))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_an_error(value):
    stats = counted(3, 2, 1)
    stats.kl_sum[1] = value
    with pytest.raises(ValueError, match="sums that are not finite"):
        detect_rocks(stats)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("top_k", 0, "must be at least 1"),
        ("top_k", -1, "must be at least 1"),
        ("top_k", 1.5, "must be a whole number"),
        ("top_k", True, "must be a whole number"),
        ("exclude_most_frequent", -1, "must be at least 0"),
        ("exclude_most_frequent", 0.5, "must be a whole number"),
        ("min_persistence", -0.1, "must be finite and at least 0"),
        ("min_persistence", float("nan"), "must be finite and at least 0"),
        ("min_persistence", float("inf"), "must be finite and at least 0"),
    ],
)
def test_argument_out_of_its_range_is_an_error(name, value, problem):
    with pytest.raises(ValueError, match=f"{name} .*{problem}"):
        detect_rocks(counted(10, 10, 10), **{name: value})


def test_count_may_be_a_numpy_integer(tmp_path):
    detect_rocks(counted(3, 2, 1), top_k=np.int64(2), exclude_most_frequent=np.int64(1)).save(tmp_path / "rocks.json")
    assert ids(RockSet.load(tmp_path / "rocks.json")) == [1, 2]


# The authors' list (arXiv:2605.09253), from which the numbers of PAPER section 2 come


@pytest.fixture
def published(shared_data) -> list[tuple[bool, int, int, float]]:
    """The published types as (is a rock, id, count, mean divergence)."""
    path = shared_data / "rock_tokens_qwen3" / "rock_vs_control.csv"
    if not path.is_file():
        pytest.skip("the authors' rocks (rock_vs_control.csv) are not beside this checkout")
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (row["group"] == "rock", int(row["token_id"]), int(row["freq"]), float(row["mean_kl"]))
            for row in csv.DictReader(file)
        ]


def published_stats(rows: list[tuple[bool, int, int, float]]) -> TokenStats:
    stats = TokenStats(151_936, MEASURE)
    for _, id, seen, mean in rows:
        stats.seen[id] = stats.count[id] = seen
        stats.kl_sum[id] = mean * seen
    return stats


def test_authors_rocks_are_found_among_their_types_in_their_order(published):
    found = detect_rocks(published_stats(published)).rocks
    listed = [(id, seen, mean) for is_rock, id, seen, mean in published if is_rock]
    expected = sorted(listed, key=lambda rock: (-rock[1] * rock[2], rock[0]))
    assert len(found) == 100
    assert [(rock.id, rock.count) for rock in found] == [(id, seen) for id, seen, _ in expected]
    assert [rock.mean_kl for rock in found] == pytest.approx([mean for *_, mean in expected], rel=1e-12)
    assert sum(rock.count for rock in found) == 85_120


def test_authors_controls_have_a_fifth_of_the_mass_and_are_not_matched(published):
    stats = published_stats(published)
    controls = mass_matched_controls(stats, detect_rocks(stats), 0)
    assert sorted(controls.ids) == sorted(id for is_rock, id, *_ in published if not is_rock)
    assert controls.mass_ratio == pytest.approx(0.198, abs=5e-4)
    assert not controls.matched
