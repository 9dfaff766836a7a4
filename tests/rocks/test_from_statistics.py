"""Rocks of token statistics rank as a sort in plain Python ranks them.

Divergences lie on a grid of quarters, so that scores are exact in float64 and ties are ties.
"""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
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


# Rocks


@given(
    st.lists(st.tuples(types, types), min_size=1, max_size=12),
    st.booleans(),
    st.integers(1, 14),
    st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.5]),
    st.integers(0, 14),
)
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
    assert found.corpus["tokens"] == sum(seen for seen, *_ in now)
    assert found.corpus["kl_sum"] == sum(mean * seen for seen, count, mean in now if count)


def test_rocks_rank_by_mean_divergence_times_count():
    # Alone, neither the mean (0, 3, 2, 1) nor the count (1, 2, 3, 0) gives this order.
    found = detect_rocks(measured((1, 8.0), (100, 0.25), (10, 1.5), (4, 5.0)))
    assert ids(found) == [1, 3, 2, 0]
    assert [rock.score for rock in found.rocks] == [25.0, 20.0, 15.0, 8.0]
    assert found.ids.tolist() == [1, 3, 2, 0]


def test_ties_break_by_id():
    # Equal scores of unequal counts, and more of them than a sort that is not stable keeps in order.
    found = detect_rocks(measured(*(((2, 1.0), (4, 0.5), (1, 2.0)) * 100)), top_k=250)
    assert ids(found) == list(range(250))


def test_a_partly_measured_type_counts_with_all_its_positions():
    found = detect_rocks(stats_of((10, 2, 0.5), (3, 3, 1.0)))
    assert [(r.id, r.count, r.mean_kl, r.score) for r in found.rocks] == [(0, 10, 0.5, 5.0), (1, 3, 1.0, 3.0)]
    assert (found.corpus["tokens"], found.corpus["kl_sum"]) == (13, 8.0)
    assert found.token_share == 1.0


def test_a_type_that_was_never_measured_is_no_rock_but_part_of_the_tokens():
    found = detect_rocks(stats_of((10, 0, 0.0), (3, 3, 1.0)))
    assert ids(found) == [1]
    assert found.corpus == {"rollouts": None, "tokens": 13, "kl_sum": 3.0}


def test_frozen_positions_of_real_signals_are_seen_and_not_measured():
    stats, nan = TokenStats(3, MEASURE), float("nan")
    divergence = torch.tensor([0.5, nan, nan, 1.0])
    stats.update(TokenSignals(torch.tensor([2, 2, 2, 0]), divergence, divergence, torch.tensor([1.0, 0, 0, 1])))
    rock = detect_rocks(stats).rocks[0]
    assert (rock.id, rock.count, rock.mean_kl, rock.score) == (2, 3, 0.5, 1.5)


def test_a_divergence_of_zero_is_no_rock():
    assert ids(detect_rocks(measured((5, 0.0), (1, 0.25), (7, 0.0)))) == [1]
    assert detect_rocks(measured((5, 0.0))).rocks == []


@pytest.mark.parametrize(("top_k", "expected"), [(1, [2]), (2, [2, 1]), (3, [2, 1, 0]), (4, [2, 1, 0]), (10**9,) * 2])
def test_top_k_is_a_largest_number(top_k, expected):
    expected = [2, 1, 0] if top_k == 10**9 else expected
    assert ids(detect_rocks(measured((1, 1.0), (1, 2.0), (1, 3.0), (0, 0.0)), top_k=top_k)) == expected


def test_a_hundred_rocks_are_the_default():
    assert ids(detect_rocks(measured(*((1, 1.0) for _ in range(150))))) == list(range(100))


def test_statistics_of_nothing_have_no_rocks(tmp_path):
    found = detect_rocks(TokenStats(4, MEASURE))
    assert found.rocks == []
    assert found.corpus == {"rollouts": None, "tokens": 0, "kl_sum": 0.0}
    found.save(tmp_path / "rock_set.json")
    assert RockSet.load(tmp_path) == found


def test_the_most_frequent_types_are_left_out_and_ties_among_them_break_by_id():
    stats = measured((9, 1.0), (7, 1.0), (9, 1.0), (9, 1.0), (1, 1.0))
    assert ids(detect_rocks(stats, exclude_most_frequent=2)) == [3, 1, 4]
    assert ids(detect_rocks(stats, exclude_most_frequent=9)) == []
    assert detect_rocks(stats, exclude_most_frequent=2).corpus["tokens"] == 35


# Persistence


def test_a_type_whose_mean_fell_below_a_share_of_the_earlier_one_is_no_rock():
    before = measured((1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0))
    stats = measured((1, 0.5), (1, 0.25), (1, 2.0), (1, 0.75))
    assert ids(detect_rocks(stats, before, min_persistence=0.5)) == [2, 3, 0]
    assert ids(detect_rocks(stats, before)) == [2]
    assert ids(detect_rocks(stats, before, min_persistence=0.0)) == [2, 3, 0, 1]
    assert ids(detect_rocks(stats)) == [2, 3, 0, 1]


def test_persistence_is_of_the_mean_and_not_of_the_sum():
    before = measured((100, 1.0), (1, 1.0))
    stats = measured((1, 1.0), (100, 0.5))
    assert ids(detect_rocks(stats, before)) == [0]


def test_a_type_that_was_not_measured_before_is_not_judged():
    before = stats_of((0, 0, 0.0), (4, 0, 0.0), (4, 4, 9.0), (4, 4, 0.0))
    found = detect_rocks(measured((1, 0.25), (1, 0.5), (1, 1.0), (1, 0.125)), before)
    assert [(rock.id, rock.mean_kl_pre) for rock in found.rocks] == [(1, None), (0, None), (3, 0.0)]


def test_the_mean_before_stands_in_the_set():
    found = detect_rocks(measured((2, 1.0), (1, 1.0)), measured((4, 1.25), (8, 0.5)))
    assert [(rock.id, rock.mean_kl, rock.mean_kl_pre) for rock in found.rocks] == [(0, 1.0, 1.25), (1, 1.0, 0.5)]
    assert [rock.mean_kl_pre for rock in detect_rocks(measured((1, 1.0))).rocks] == [None]


def test_a_type_that_does_not_persist_makes_room_for_the_next():
    stats, before = measured((9, 1.0), (5, 1.0), (3, 1.0)), measured((9, 4.0), (5, 1.0), (3, 1.0))
    assert ids(detect_rocks(stats, before, top_k=2)) == [1, 2]


def test_the_statistics_are_left_as_they_were():
    stats, before = stats_of((4, 2, 1.0), (0, 0, 0.0)), stats_of((4, 4, 2.0), (1, 1, 1.0))
    copies = stats.copy(), before.copy()
    detect_rocks(stats, before)
    for one, two in zip((stats, before), copies, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("seen", "count", "kl_sum"))
        assert one.measure == two.measure


# The set that comes out


def test_the_set_saves_and_loads_as_itself(tmp_path):
    tokens = {"name": "a/student", "vocab_size": 3, "fingerprint": "sha256:" + 64 * "0"}
    measure = MEASURE | {"tokenizer": tokens}
    stats = measured((5, 0.3), (7, 0.1), (2, 0.7), measure=measure)
    found = detect_rocks(stats, measured((1, 0.1), (1, 0.1), (0, 0.0), measure=measure), top_k=2)
    found = dataclasses.replace(found, controls=mass_matched_controls(stats, found, 3))
    found.save(tmp_path / "rock_set.json")
    assert RockSet.load(tmp_path) == found
    assert (found.tokenizer, found.measure) == (tokens, MEASURE)


def test_the_set_says_how_it_was_made():
    found = detect_rocks(measured((1, 1.0)), measured((1, 1.0)), top_k=7, min_persistence=0.5)
    assert found.measure == MEASURE
    assert found.tokenizer == {"name": None, "vocab_size": None, "fingerprint": None}
    expected = {"score": "aggregate", "top_k": 7, "min_persistence": 0.5, "exclude_most_frequent": 0}
    assert found.method == expected | dict.fromkeys(("tau_pre", "tau_post", "window", "gamma", "eta"))
    assert (found.controls, found.heldout) == (None, None)
    assert found.rocks[0].text is None
    assert detect_rocks(measured((1, 1.0)), exclude_most_frequent=1).method["exclude_most_frequent"] == 1


# What is refused


@pytest.mark.parametrize("name", ["divergence", "temperature", "teacher", "dropout"])
def test_statistics_of_unequal_measures_are_refused(name):
    stats, before = measured((1, 1.0)), measured((1, 1.0), measure=MEASURE | {name: "another"})
    with pytest.raises(ValueError, match=f"{name} is .*another"):
        detect_rocks(stats, before)


def test_the_student_may_have_another_name_before():
    assert ids(detect_rocks(measured((1, 1.0)), measured((1, 1.0), measure=MEASURE | {"student": "first"}))) == [0]


def test_statistics_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="2 vocabulary entries, the statistics 1"):
        detect_rocks(measured((1, 1.0)), measured((1, 1.0), (1, 1.0)))


@pytest.mark.parametrize("name", ["divergence", "temperature"])
def test_statistics_that_do_not_say_what_they_measured_are_refused(name):
    measure = {key: value for key, value in MEASURE.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        detect_rocks(measured((1, 1.0), measure=measure))


@pytest.mark.parametrize(
    "argument",
    [
        {"top_k": 0},
        {"top_k": -1},
        {"min_persistence": -0.1},
        {"min_persistence": float("nan")},
        {"min_persistence": float("inf")},
        {"exclude_most_frequent": -1},
    ],
)
def test_an_argument_out_of_its_range_is_refused(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        detect_rocks(measured((1, 1.0)), **argument)


# The authors' list (arXiv:2605.09253), from which the numbers of PAPER section 2 come


@pytest.fixture
def published(shared_data) -> list[dict]:
    path = shared_data / "rock_tokens_qwen3" / "rock_vs_control.csv"
    if not path.is_file():
        pytest.skip("the authors' rocks (rock_vs_control.csv) are not beside this checkout")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "rock": row["group"] == "rock",
            "id": int(row["token_id"]),
            "seen": int(row["freq"]),
            "mean": float(row["mean_kl"]),
        }
        for row in rows
    ]


def published_stats(rows: list[dict]) -> TokenStats:
    stats = TokenStats(151_936, MEASURE)
    for row in rows:
        stats.seen[row["id"]] = stats.count[row["id"]] = row["seen"]
        stats.kl_sum[row["id"]] = row["mean"] * row["seen"]
    return stats


def test_the_authors_rocks_come_out_of_their_types_in_their_order(published):
    found = detect_rocks(published_stats(published))
    listed = [row for row in published if row["rock"]]
    expected = sorted(listed, key=lambda row: (-row["mean"] * row["seen"], row["id"]))
    assert len(found.rocks) == 100
    assert ids(found) == [row["id"] for row in expected]
    assert [rock.count for rock in found.rocks] == [row["seen"] for row in expected]
    assert [rock.mean_kl for rock in found.rocks] == pytest.approx([row["mean"] for row in expected], rel=1e-12)
    assert sum(rock.count for rock in found.rocks) == 85_120


def test_the_authors_controls_have_a_fifth_of_the_mass_and_are_no_match(published):
    stats = published_stats(published)
    controls = mass_matched_controls(stats, detect_rocks(stats), 0)
    assert sorted(controls.ids) == sorted(row["id"] for row in published if not row["rock"])
    assert controls.mass_ratio == pytest.approx(0.198, abs=5e-4)
    assert not controls.matched


# Wrong input


@pytest.mark.parametrize("argument", [{"top_k": 1.5}, {"top_k": True}, {"exclude_most_frequent": 0.5}])
def test_a_count_that_is_not_whole_is_refused(argument):
    with pytest.raises(ValueError, match="must be a whole number"):
        detect_rocks(counted(10, 10, 10), **argument)


def test_a_count_may_be_a_number_of_numpy(tmp_path):
    detect_rocks(counted(3, 2, 1), top_k=np.int64(2), exclude_most_frequent=np.int64(1)).save(tmp_path / "rocks.json")
    assert ids(RockSet.load(tmp_path / "rocks.json")) == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(value):
    stats = counted(3, 2, 1)
    stats.kl_sum[1] = value
    with pytest.raises(ValueError, match="sums that are not finite"):
        detect_rocks(stats)


def test_padded_rows_of_the_vocabulary_are_neither_rocks_nor_controls(tmp_path):
    measure = MEASURE | {"tokenizer": {"name": "a", "vocab_size": 3, "fingerprint": None}}
    stats = measured((10, 1.0), (10, 2.0), (10, 0.5), (10, 9.0), measure=measure)  # type 3 has a row and no token
    rocks = detect_rocks(stats, top_k=1)
    assert ids(rocks) == [1]
    for seed in range(8):
        controls = mass_matched_controls(stats, rocks, seed)
        assert controls.matched
        assert controls.ids != [3]
    dataclasses.replace(detect_rocks(stats), controls=None).save(tmp_path / "rocks.json")


@pytest.mark.parametrize(("size", "expected"), [(10**30, [3, 1, 0, 2]), (4, [3, 1, 0, 2]), (-(10**30), []), (0, [])])
def test_a_tokenizer_of_any_size_is_counted(size, expected):
    measure = MEASURE | {"tokenizer": {"name": "a", "vocab_size": size, "fingerprint": None}}
    stats = measured((10, 1.0), (10, 2.0), (10, 0.5), (10, 9.0), measure=measure)
    assert ids(detect_rocks(stats)) == expected
