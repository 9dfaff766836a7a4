"""The cutoff: ranks, and the sweep that chooses the largest cutoff at which disjoint draws agree."""

import numpy as np
import pytest

from trl_opd.rocks.corpus import Corpus
from trl_opd.rocks.cutoff import jaccard, rank_ids, sweep_cutoffs


def steep_world(types: int, rollouts: int, length: int = 40, seed: int = 0) -> Corpus:
    """Return rollouts in which the first 30 types have very different scores, and all others about the same score."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, types, (rollouts, length))
    kl = np.where(ids < 30, 100.0 / (1 + ids), 0.5) * rng.uniform(0.9, 1.1, ids.shape)
    rollout, position = (index.ravel().astype(np.int32) for index in np.indices(ids.shape))
    return Corpus(rollout, position, ids.ravel().astype(np.int32), kl.ravel().astype(np.float32))


def total(corpora) -> np.ndarray:
    return np.minimum.reduce([np.bincount(corpus.token_id, corpus.kl, 400) for corpus in corpora])


def test_ranks_go_by_score_then_id_and_a_score_of_zero_has_none():
    assert rank_ids(np.array([0.0, 2.0, 3.0, 2.0, -1.0])).tolist() == [2, 1, 3]
    many = np.where(np.arange(5000) % 3, 1.0, 2.0)
    assert rank_ids(many).tolist() == [*range(0, 5000, 3), *(id for id in range(5000) if id % 3)]
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4])) == 0.5
    assert jaccard(np.array([]), np.array([])) == 0.0


def test_sweep_chooses_the_largest_cutoff_up_to_which_disjoint_draws_agree():
    corpus = steep_world(300, 500)
    found = sweep_cutoffs([corpus], total, seed=0)
    assert found.cutoffs == list(range(10, 61, 10))  # a fifth of 300 types
    assert list(found.stability) == [50, 100, 200]
    assert 20 <= found.top_k <= 40
    stable = found.stability[200]
    place = found.cutoffs.index(found.top_k)
    assert min(stable[: place + 1]) >= 0.7 > stable[place + 1]
    sums = np.sort(total([corpus]))[::-1]
    assert found.coverage[2] == pytest.approx(sums[:30].sum() / sums.sum())
    assert found == sweep_cutoffs([corpus], total, seed=0)


def test_draws_are_disjoint_sets_of_rollouts(monkeypatch):
    corpus = steep_world(300, 240)
    seen = []

    def spy(corpora):
        seen.append(set(corpora[0].rollout.tolist()))
        return total(corpora)

    assert list(sweep_cutoffs([corpus], spy, seed=1).stability) == [50, 100]
    pairs = list(zip(seen[::2], seen[1::2], strict=False))[: 2 * 10]
    assert {len(one) for one, _ in pairs} == {50, 100}  # there are not 200 rollouts and 200 others
    assert all(not one & other for one, other in pairs)


def test_too_few_rollouts_or_types_for_a_sweep_are_an_error():
    with pytest.raises(ValueError, match="the half that selects has 99: collect more prompts"):
        sweep_cutoffs([steep_world(300, 99)], total, seed=0)
    with pytest.raises(ValueError, match="needs at least 50 token types, and there are 40"):
        sweep_cutoffs([steep_world(40, 100)], total, seed=0)


def test_part_of_a_corpus_keeps_its_order():
    part = steep_world(300, 9, length=3).take(np.array([7, 2]))
    assert part.rollout.tolist() == [2, 2, 2, 7, 7, 7]
    assert part.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert part.rollouts == 2
