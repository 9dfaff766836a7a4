"""Controls occur as often as the rocks: a walk over the other types that skips and stops as promised."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_opd import Controls, detect_rocks, mass_matched_controls
from trl_opd.rocks.controls import with_texts

from tests.helpers.type_statistics import counted, ids, measured, stats_of


def walk(order: list[int], seen: list[int], rocks: set[int]) -> tuple[list[int], int]:
    """Return the controls that a walk in this order takes, and their mass; in whole numbers (twentieths)."""
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
def test_controls_are_a_walk_that_skips_and_stops_as_promised(seen, rocks, seed):
    # Whatever the order was: the walk that meets the found types first, and then all others, takes just those.
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
    assert not rocks & set(found.ids)
    assert all(seen[id] for id in found.ids)
    assert found.matched == (0.95 <= found.mass_ratio <= 1.05)


def test_type_that_would_exceed_the_mass_is_skipped_and_the_walk_continues():
    # The rocks' mass is 20: 21 fits alone, 22 never does, and 19 is enough.
    for seed in range(20):
        assert mass_matched_controls(counted(20, 22, 21), [0], seed) == Controls([2], 1.05, True, seed)
        assert mass_matched_controls(counted(20, 22, 19), [0], seed) == Controls([2], 0.95, True, seed)
        assert mass_matched_controls(counted(20, 22, 18), [0], seed) == Controls([2], 0.9, False, seed)
        assert mass_matched_controls(counted(20, 22), [0], seed) == Controls([], 0.0, False, seed)


@pytest.mark.parametrize(("count", "fits", "matched"), [(95, 1, True), (105, 1, True), (94, 1, False), (106, 0, False)])
def test_the_tolerance_is_five_percent(count, fits, matched):
    expected = Controls([1] * fits, count * fits / 100, matched, 0)
    assert mass_matched_controls(counted(100, count), [0], 0) == expected


def test_the_walk_stops_at_the_first_type_that_reaches_the_mass():
    found = [mass_matched_controls(counted(20, 19, 1, 1), [0], seed).ids for seed in range(30)]
    assert all(controls[-1] == 1 for controls in found)
    assert [1] in found


def test_mass_is_of_seen_positions_and_not_of_measured_ones():
    stats = stats_of((20, 1, 1.0), (20, 0, 0.0), (1, 1, 1.0))
    found = [mass_matched_controls(stats, [0], seed) for seed in range(10)]
    assert {(tuple(sorted(c.ids)), c.mass_ratio) for c in found} <= {((1,), 1.0), ((1, 2), 1.05)}


def test_the_same_seed_gives_the_same_controls_whatever_torch_drew_before():
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


def test_rocks_may_be_a_set_a_list_or_a_tensor():
    stats = measured(*((count, 1.0) for count in range(1, 60)))
    rock_set = detect_rocks(stats, top_k=4)
    by_set = mass_matched_controls(stats, rock_set, 1)
    assert by_set == mass_matched_controls(stats, ids(rock_set), 1)
    assert by_set == mass_matched_controls(stats, rock_set.ids, 1)
    assert by_set == mass_matched_controls(stats, tuple(ids(rock_set)), 1)
    assert by_set.matched


@pytest.mark.parametrize("rocks", [[2], [2, 3], [], torch.tensor([2]), torch.tensor([], dtype=torch.int64)])
def test_rocks_that_do_not_occur_have_no_mass_to_match(rocks):
    with pytest.raises(ValueError, match="No rock occurs"):
        mass_matched_controls(counted(5, 5, 0, 0), rocks, 0)


def test_texts_are_those_of_the_tokenizer(tokenizer):
    stats = measured(*((1, 1.0) for _ in range(40)))
    found = detect_rocks(stats, top_k=3)
    assert [rock.text for rock in with_texts(found, tokenizer).rocks] == [tokenizer.decode([id]) for id in range(3)]
    assert with_texts(found, tokenizer).controls is None
    found = dataclasses.replace(found, controls=mass_matched_controls(stats, found, 0))
    controls = with_texts(found, tokenizer).controls
    assert controls.texts == [tokenizer.decode([id]) for id in found.controls.ids]


@pytest.mark.parametrize(
    ("rocks", "sentence"),
    [
        ([-1], "Rock id -1 is outside the 3 vocabulary entries"),
        ([3], "Rock id 3 is outside the 3"),
        ([0, 0], "contain an id twice"),
        ([0.7], "must be ids"),
        (torch.tensor([True, False, False]), "must be ids"),
        (torch.tensor([[0]]), "must be ids"),
    ],
)
def test_invalid_rock_ids_are_an_error(rocks, sentence):
    with pytest.raises(ValueError, match=sentence):
        mass_matched_controls(counted(10, 10, 10), rocks, 0)


@pytest.mark.parametrize("seed", [-1, None, 1.5, True, 2**70])
def test_invalid_seed_is_an_error(seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        mass_matched_controls(counted(10, 10, 10), [0], seed)
