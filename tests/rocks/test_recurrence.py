"""The context filter: equal to the definition, pair by pair; samples; planted rocks among decoys."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opd.rocks.corpus import NO_TOKEN, Corpus
from trl_opd.rocks.families import FAMILIES, family_of
from trl_opd.rocks.from_occurrences import detect_from_occurrences
from trl_opd.rocks.recurrence import BLOCK, ContextSettings, measure_types, threshold

from tests.helpers import reference
from tests.helpers.paths import ROOT, SHARED_DATA
from tests.helpers.planted import EACH, make_world, save_world

AUTHORS = SHARED_DATA / "rock_tokens_qwen3" / "rock_vs_control.csv"


def make_corpus(rows: list[dict]) -> Corpus:
    kinds = {"rollout": np.int32, "position": np.int32, "token_id": np.int32, "kl": np.float32, "kl_pre": np.float32}
    columns = {
        name: np.array([row[name] for row in rows], dtype=kind) for name, kind in kinds.items() if name in rows[0]
    }
    return Corpus(**columns)


def compare(rows: list[dict], vocab: int, **changes) -> None:
    """Assert that the figures of every type are those of the definition."""
    settings = ContextSettings(**{"tau_pre": 0.5, "tau_post": 0.5, **changes})
    found = measure_types(make_corpus(rows), settings, vocab)
    names = {name: getattr(settings, name) for name in ("tau_post", "window", "gamma", "eta")}
    expected = reference.context_figures(rows, tau_pre=settings.tau_pre if "kl_pre" in rows[0] else None, **names)
    assert set(np.flatnonzero(found.count)) == set(expected)
    for type, figures in expected.items():
        assert found.count[type] == figures["count"]
        assert found.persistent[type] == figures["persistent"]
        assert found.ccr[type] == pytest.approx(figures["ccr"])
        assert found.kl_sum[type] == pytest.approx(figures["score"], rel=1e-6)
        assert found.context_score[type] == pytest.approx(figures["context_score"], rel=1e-6)


# The definition


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_the_filter_equals_the_definition_pair_by_pair(data):
    draw = data.draw
    vocab, has_pre = draw(st.integers(1, 5)), draw(st.booleans())
    rows = []
    for rollout in range(draw(st.integers(1, 4))):
        position = 0
        for _ in range(draw(st.integers(1, 14))):
            position += draw(st.sampled_from([1, 1, 1, 1, 2]))  # a gap now and then
            row = {"rollout": rollout, "position": position, "token_id": draw(st.integers(0, vocab - 1))}
            row["kl"] = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
            rows.append(row | ({"kl_pre": draw(st.sampled_from([0.25, 0.5, 2.0]))} if has_pre else {}))
    compare(
        rows,
        vocab,
        window=draw(st.integers(1, 4)),
        gamma=draw(st.sampled_from([0.1, 0.4, 0.5, 0.8, 1.0])),
        eta=draw(st.sampled_from([0.0, 0.05, 0.25, 0.5, 1.0])),
    )


@pytest.mark.parametrize("window", [1, 2, 5])
def test_types_of_many_sizes_share_blocks_and_large_ones_are_cut_into_several(window, monkeypatch):
    monkeypatch.setattr("trl_opd.rocks.recurrence.BLOCK", 500)
    rng = np.random.default_rng(0)
    shares = np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.02, 0.02, 0.01])
    rows = [
        {"rollout": rollout, "position": place, "token_id": int(rng.choice(10, p=shares)), "kl": float(rng.random())}
        for rollout in range(10)
        for place in range(30)
    ]
    compare(rows, 10, tau_post=0.3, window=window)


def test_a_window_ends_with_the_completion_and_at_a_gap():
    corpus = make_corpus(
        [
            {"rollout": rollout, "position": position, "token_id": id, "kl": 1.0}
            for rollout, position, id in [(0, 0, 5), (0, 1, 6), (0, 2, 7), (1, 0, 8), (1, 1, 9), (1, 3, 4), (2, 4, 3)]
        ]
    )
    found = corpus.windows(np.array([1, 2, 3, 4, 5]), 2)  # columns: -1, -2, 1, 2
    none = NO_TOKEN
    assert found.tolist() == [
        [5, none, 7, none],
        [6, 5, none, none],
        [none, none, 9, none],
        [8, none, none, none],
        [none, none, none, none],
    ]


def test_an_occurrence_alone_is_no_rock_and_an_empty_window_is_similar_to_nothing():
    alone = [{"rollout": rollout, "position": 0, "token_id": 1, "kl": 1.0} for rollout in range(3)]
    assert measure_types(make_corpus(alone), ContextSettings(tau_post=0.5, eta=0.1), 2).ccr[1] == 0.0
    single = [{"rollout": 0, "position": place, "token_id": place, "kl": 1.0} for place in range(5)]
    assert measure_types(make_corpus(single), ContextSettings(tau_post=0.5, eta=0.0), 5).ccr.max() == 0.0


def test_a_quantile_is_of_all_occurrences_and_a_number_is_in_nats():
    values = np.array([0.0, 1.0, 2.0, 3.0, 4.0], dtype=np.float32)
    assert threshold("q0.75", values) == 3.0
    assert threshold("q1", values) == 4.0
    assert threshold(1.25, values) == 1.25


# Samples


def frequent(count: int) -> list[dict]:
    """Return a type of `count` occurrences, three of four of them in one surrounding and one of four in none."""
    rows = []
    for rollout in range(count):
        around = (2, 3) if rollout % 4 else (10 + 2 * rollout, 11 + 2 * rollout)
        for position, id in enumerate((around[0], 1, around[1])):
            rows.append({"rollout": rollout, "position": position, "token_id": id, "kl": 1.0 if id == 1 else 0.0})
    return rows


def test_of_a_type_with_too_many_occurrences_a_seeded_sample_is_compared_and_scaled():
    corpus, vocab = make_corpus(frequent(2000)), 5000
    settings = {"tau_post": 0.5, "max_occurrences": 400}
    found = [measure_types(corpus, ContextSettings(**settings, seed=seed), vocab) for seed in (0, 0, 1)]
    assert found[0].sampled.tolist() == [1]
    assert found[0].ccr[1] == found[1].ccr[1] != found[2].ccr[1]
    assert found[0].ccr[1] == pytest.approx(0.75, abs=0.06)
    assert found[0].rock_occurrences[1] == pytest.approx(2000 * round(found[0].ccr[1] * 400) / 400)
    exact = measure_types(corpus, ContextSettings(tau_post=0.5), vocab)
    assert len(exact.sampled) == 0
    assert exact.ccr[1] == 0.75


def test_a_sample_holds_no_occurrence_twice():
    alone = [  # in surroundings of its own each; twice in a sample it would be like itself
        {"rollout": rollout, "position": place, "token_id": id, "kl": float(id == 1)}
        for rollout in range(60)
        for place, id in enumerate((10 + 2 * rollout, 1, 11 + 2 * rollout))
    ]
    found = measure_types(make_corpus(alone), ContextSettings(tau_post=0.5, max_occurrences=50), 200)
    assert found.sampled.tolist() == [1]
    assert found.ccr[1] == 0.0


def test_the_sample_of_a_type_does_not_depend_on_other_types():
    rows = frequent(500)
    settings = ContextSettings(tau_post=0.5, max_occurrences=100, seed=3)
    alone = measure_types(make_corpus(rows), settings, 2000).ccr[1]
    other = [
        {**row, "rollout": 500 + row["rollout"], "token_id": 1500 if row["token_id"] == 1 else row["token_id"]}
        for row in rows
    ]
    both = measure_types(make_corpus([*rows, *other]), settings, 2000)
    assert both.sampled.tolist() == [1, 1500]
    assert both.ccr[1] == alone


def test_a_block_is_larger_than_the_comparisons_of_one_occurrence():
    assert ContextSettings().max_occurrences <= BLOCK


# What it is for


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    return [
        (save_world(world, folder / f"{seed}.parquet"), world) for seed, world in enumerate(map(make_world, range(10)))
    ]


@pytest.mark.slow
def test_planted_rocks_are_found_among_decoys_of_the_same_total_and_the_aggregate_score_cannot(worlds):
    context, aggregate = [], []
    for path, world in worlds:
        rocks = set(world.ids["rock"].tolist())
        for score, shares in (("context", context), ("aggregate", aggregate)):
            found = {rock.id for rock in detect_from_occurrences(path, top_k=EACH, score=score).rock_set.rocks}
            shares.append(len(found & rocks) / EACH)  # as many are asked for as there are: precision is recall
    assert min(context) >= 0.95
    assert max(aggregate) < 0.5


def test_rocks_are_found_without_a_reference_student(worlds, tmp_path):
    _, world = worlds[0]
    import pyarrow.parquet as pq

    table = pq.read_table(worlds[0][0]).drop_columns(["kl_pre"])
    pq.write_table(table, tmp_path / "post.parquet")
    found = detect_from_occurrences(tmp_path / "post.parquet", top_k=EACH)
    assert len({rock.id for rock in found.rock_set.rocks} & set(world.ids["rock"].tolist())) >= 0.9 * EACH
    assert found.rock_set.method["tau_pre"] is None
    assert found.rock_set.rocks[0].mean_kl_pre is None
    assert any("no kl_pre" in note for note in found.notes)


@pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' published rocks are not beside the checkout")
def test_count_times_mean_divergence_gives_the_authors_order_and_scores(tmp_path):
    import csv

    from trl_opd.artefacts.occurrences import write_occurrences

    with AUTHORS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == "rock"]
    # Each type as often as they saw it, with the mean that they saw; every other prompt selects, so all stand twice.
    ids = np.concatenate([np.full(int(row["freq"]), int(row["token_id"])) for row in rows])
    kl = np.concatenate([np.full(int(row["freq"]), float(row["mean_kl"])) for row in rows])
    columns = {"rollout": np.repeat([0, 1], len(ids)), "position": np.tile(np.arange(len(ids)), 2)}
    write_occurrences(tmp_path / "o.parquet", {**columns, "token_id": np.tile(ids, 2), "kl": np.tile(kl, 2)}, {})
    found = detect_from_occurrences(tmp_path / "o.parquet", score="aggregate").rock_set.rocks
    assert [rock.id for rock in found] == [int(row["token_id"]) for row in rows]
    np.testing.assert_allclose(
        [rock.score for rock in found], [float(row["freq_x_mean_kl"]) for row in rows], rtol=1e-6
    )
    families = [family_of(json.loads(row["text_json"])) for row in rows]
    page = (ROOT / "docs" / "detection.md").read_text()
    assert all(f"| {family} | {families.count(family)} |" in page for family in FAMILIES)
