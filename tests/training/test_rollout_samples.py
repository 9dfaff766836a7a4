"""The callback that saves rollouts: its values equal the reference, its file survives resumes, and no run changes."""

import copy
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from trl import DistillationTrainer

from trl_opd import RolloutSamples
from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.artefacts.sampled_rollouts import PARTS, SCHEMA, find_sample_files, read_metadata
from trl_opd.training.callbacks import OPDCallback

from tests.helpers import reference
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import AS_TRL, make_config, make_model
from tests.helpers.trainers import Stop, assert_same_weights, build, trained

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def sampled(path, *callbacks, n: int = 1, resume=None, **changes):
    """Train with the callback, and return the trainer."""
    trainer = build(path, callbacks=[RolloutSamples(n), *callbacks], **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rows_of(path) -> list[dict]:
    return pq.read_table(path / FILE_NAME).to_pylist()


class Batches(OPDCallback):
    """Keeps the generation batch and the weights of every step, before its update."""

    def __init__(self):
        self.kept = {}

    def on_generation_batch(self, batch):
        self.batch = batch

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        weights = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        self.kept[state.global_step + 1] = (dict(self.batch), weights)


def by_reference(batch, student, teacher, temperature=1.0) -> list[dict[str, list]]:
    """Return both models' probabilities of each rollout's tokens, in float64, from whole logits."""
    found = []
    for row in range(len(batch["completion_ids"])):
        prompt, completion = reference.unpadded(batch, row)
        ids = torch.cat([prompt, completion])[None]
        logs = []
        for model in (student, teacher):
            with torch.no_grad():
                logits = model.double().eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            logs.append((logits / temperature).log_softmax(-1))
        p, q = (log.exp() for log in logs)
        values = {"kl": (p * (logs[0] - logs[1])).sum(-1), "entropy": -(p * logs[0]).sum(-1)}
        for name, probabilities in (("student", p), ("teacher", q)):
            values[f"{name}_p"] = probabilities[range(len(completion)), completion]
            values[f"{name}_top_p"], values[f"{name}_top_ids"] = probabilities.topk(5)
        found.append({"token_id": completion.tolist(), **{name: value.tolist() for name, value in values.items()}})
    return found


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7}, AS_TRL, {"micro_batching": "trl"}])
def test_file_has_both_models_probabilities_of_every_token(tmp_path, changes):
    batches = Batches()
    sampled(tmp_path, batches, n=3, max_steps=4, logging_steps=2, **changes)
    assert pq.read_schema(tmp_path / FILE_NAME).remove_metadata() == SCHEMA
    rows = rows_of(tmp_path)
    assert sorted({(row["step"], row["rollout"]) for row in rows}) == [(step, r) for step in (2, 4) for r in (0, 2, 3)]
    assert all(row["kl_pre"] is None and row["weight"] == 1.0 for row in rows)
    for step in (2, 4):
        batch, weights = batches.kept[step]
        student = make_model(seed=0)
        student.load_state_dict(weights)
        expected = by_reference(batch, student, make_model(seed=1), changes.get("temperature", 1.0))
        for rollout in (0, 2, 3):
            mine = [row for row in rows if (row["step"], row["rollout"]) == (step, rollout)]
            assert [row["position"] for row in mine] == list(range(len(mine)))
            for name, values in expected[rollout].items():
                found = [row[name] for row in mine]
                np.testing.assert_allclose(found, values, rtol=0 if "id" in name else 2e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_divergence_before_distillation_is_that_of_a_student_whose_adapter_began_at_its_base(tmp_path):
    batches = Batches()
    adapter = LoraConfig(r=4, target_modules="all-linear")
    sampled(tmp_path, batches, n=2, peft_config=adapter, learning_rate=0.1)
    expected = by_reference(batches.kept[2][0], make_model(seed=0), make_model(seed=1))
    for rollout in (0, 3):
        mine = [row for row in rows_of(tmp_path) if (row["step"], row["rollout"]) == (2, rollout)]
        np.testing.assert_allclose([row["kl_pre"] for row in mine], expected[rollout]["kl"], rtol=2e-4)
        assert all(row["kl_pre"] != row["kl"] for row in mine)
    sampled(tmp_path, peft_config=LORA, max_steps=1)  # which does not begin at the base
    assert {row["kl_pre"] for row in rows_of(tmp_path)} == {None}


def test_frozen_tokens_have_weight_zero_and_are_measured(tmp_path):
    rocks = list(range(60, 200))
    weighting = {"token_weighting": "rock", "rock_set": rock_file(tmp_path / "rocks.json", rocks)}
    sampled(tmp_path, n=4, max_steps=1, **weighting)
    rows = rows_of(tmp_path)
    assert {row["weight"] for row in rows} == {0.0, 1.0}
    for row in rows:
        assert row["weight"] == (row["token_id"] not in rocks)
        assert row["kl"] > 0


@pytest.mark.parametrize(("family", "peft_config"), [("qwen3", None), ("qwen3", LORA), ("gpt2", None)])
@pytest.mark.slow
def test_a_run_with_the_callback_is_the_run_without_it(tmp_path, family, peft_config):
    dropout = {"resid_pdrop": 0.2, "attn_pdrop": 0.2, "embd_pdrop": 0.2} if family == "gpt2" else {}
    runs = []
    for callbacks in ([RolloutSamples(2)], []):
        student = make_model(family, seed=0, **dropout)
        runs.append(trained(tmp_path, student=student, peft_config=peft_config, callbacks=callbacks, max_steps=3))
    assert_same_weights(runs[0].model, runs[1].model)
    assert runs[0].token_stats.kl_sum.equal(runs[1].token_stats.kl_sum)


def test_metadata_has_the_prompts_and_models(tokenizer, tmp_path):
    sampled(tmp_path, n=4, num_generations=2)
    metadata = read_metadata(tmp_path / FILE_NAME)
    assert metadata["tokenizer"]["fingerprint"].startswith("sha256:")
    assert sorted(metadata["prompts"]) == ["1/0", "1/1", "2/0", "2/1"]
    assert all(tokenizer.decode(ids).startswith("<|start|>user") for ids in metadata["prompts"].values())
    assert all(row["prompt"] == row["rollout"] // 2 for row in rows_of(tmp_path))


# Resumed


SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
def test_resumed_run_has_samples_of_every_step_once(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    sampled(whole, n=2, max_steps=4, **SAVING)
    with pytest.raises(KeyboardInterrupt):
        sampled(broken, Stop(3), n=2, max_steps=4, **SAVING)
    assert not (broken / FILE_NAME).exists()
    assert [path.name for path in find_sample_files(broken)] == [f"step-{step}.parquet" for step in (1, 2, 3)]
    sampled(broken, n=2, max_steps=4, resume=True, **SAVING)
    assert pq.read_table(broken / FILE_NAME).equals(pq.read_table(whole / FILE_NAME))
    assert not (broken / PARTS).exists()


@pytest.mark.slow
def test_extended_run_keeps_its_samples_and_a_new_run_starts_over(tmp_path):
    sampled(tmp_path, max_steps=4, **SAVING)
    sampled(tmp_path, max_steps=5, resume=str(tmp_path / "checkpoint-2"))
    places = [(row["step"], row["rollout"], row["position"]) for row in rows_of(tmp_path)]
    assert {step for step, *_ in places} == {1, 2, 3, 4, 5}
    assert len(set(places)) == len(places), "a step is there twice"
    assert set(read_metadata(tmp_path / FILE_NAME)["prompts"]) == {f"{step}/0" for step in range(1, 6)}
    sampled(tmp_path, max_steps=1)
    assert {row["step"] for row in rows_of(tmp_path)} == {1}


@pytest.mark.slow
def test_samples_of_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path, Stop(5), max_steps=6, **SAVING)
    sampled(tmp_path, max_steps=3, resume=str(tmp_path / "checkpoint-2"))
    assert {row["step"] for row in rows_of(tmp_path)} == {1, 2, 3}


# Wrong input


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "4"])
def test_invalid_number_of_rollouts_is_an_error(n):
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        RolloutSamples(n)


def test_callback_with_another_trainer_is_an_error_before_the_first_step(tmp_path):
    trainer = build(tmp_path, cls=DistillationTrainer, callbacks=[RolloutSamples()])
    with pytest.raises(ValueError, match=r"RolloutSamples works with trl_opd.OPDTrainer only"):
        trainer.train()


def test_asking_for_more_rollouts_than_a_step_has_keeps_all_of_them(tmp_path):
    sampled(tmp_path, n=100, max_steps=1)
    assert {row["rollout"] for row in rows_of(tmp_path)} == {0, 1, 2, 3}


def test_hub_token_is_not_pickled_with_the_arguments_and_is_kept_by_a_copy(tmp_path):
    args = make_config(tmp_path, hub_token="hf_secretsecretsecret")
    assert b"hf_secretsecretsecret" not in pickle.dumps(args)
    assert args.hub_token == copy.deepcopy(args).hub_token == "hf_secretsecretsecret"
    assert copy.deepcopy(args).to_dict() == args.to_dict()
