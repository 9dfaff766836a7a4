"""Occurrences of a training's own rollouts: every nth step, frozen positions, and resuming."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerState

from trl_opd import TokenSignals
from trl_opd.artefacts.occurrences import Occurrences
from trl_opd.cli import main

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import AS_TRL
from tests.helpers.trainers import assert_same_weights, build, trained


def steps(path) -> dict[int, dict]:
    found = {}
    for file in (path / "occurrences").glob("step-*.parquet"):
        found[int(file.stem.removeprefix("step-"))] = pq.read_table(file).to_pydict()
    return dict(sorted(found.items()))


@pytest.mark.parametrize("micro_batching", ["tight", "trl"])
@pytest.mark.slow
def test_training_writes_the_rollouts_of_every_nth_step(tmp_path, micro_batching):
    settings = {"micro_batching": micro_batching, "num_generations": 2, "max_steps": 4}
    trained(tmp_path, save_occurrences=2, **settings)
    found = steps(tmp_path)
    assert list(found) == [2, 4]
    for rows in found.values():
        places = list(zip(rows["rollout"], rows["position"], strict=True))
        assert places == sorted(places)
        assert sorted(set(rows["rollout"])) == [0, 1, 2, 3]
        assert rows["prompt"] == [rollout // 2 for rollout in rows["rollout"]]
        assert set(rows["weight"]) == {1.0}
    stats = trained(tmp_path / "every", save_occurrences=1, **settings).token_stats
    every = steps(tmp_path / "every")
    assert {step: every[step] for step in (2, 4)} == found  # each step's own rollouts
    ids, divergences = (np.concatenate([rows[name] for rows in every.values()]) for name in ("token_id", "kl"))
    np.testing.assert_array_equal(np.bincount(ids, minlength=300), stats.seen)
    np.testing.assert_allclose(np.bincount(ids, divergences, minlength=300), stats.kl_sum, rtol=1e-5)
    metadata = Occurrences(tmp_path / "occurrences" / "step-2.parquet").metadata
    assert (metadata["step"], metadata["num_rollouts"], metadata["vocab_size"]) == (2, 4, 300)


def test_frozen_position_that_was_not_measured_has_no_divergence(tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", range(60, 180))
    trained(tmp_path, save_occurrences=1, token_weighting="rock", rock_set=rocks, logging_steps=2)
    first, second = steps(tmp_path).values()
    frozen = [weight == 0 for weight in first["weight"]]
    assert any(frozen)
    assert [kl is None for kl in first["kl"]] == frozen
    assert None not in second["kl"]  # a step that logs measures everything
    assert main(["detect", str(tmp_path / "occurrences" / "step-1.parquet"), "--output", str(tmp_path / "r.json")]) == 1


def test_signals_of_an_interrupted_step_are_not_written(tmp_path):
    settings = {"save_occurrences": 1, "max_steps": 1}
    trained(tmp_path / "whole", **settings)
    trainer = build(tmp_path / "broken", **settings)
    inputs = {"positions": torch.tensor([0]), "completion_ids": torch.tensor([[7]]), "rollout": torch.tensor([3])}
    signals = TokenSignals(torch.tensor([7]), torch.ones(1), torch.ones(1), torch.ones(1))
    trainer._occurrence_writer.add(inputs, signals, TrainerState(global_step=5))
    trainer.train()
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")


@pytest.mark.slow
def test_files_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    settings = {"save_occurrences": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(tmp_path, **settings)
    whole = steps(tmp_path)
    assert list(whole) == [1, 2, 3, 4]
    (tmp_path / "occurrences" / "step-9.parquet").write_bytes(b"of a longer run")
    build(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps(tmp_path) == whole


def test_occurrences_with_another_beta_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"which is computed only with beta=1\.0, got beta=0\.5"):
        build(tmp_path, save_occurrences=1, beta=0.5)
    with pytest.raises(ValueError, match="save_occurrences must be a whole number of at least 1"):
        build(tmp_path, save_occurrences=0)


def test_occurrences_need_no_statistics(tmp_path):
    trained(tmp_path, **AS_TRL, save_occurrences=2)
    assert list(steps(tmp_path)) == [2]


@pytest.mark.slow
def test_saving_occurrences_changes_no_step(tmp_path):
    with_file, without = (trained(tmp_path, **more) for more in ({}, {"save_occurrences": 1}))
    assert_same_weights(with_file.model, without.model)
