"""Controls occur as often as the rocks: a walk over the other types skips and stops as documented."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_opd import Controls, detect_rocks, mass_matched_controls
from trl_opd.rocks.controls import with_texts

from tests.helpers.type_statistics import counted, ids, stats_of


def walk(order: list[int], seen: list[int], rocks: set[int]) -> tuple[list[int], int]:
    """Return the controls that a walk in this order takes, and their mass; it calculates in whole numbers."""
    wanted, taken, mass = sum(seen[id] for id in rocks), [], 0
    for id in order:
        if id in rocks or not seen[id] or 20 * (mass + seen[id]) > 21 * wanted:
            continue
        taken.append(id)
        mass += seen[id]
        if 20 * mass >= 19 * wanted:
            break
    return taken, mass


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 19, 20, 21, 40, 100]), min_size=2, max_size=30),
    st.sets(st.integers(0, 29), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_controls_are_those_of_a_walk_that_skips_and_stops_as_documented(seen, rocks, seed):
    # In any order: a walk that meets the found types first, and then all others, takes exactly the found types.
    rocks = {id % len(seen) for id in rocks}
    wanted = sum(seen[id] for id in rocks)
    if not wanted:
        with pytest.raises(ValueError, match="No rock occurs"):
            mass_matched_controls(counted(*seen), sorted(rocks), seed)
        return
    found = mass_matched_controls(counted(*seen), sorted(rocks), seed)
    taken, mass = walk([*found.ids, *(id for id in range(len(seen)) if id not in found.ids)], seen, rocks)
    assert found == Controls(taken, mass / wanted, 20 * mass >= 19 * wanted, seed)
    assert len(set(found.ids)) == len(found.ids)
    assert found.matched == (0.95 <= found.mass_ratio <= 1.05)


@pytest.mark.parametrize(
    ("seen", "expected", "ratio"),
    [
        ((20, 22, 21), [2], 1.05),
        ((20, 22, 19), [2], 0.95),
        ((20, 22, 18), [2], 0.9),
        ((20, 22), [], 0.0),
        ((100, 95), [1], 0.95),
        ((100, 105), [1], 1.05),
        ((100, 94), [1], 0.94),
        ((100, 106), [], 0.0),
    ],
)
def test_type_that_would_exceed_the_mass_is_skipped_and_the_tolerance_is_five_percent(seen, expected, ratio):
    for seed in range(20):
        controls = mass_matched_controls(counted(*seen), [0], seed)
        assert controls == Controls(expected, ratio, 0.95 <= ratio <= 1.05, seed)


def test_mass_counts_seen_positions_and_not_measured_ones():
    stats = stats_of((20, 1, 1.0), (20, 0, 0.0), (1, 1, 1.0))
    found = [mass_matched_controls(stats, [0], seed) for seed in range(10)]
    assert {(tuple(sorted(c.ids)), c.mass_ratio) for c in found} <= {((1,), 1.0), ((1, 2), 1.05)}


def test_seed_alone_decides_the_controls():
    stats = counted(*range(1, 200))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = mass_matched_controls(stats, [198, 197], 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert mass_matched_controls(stats, [198, 197], 5) == first
    assert first.seed == 5


def test_other_seeds_reach_every_type():
    stats = counted(*(30 * [1]), 10)
    found = [mass_matched_controls(stats, [30], seed) for seed in range(40)]
    assert all(controls.matched and len(controls.ids) == 10 for controls in found)
    assert len({tuple(sorted(controls.ids)) for controls in found}) == 40
    assert {id for controls in found for id in controls.ids} == set(range(30))


def test_rocks_may_be_a_set_a_list_a_tuple_or_a_tensor():
    stats = counted(*range(1, 60))
    rock_set = detect_rocks(stats, top_k=4)
    by_set = mass_matched_controls(stats, rock_set, 1)
    assert by_set.matched
    for rocks in (ids(rock_set), tuple(ids(rock_set)), rock_set.ids):
        assert mass_matched_controls(stats, rocks, 1) == by_set


def test_texts_are_decoded_by_the_tokenizer(tokenizer):
    stats = counted(*(40 * [1]))
    found = detect_rocks(stats, top_k=3)
    assert [rock.text for rock in with_texts(found, tokenizer).rocks] == [tokenizer.decode([id]) for id in range(3)]
    assert with_texts(found, tokenizer).controls is None
    found = dataclasses.replace(found, controls=mass_matched_controls(stats, found, 0))
    controls = with_texts(found, tokenizer).controls
    assert controls.texts == [tokenizer.decode([id]) for id in found.controls.ids]


@pytest.mark.parametrize(
    ("rocks", "message"),
    [
        ([-1], "Rock id -1 is outside the 4 vocabulary entries"),
        ([4], "Rock id 4 is outside the 4"),
        ([0, 0], "contain an id twice"),
        ([0.7], "must be ids"),
        (torch.tensor([True, False, False]), "must be ids"),
        (torch.tensor([[0]]), "must be ids"),
        ([2], "No rock occurs"),
        ([2, 3], "No rock occurs"),
        ([], "No rock occurs"),
        (torch.tensor([2]), "No rock occurs"),
        (torch.tensor([], dtype=torch.int64), "No rock occurs"),
    ],
)
def test_rocks_that_are_not_ids_or_do_not_occur_are_an_error(rocks, message):
    with pytest.raises(ValueError, match=message):
        mass_matched_controls(counted(10, 10, 0, 0), rocks, 0)


@pytest.mark.parametrize("seed", [-1, None, 1.5, True, 2**70])
def test_invalid_seed_is_an_error(seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        mass_matched_controls(counted(10, 10, 10), [0], seed)
