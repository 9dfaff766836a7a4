"""The callback that saves rollouts: its values equal the reference, its file survives resumes, and no run changes."""

import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from trl import DistillationTrainer

from trl_opd import OPDTrainer, RolloutSamples
from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.artefacts.sampled_rollouts import PARTS, SCHEMA, find_sample_files, read_metadata
from trl_opd.training.callbacks import OPDCallback

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import AS_TRL, config_kwargs, make_config, make_dataset, make_model
from tests.helpers.trainers import Stop

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def build(tokenizer, path, *callbacks, student=None, peft_config=None, **changes) -> OPDTrainer:
    return OPDTrainer(
        model=student or make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(path, **changes),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


class Batches(OPDCallback):
    """Keeps the generation batch and the weights of every step, before its update."""

    def __init__(self):
        self.kept = {}

    def on_generation_batch(self, batch):
        self.batch = batch

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        weights = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        self.kept[state.global_step + 1] = (dict(self.batch), weights)


def by_reference(batch, student, teacher, temperature=1.0) -> dict[int, dict[str, list]]:
    """Return both models' probabilities of each rollout's tokens, in float64, from whole logits."""
    found = {}
    for row in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            logs = [
                (model.double().eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
                for model in (student, teacher)
            ]
        p, q = (log.exp() for log in logs)
        found[row] = {
            "token_id": completion.tolist(),
            "kl": (p * (logs[0] - logs[1])).sum(-1).tolist(),
            "entropy": -(p * logs[0]).sum(-1).numpy(),
            "student_p": p[range(len(completion)), completion].tolist(),
            "teacher_p": q[range(len(completion)), completion].tolist(),
            "student_top": p.topk(5),
            "teacher_top": q.topk(5),
        }
    return found


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7}, AS_TRL, {"micro_batching": "trl"}])
def test_file_has_both_models_probabilities_of_every_token(tokenizer, tmp_path, changes):
    batches = Batches()
    trainer = build(tokenizer, tmp_path, RolloutSamples(3), batches, max_steps=4, logging_steps=2, **changes)
    trainer.train()
    table = pq.read_table(tmp_path / FILE_NAME)
    assert table.schema.remove_metadata() == SCHEMA
    rows = table.to_pylist()
    assert sorted({(row["step"], row["rollout"]) for row in rows}) == [(step, r) for step in (2, 4) for r in (0, 2, 3)]
    for step in (2, 4):
        batch, weights = batches.kept[step]
        student = make_model(seed=0)
        student.load_state_dict(weights)
        expected = by_reference(batch, student, make_model(seed=1), changes.get("temperature", 1.0))
        for rollout in (0, 2, 3):
            mine, want = [row for row in rows if (row["step"], row["rollout"]) == (step, rollout)], expected[rollout]
            assert [row["position"] for row in mine] == list(range(len(want["token_id"])))
            assert [row["token_id"] for row in mine] == want["token_id"]
            for name in ("kl", "entropy", "student_p", "teacher_p"):
                np.testing.assert_allclose([row[name] for row in mine], want[name], rtol=2e-4, atol=1e-6)
            for who in ("student", "teacher"):
                values, ids = want[f"{who}_top"]
                np.testing.assert_allclose([row[f"{who}_top_p"] for row in mine], values, rtol=2e-4)
                assert [row[f"{who}_top_ids"] for row in mine] == ids.tolist()
            assert all(row["kl_pre"] is None and row["weight"] == 1.0 for row in mine)


def test_divergence_before_distillation_is_that_of_the_student_without_adapter(tokenizer, tmp_path):
    batches = Batches()
    trainer = build(tokenizer, tmp_path, RolloutSamples(2), batches, peft_config=LORA, max_steps=1)
    trainer.train()
    rows = pq.read_table(tmp_path / FILE_NAME).to_pylist()
    expected = by_reference(batches.kept[1][0], make_model(seed=0), make_model(seed=1))
    for rollout in (0, 3):
        mine = [row["kl_pre"] for row in rows if row["rollout"] == rollout]
        np.testing.assert_allclose(mine, expected[rollout]["kl"], rtol=2e-4)
        assert mine != [row["kl"] for row in rows if row["rollout"] == rollout]


def test_frozen_tokens_have_weight_zero_and_are_measured(tokenizer, tmp_path):
    rocks = list(range(60, 200))
    changes = {"token_weighting": "rock", "rock_set": rock_file(tmp_path / "rocks.json", rocks)}
    build(tokenizer, tmp_path / "run", RolloutSamples(4), max_steps=1, **changes).train()
    rows = pq.read_table(tmp_path / "run" / FILE_NAME).to_pylist()
    assert {row["weight"] for row in rows} == {0.0, 1.0}
    for row in rows:
        assert row["weight"] == (row["token_id"] not in rocks)
        assert row["kl"] > 0


@pytest.mark.parametrize(("family", "peft_config"), [("qwen3", None), ("qwen3", LORA), ("gpt2", None)])
@pytest.mark.slow
def test_a_run_with_the_callback_is_the_run_without_it(tokenizer, tmp_path, family, peft_config):
    dropout = {"resid_pdrop": 0.2, "attn_pdrop": 0.2, "embd_pdrop": 0.2} if family == "gpt2" else {}
    runs = []
    for name, callbacks in (("with", [RolloutSamples(2)]), ("without", [])):
        student = make_model(family, seed=0, **dropout)
        trainer = build(tokenizer, tmp_path / name, *callbacks, student=student, peft_config=peft_config, max_steps=3)
        trainer.train()
        runs.append(trainer)
    for name, value in runs[0].model.state_dict().items():
        assert torch.equal(value, runs[1].model.state_dict()[name]), name
    assert runs[0].token_stats.kl_sum.equal(runs[1].token_stats.kl_sum)


def test_metadata_has_the_prompts_and_models(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, RolloutSamples(4), max_steps=2, num_generations=2)
    trainer.train()
    metadata = read_metadata(tmp_path / FILE_NAME)
    assert metadata["tokenizer"]["fingerprint"].startswith("sha256:")
    assert sorted(metadata["prompts"]) == ["1/0", "1/1", "2/0", "2/1"]
    texts = [tokenizer.decode(ids) for ids in metadata["prompts"].values()]
    assert all(text.startswith("<|start|>user") for text in texts)
    rows = pq.read_table(tmp_path / FILE_NAME).to_pylist()
    assert all(row["prompt"] == row["rollout"] // 2 for row in rows)


@pytest.mark.slow
def test_resumed_run_has_samples_of_every_step_once(tokenizer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = build(tokenizer, tmp_path / "whole", RolloutSamples(2), **settings)
    whole.train()
    broken = build(tokenizer, tmp_path / "broken", RolloutSamples(2), Stop(5), **settings)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert not (tmp_path / "broken" / FILE_NAME).exists()
    parts = find_sample_files(tmp_path / "broken")
    assert [path.name for path in parts] == [f"step-{step}.parquet" for step in range(1, 6)]
    resumed = build(tokenizer, tmp_path / "broken", RolloutSamples(2), **settings)
    resumed.train(resume_from_checkpoint=True)
    files = [pq.read_table(tmp_path / name / FILE_NAME) for name in ("whole", "broken")]
    assert files[0].equals(files[1])
    assert not (tmp_path / "broken" / PARTS).exists()


@pytest.mark.slow
def test_extended_run_keeps_its_samples_and_a_new_run_starts_over(tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    build(tokenizer, tmp_path, RolloutSamples(1), max_steps=4, **settings).train()
    build(tokenizer, tmp_path, RolloutSamples(1), max_steps=5, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    places = pq.read_table(tmp_path / FILE_NAME, columns=["step", "rollout", "position"]).to_pylist()
    assert sorted({place["step"] for place in places}) == [1, 2, 3, 4, 5]
    assert len({tuple(place.values()) for place in places}) == len(places), "a step is there twice"
    assert set(read_metadata(tmp_path / FILE_NAME)["prompts"]) == {f"{step}/0" for step in range(1, 6)}
    build(tokenizer, tmp_path, RolloutSamples(1), max_steps=1, **settings).train()
    assert set(pq.read_table(tmp_path / FILE_NAME, columns=["step"]).column(0).to_pylist()) == {1}


@pytest.mark.slow
def test_samples_of_steps_after_the_checkpoint_are_dropped_on_resume(tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    broken = build(tokenizer, tmp_path, RolloutSamples(1), Stop(5), max_steps=6, **settings)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = build(tokenizer, tmp_path, RolloutSamples(1), max_steps=3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(pq.read_table(tmp_path / FILE_NAME, columns=["step"]).column(0).to_pylist()) == {1, 2, 3}


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "4"])
def test_invalid_number_of_rollouts_is_an_error(n):
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        RolloutSamples(n)


def test_callback_with_another_trainer_is_an_error_before_the_first_step(tokenizer, tmp_path):
    from trl import DistillationConfig

    trainer = DistillationTrainer(
        model=make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=DistillationConfig(**config_kwargs(tmp_path)),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        callbacks=[RolloutSamples()],
    )
    with pytest.raises(ValueError, match=r"RolloutSamples works with trl_opd.OPDTrainer only"):
        trainer.train()


def test_asking_for_more_rollouts_than_a_step_has_keeps_all_of_them(tokenizer, tmp_path):
    build(tokenizer, tmp_path, RolloutSamples(100), max_steps=1).train()
    rollouts = pq.read_table(tmp_path / FILE_NAME, columns=["rollout"]).column(0).to_pylist()
    assert sorted(set(rollouts)) == [0, 1, 2, 3]


def test_hub_token_is_not_pickled_with_the_arguments_and_is_kept_by_a_copy(tmp_path):
    import copy

    args = make_config(tmp_path, hub_token="hf_secretsecretsecret")
    assert b"hf_secretsecretsecret" not in pickle.dumps(args)
    assert args.hub_token == copy.deepcopy(args).hub_token == "hf_secretsecretsecret"
    assert copy.deepcopy(args).to_dict() == args.to_dict()
