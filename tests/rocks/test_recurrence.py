"""The context filter: equal to the definition, pair by pair; samples; planted rocks among decoys."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opd.artefacts.occurrences import write_occurrences
from trl_opd.rocks.corpus import Corpus
from trl_opd.rocks.families import FAMILIES, family_of
from trl_opd.rocks.from_occurrences import detect_from_occurrences
from trl_opd.rocks.recurrence import BLOCK, ContextSettings, measure_types, threshold

from tests.helpers import reference
from tests.helpers.paths import ROOT, SHARED_DATA
from tests.helpers.planted import EACH, make_world, save_world

AUTHORS = SHARED_DATA / "rock_tokens_qwen3" / "rock_vs_control.csv"


def make_corpus(rows: list[dict]) -> Corpus:
    kinds = {"rollout": np.int32, "position": np.int32, "token_id": np.int32, "kl": np.float32, "kl_pre": np.float32}
    names = [name for name in kinds if name in rows[0]]
    return Corpus(**{name: np.array([row[name] for row in rows], dtype=kinds[name]) for name in names})


def row(rollout: int, position: int, token_id: int, kl: float = 1.0) -> dict:
    return {"rollout": rollout, "position": position, "token_id": token_id, "kl": kl}


def triples(neighbours: list[tuple[int, int]]) -> list[dict]:
    """Return a rollout for each pair of neighbours: a left one, type 1 with a divergence of 1 nat, and a right one."""
    return [
        row(rollout, position, id, float(id == 1))
        for rollout, (left, right) in enumerate(neighbours)
        for position, id in enumerate((left, 1, right))
    ]


def measure(rows: list[dict], vocab: int, **changes):
    return measure_types(make_corpus(rows), ContextSettings(**{"tau_post": 0.5, **changes}), vocab)


def compare(rows: list[dict], vocab: int, **changes) -> None:
    """Assert that the statistics of every type are those of the definition."""
    settings = ContextSettings(**{"tau_pre": 0.5, "tau_post": 0.5, **changes})
    found = measure_types(make_corpus(rows), settings, vocab)
    names = {name: getattr(settings, name) for name in ("tau_post", "window", "gamma", "eta")}
    expected = reference.context_figures(rows, tau_pre=settings.tau_pre if "kl_pre" in rows[0] else None, **names)
    assert set(np.flatnonzero(found.count)) == set(expected)
    for type, numbers in expected.items():
        assert found.count[type] == numbers["count"]
        assert found.persistent[type] == numbers["persistent"]
        assert found.ccr[type] == pytest.approx(numbers["ccr"])
        assert found.kl_sum[type] == pytest.approx(numbers["score"], rel=1e-6)
        assert found.context_score[type] == pytest.approx(numbers["context_score"], rel=1e-6)


# The definition


@settings(deadline=None, max_examples=150)
@given(data=st.data())
@pytest.mark.slow
def test_filter_equals_the_definition_pair_by_pair(data):
    draw = data.draw
    vocab, has_pre = draw(st.integers(1, 5)), draw(st.booleans())
    rows = []
    for rollout in range(draw(st.integers(1, 4))):
        position = 0
        for _ in range(draw(st.integers(1, 14))):
            position += draw(st.sampled_from([1, 1, 1, 1, 2]))  # sometimes a position is missing
            rows.append(
                row(rollout, position, draw(st.integers(0, vocab - 1)), draw(st.sampled_from([0, 0.25, 0.5, 1])))
            )
            if has_pre:
                rows[-1]["kl_pre"] = draw(st.sampled_from([0.25, 0.5, 2.0]))
    gamma, eta = draw(st.sampled_from([0.1, 0.4, 0.5, 0.8, 1.0])), draw(st.sampled_from([0.0, 0.05, 0.25, 0.5, 1.0]))
    compare(rows, vocab, window=draw(st.integers(1, 4)), gamma=gamma, eta=eta)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_blocks_do_not_change_the_result(window, monkeypatch):
    # With small blocks, types of many sizes share a block, and large types are split over several.
    monkeypatch.setattr("trl_opd.rocks.recurrence.BLOCK", 500)
    rng = np.random.default_rng(0)
    shares = np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.02, 0.02, 0.01])
    rows = [
        row(rollout, place, int(rng.choice(10, p=shares)), float(rng.random()))
        for rollout in range(10)
        for place in range(30)
    ]
    compare(rows, 10, tau_post=0.3, window=window)


def test_single_occurrence_is_no_rock_and_an_empty_window_is_similar_to_nothing():
    assert measure([row(rollout, 0, 1) for rollout in range(3)], 2, eta=0.1).ccr[1] == 0.0
    assert measure([row(0, place, place) for place in range(5)], 5, eta=0.0).ccr.max() == 0.0


def test_threshold_is_a_quantile_of_all_occurrences_or_a_number_of_nats():
    values = np.array([0.0, 1.0, 2.0, 3.0, 4.0], dtype=np.float32)
    assert threshold("q0.75", values) == 3.0
    assert threshold("q1", values) == 4.0
    assert threshold(1.25, values) == 1.25


# Samples


def frequent(count: int) -> list[dict]:
    """Return `count` occurrences of type 1: three of four have the same neighbours, the others have unique ones."""
    return triples([(2, 3) if place % 4 else (10 + 2 * place, 11 + 2 * place) for place in range(count)])


def test_seeded_sample_of_a_frequent_type_is_compared_and_scaled():
    rows = frequent(2000)
    first, again, other = (measure(rows, 5000, max_occurrences=400, seed=seed) for seed in (0, 0, 1))
    assert first.sampled.tolist() == [1]
    assert first.ccr[1] == again.ccr[1] != other.ccr[1]
    assert first.ccr[1] == pytest.approx(0.75, abs=0.06)
    assert first.rock_occurrences[1] == pytest.approx(2000 * round(first.ccr[1] * 400) / 400)
    exact = measure(rows, 5000)
    assert len(exact.sampled) == 0
    assert exact.ccr[1] == 0.75


def test_sample_contains_no_occurrence_twice():
    # All surroundings differ, so only an occurrence that is in the sample twice would be similar to another.
    found = measure(triples([(10 + 2 * place, 11 + 2 * place) for place in range(60)]), 200, max_occurrences=50)
    assert found.sampled.tolist() == [1]
    assert found.ccr[1] == 0.0


def test_sample_of_a_type_does_not_depend_on_other_types():
    rows = frequent(500)
    alone = measure(rows, 2000, max_occurrences=100, seed=3).ccr[1]
    other = [
        {**one, "rollout": 500 + one["rollout"], "token_id": 1500 if one["token_id"] == 1 else one["token_id"]}
        for one in rows
    ]
    both = measure([*rows, *other], 2000, max_occurrences=100, seed=3)
    assert both.sampled.tolist() == [1, 1500]
    assert both.ccr[1] == alone


def test_block_is_larger_than_the_comparisons_of_one_occurrence():
    assert ContextSettings().max_occurrences <= BLOCK


# Planted and published rocks


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    made = [make_world(seed) for seed in range(10)]
    return [(save_world(world, folder / f"{seed}.parquet"), set(world.ids["rock"])) for seed, world in enumerate(made)]


@pytest.mark.slow
def test_planted_rocks_are_found_among_decoys_of_the_same_sum_but_not_by_the_aggregate_score(worlds):
    found = {"context": [], "aggregate": []}
    for path, planted in worlds:
        for score, shares in found.items():
            rocks = {rock.id for rock in detect_from_occurrences(path, top_k=EACH, score=score).rock_set.rocks}
            shares.append(len(rocks & planted) / EACH)  # precision is recall, because EACH types are planted
    assert min(found["context"]) >= 0.95
    assert max(found["aggregate"]) < 0.5


def test_rocks_are_found_without_a_reference_student(worlds, tmp_path):
    path, planted = worlds[0]
    pq.write_table(pq.read_table(path).drop_columns(["kl_pre"]), tmp_path / "post.parquet")
    found = detect_from_occurrences(tmp_path / "post.parquet", top_k=EACH)
    assert len({rock.id for rock in found.rock_set.rocks} & planted) >= 0.9 * EACH
    assert found.rock_set.method["tau_pre"] is None
    assert found.rock_set.rocks[0].mean_kl_pre is None
    assert any("no kl_pre" in note for note in found.notes)


@pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' published rocks are not beside the checkout")
def test_count_times_mean_divergence_gives_the_authors_order_and_scores(tmp_path):
    with AUTHORS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == "rock"]
    # Each type occurs as often as in their rollouts, with their mean. Every other rollout selects, so there are two
    # equal ones.
    ids = np.concatenate([np.full(int(row["freq"]), int(row["token_id"])) for row in rows])
    kl = np.concatenate([np.full(int(row["freq"]), float(row["mean_kl"])) for row in rows])
    columns = {"rollout": np.repeat([0, 1], len(ids)), "position": np.tile(np.arange(len(ids)), 2)}
    write_occurrences(tmp_path / "o.parquet", {**columns, "token_id": np.tile(ids, 2), "kl": np.tile(kl, 2)}, {})
    found = detect_from_occurrences(tmp_path / "o.parquet", score="aggregate").rock_set.rocks
    assert [rock.id for rock in found] == [int(row["token_id"]) for row in rows]
    scores = [float(row["freq_x_mean_kl"]) for row in rows]
    np.testing.assert_allclose([rock.score for rock in found], scores, rtol=1e-6)
    families = [family_of(json.loads(row["text_json"])) for row in rows]
    page = (ROOT / "docs" / "detection.md").read_text()
    assert all(f"| {family} | {families.count(family)} |" in page for family in FAMILIES)
