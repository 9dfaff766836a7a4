"""Whole short runs: groups of rollouts, cut rollouts, frozen positions, evaluation and prediction."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from trl_opd.loss.weights import random_weights
from trl_opd.training.metrics import repetition

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_dataset
from tests.helpers.trainers import (
    GREEDY,
    ROCKS,
    Recorder,
    build,
    ending_student,
    loss_positions,
    measured,
    record,
)

# Several rollouts per prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_generations", [1, 2, 4])
def test_rollouts_of_a_prompt_are_in_one_generation_batch(tokenizer, tmp_path, num_generations, stream):
    dataset = make_dataset(chat=False)
    prompts = dataset["prompt"][:]
    if stream:
        dataset = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in prompts))
    trainer = record(tokenizer, tmp_path, dataset, num_generations=num_generations, shuffle_dataset=False)
    for step, (_, _, seen, batch) in enumerate(trainer.batches):
        different = 4 // num_generations
        expected = prompts[step * different : (step + 1) * different]
        assert seen == [prompt for prompt in expected for _ in range(num_generations)]
        assert len(batch["completion_ids"]) == 4
    assert len(trainer.batches) == 2
    assert len({tuple(row) for row in trainer.batches[0][3]["completion_ids"].tolist()}) > 1


def test_shuffled_stream_keeps_groups_together_and_reads_every_prompt(tokenizer, tmp_path):
    prompts = make_dataset(8, chat=False)["prompt"][:]
    stream = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in prompts))
    trainer = record(tokenizer, tmp_path, stream, num_generations=2, max_steps=4)
    seen = [prompt for *_, row, _ in trainer.batches for prompt in row]
    assert seen[::2] == seen[1::2]
    assert sorted(seen[::2]) == sorted(prompts)
    assert seen[::2] != prompts


def test_evaluation_has_one_rollout_per_prompt(tokenizer, tmp_path):
    dataset = make_dataset(3, chat=False)
    trainer = build(tmp_path, tokenizer=tokenizer, cls=Recorder, eval_dataset=dataset, num_generations=4)
    trainer.evaluate()
    seen = [prompt for _, _, row, _ in trainer.batches for prompt in row]
    assert sorted(seen) == sorted(dataset["prompt"])


# Rollouts that were cut


@pytest.mark.parametrize("normalization", [None, "tokens", "weights"])
def test_cut_rollouts_are_left_out_of_loss_denominator_and_metrics(tokenizer, tmp_path, normalization):
    changes = {"max_completion_length": 24, "gradient_accumulation_steps": 4, "max_steps": 1, "learning_rate": 0.0}
    if normalization is not None:
        changes |= {"token_weighting": "rock", "rock_weight": 0.25, "weight_normalization": normalization}
        changes["rock_set"] = rock_file(tmp_path / "rocks.json", ROCKS)
    trainer = record(tokenizer, tmp_path, student=ending_student(), mask_truncated_completions=True, **changes)
    *_, batch = trainer.batches[0]
    mask = batch["completion_mask"].bool()
    last = [row[m][-1].item() for row, m in zip(batch["completion_ids"], mask, strict=True)]
    kept = torch.tensor([id in (0, 2) for id in last])
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(batch["tool_mask"].bool(), mask & kept[:, None])
    ids, divergences = measured(trainer, batch)
    assert len(ids) == (mask & kept[:, None]).sum()
    weights = torch.ones(len(ids))
    if normalization is not None:
        weights[torch.isin(ids, torch.tensor(ROCKS))] = 0.25
        assert torch.equal(batch["weights"][loss_positions(batch)], weights)
        assert torch.all(batch["weights"][~loss_positions(batch)] == 0)
    denominator = weights.sum().item() if normalization == "weights" else len(ids)
    assert batch["num_items_in_batch"] == len(ids)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx((divergences * weights).sum().item() / denominator, rel=1e-5)
    assert line["kl/mean"] == pytest.approx(divergences.mean().item(), rel=1e-5)
    assert line["weight/zero_share"] == 0.0


# Metrics


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3], None),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([7] * 12, 8 / 9),
        ([1, 2, 3, 4, 5, 4, 3, 2, 1], 0.0),
        ([5, 5, 5, 5, 9, 5, 5, 5, 5], 1 / 6),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_occurred_before(ids, share):
    assert repetition(ids) == (None if share is None else pytest.approx(share))


def test_logged_repetition_is_the_mean_over_completions_since_the_last_log(tokenizer, tmp_path):
    student = ending_student(8, ends=range(40, 44))  # which can hardly write anything but these tokens
    changes = {"max_steps": 4, "logging_steps": 2, "max_completion_length": 20}
    trainer = record(tokenizer, tmp_path, student=student, eval_dataset=make_dataset(3, chat=False), **changes)
    evaluated = trainer.evaluate()["eval_completions/repetition"]
    shares = {"first log": [], "second log": [], "evaluation": []}
    for training, step, _, batch in trainer.batches:
        window = ("first log", "second log")[step // 2] if training else "evaluation"
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            shares[window].append(repetition(ids[mask.bool()].tolist()))
    lines = [line["completions/repetition"] for line in trainer.state.log_history if "loss" in line]
    means = [np.mean([share for share in window if share is not None]) for window in shares.values()]
    assert [*lines, evaluated] == pytest.approx(means)
    assert max(lines) > 0


@pytest.mark.slow
def test_rock_set_without_weighting_only_adds_metrics(tokenizer, tmp_path):
    sets = {"plain": {}, "shown": {"rock_set": rock_file(tmp_path / "rocks.json", ROCKS)}}
    sets["absent"] = {"rock_set": rock_file(tmp_path / "absent.json", [1])}  # which no rollout has
    lines = {name: record(tokenizer, tmp_path, **given).state.log_history[0] for name, given in sets.items()}
    plain, shown, absent = lines.values()
    for name in ("loss", "kl/mean"):
        assert shown[name] == absent[name] == pytest.approx(plain[name], rel=1e-5)
    assert {"rock/token_share", "rock/mean_kl", "rock/kl_share", "other/mean_kl"} <= shown.keys() - plain.keys()
    assert not any(name.startswith("control/") for name in shown)
    assert absent["rock/token_share"] == 0.0
    assert "rock/mean_kl" not in absent


def test_each_of_several_evaluation_sets_has_its_own_metrics(tmp_path):
    sets = {"a": make_dataset(2, chat=False), "b": make_dataset(5, chat=False)}
    trainer = build(tmp_path, eval_dataset=sets)
    trainer.evaluate()
    both = {name: value for line in trainer.state.log_history for name, value in line.items()}
    for name in sets:
        assert both[f"eval_{name}_kl/mean"] == pytest.approx(both[f"eval_{name}_loss"], rel=1e-6)
    assert both["eval_a_kl/mean"] != both["eval_b_kl/mean"]
    alone = build(tmp_path, eval_dataset=sets["a"]).evaluate()
    assert alone["eval_kl/mean"] == both["eval_a_kl/mean"]


def test_prediction_repeats_an_evaluation_and_changes_neither_the_next_one_nor_the_training_rng(tmp_path):
    trainer = build(tmp_path, eval_dataset=make_dataset(3))
    state = torch.get_rng_state()
    evaluated = trainer.evaluate()
    assert trainer.predict(make_dataset(7)).metrics["test_loss"] != evaluated["eval_loss"]
    for _ in range(2):
        predicted = trainer.predict(make_dataset(3)).metrics
        for name in ("loss", "kl/mean", "entropy", "completions/repetition"):
            assert predicted[f"test_{name}"] == evaluated[f"eval_{name}"]
    assert not [name for name in predicted if name.startswith("eval_")]
    assert trainer.evaluate()["eval_loss"] == evaluated["eval_loss"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_ten_steps_skipped_by_the_gradient_scaler_stop_the_run(tmp_path):
    class Overflows(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer._is_overflow = state.global_step < self.until  # Accelerate sets this for fp16's scaler

    overflows = Overflows()
    trainer = build(tmp_path, max_steps=11, max_completion_length=2, callbacks=[overflows])
    overflows.until = 9
    trainer.train()
    assert trainer.state.global_step == 11
    overflows.until = 10
    with pytest.raises(ValueError, match=r"Step 10: the gradients of the last 10 steps overflowed in float16"):
        trainer.train()


# Frozen positions


def test_frozen_positions_are_in_the_metrics_of_steps_that_measure_them(tokenizer, tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", ROCKS)
    changes = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 3}
    trainer = record(tokenizer, tmp_path, make_dataset(24), token_weighting="rock", rock_set=rocks, **changes)
    assert len(trainer.batches) == 6
    shares, counts = [], []
    for *_, batch in trainer.batches:
        ids = batch["completion_ids"][batch["completion_mask"].bool()]
        shares.append(torch.isin(ids, torch.tensor(ROCKS)).double().mean().item())
        counts.append(len(ids))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line, window in zip(lines, (slice(0, 3), slice(3, 6)), strict=True):
        assert line["rock/token_share"] == pytest.approx(shares[window][-1])  # of the step that was measured
        everywhere = np.average(shares[window], weights=counts[window])
        assert line["weight/zero_share"] == pytest.approx(everywhere)  # of every step
        assert line["rock/mean_kl"] > 0


# Random weights


@pytest.mark.slow
def test_random_weighting_draws_the_share_of_rocks_and_repeats_its_draw(tokenizer, tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", ROCKS[:4])  # 4 rocks of count 10 in 100 tokens
    for split in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        settings = {"token_weighting": "random", "rock_set": rocks, "generation_kwargs": GREEDY, **split}
        for _, step, _, batch in record(tokenizer, tmp_path, **settings).batches:
            mask = batch["completion_mask"].bool()
            expected = random_weights(mask, share=0.4, rock_weight=0.0, seed=7, step=step)
            assert torch.equal(batch["weights"], expected)


def test_random_weights_are_uniform_and_independent_and_leave_the_rng_unchanged():
    mask = torch.ones(200, 300, dtype=torch.bool)
    state = torch.get_rng_state()
    draws = [
        random_weights(mask, share=0.3, rock_weight=0.0, seed=seed, step=step) == 0
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for draw in draws:
        assert draw.double().mean().item() == pytest.approx(0.3, abs=0.01)
        assert draw.double().mean(0).std() < 0.05  # each place: 0.3 +- sqrt(0.3 x 0.7 / 200) = 0.032
        assert draw.double().mean(1).std() < 0.05
    for one, other in itertools.combinations(draws, 2):
        assert (one & other).double().mean().item() == pytest.approx(0.09, abs=0.01)
    shifted = random_weights(mask[5:], share=0.3, rock_weight=0.0, seed=0, step=0, first_rollout=5) == 0
    assert torch.equal(shifted, draws[0][5:])
    assert not random_weights(~mask, share=1.0, rock_weight=0.5, seed=0, step=0).any()


def test_plain_text_dataset_with_other_columns_trains(tokenizer, tmp_path):
    dataset = Dataset.from_dict({"prompt": ["Add 3 and 4."] * 4, "other": [1, 2, 3, 4]})
    assert record(tokenizer, tmp_path, dataset).state.global_step == 2
