"""Whole short runs: groups of rollouts, cut rollouts, projected positions, and every metric of the log by hand."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from trl_opd import Controls
from trl_opd.loss.weights import random_weights
from trl_opd.training.metrics import repetition

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_dataset
from tests.helpers.trainers import (
    GREEDY,
    ROCKS,
    build,
    ending_student,
    loss_positions,
    measured,
    record,
    timeless,
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
    trainer = record(tokenizer, tmp_path, eval_dataset=make_dataset(3, chat=False), num_generations=4)
    trainer.evaluate()
    seen = [prompt for training, _, row, _ in trainer.batches if not training for prompt in row]
    assert sorted(seen) == sorted(make_dataset(3, chat=False)["prompt"])


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
    trainer.evaluate()
    shares = {True: {}, False: {}}
    for training, step, _, batch in trainer.batches:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            grams = [tuple(ids[mask.bool()].tolist()[place : place + 4]) for place in range(int(mask.sum()) - 3)]
            before = sum(gram in grams[:place] for place, gram in enumerate(grams))
            if grams:
                shares[training].setdefault(step // 2 if training else 0, []).append(before / len(grams))
    lines = [line["completions/repetition"] for line in trainer.state.log_history if "loss" in line]
    assert lines == pytest.approx([sum(values) / len(values) for values in shares[True].values()])
    assert max(lines) > 0
    wanted = shares[False][0] if 0 in shares[False] else next(iter(shares[False].values()))
    line = next(line for line in trainer.state.log_history if "eval_completions/repetition" in line)
    assert line["eval_completions/repetition"] == pytest.approx(sum(wanted) / len(wanted))


def test_rock_set_without_weighting_only_adds_metrics(tokenizer, tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", ROCKS)
    trainers = [record(tokenizer, tmp_path, **changes) for changes in ({}, {"rock_set": rocks})]
    plain, shown = (trainer.state.log_history[0] for trainer in trainers)
    assert shown["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert shown["kl/mean"] == pytest.approx(plain["kl/mean"], rel=1e-5)
    assert {"rock/token_share", "rock/mean_kl", "rock/kl_share", "other/mean_kl"} <= shown.keys() - plain.keys()
    assert not any(name.startswith("control/") for name in shown)


def test_each_of_several_evaluation_sets_has_its_own_metrics(tokenizer, tmp_path):
    sets = {"a": make_dataset(2, chat=False), "b": make_dataset(5, chat=False)}
    trainer = record(tokenizer, tmp_path, eval_dataset=sets, max_steps=1)
    both = trainer.evaluate() | {k: v for line in trainer.state.log_history for k, v in line.items()}
    for name in sets:
        assert both[f"eval_{name}_kl/mean"] == pytest.approx(both[f"eval_{name}_loss"], rel=1e-6)
    assert both["eval_a_kl/mean"] != both["eval_b_kl/mean"]
    alone = record(tokenizer, tmp_path, eval_dataset=sets["a"], max_steps=1).evaluate()
    assert alone["eval_kl/mean"] == both["eval_a_kl/mean"]


def test_predictions_repeat_the_metrics_of_an_evaluation_and_leave_the_training_rng_unchanged(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, max_steps=1)
    state = torch.get_rng_state()
    evaluated = trainer.evaluate(make_dataset(3))
    for _ in range(2):
        predicted = trainer.predict(make_dataset(3)).metrics
        for name in ("loss", "kl/mean", "entropy", "completions/repetition"):
            assert predicted[f"test_{name}"] == evaluated[f"eval_{name}"]
    assert not [name for name in predicted if name.startswith("eval_")]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize(("until", "max_steps"), [(9, 11), (10, 14)])
def test_ten_steps_skipped_by_the_gradient_scaler_stop_the_run(tmp_path, until, max_steps):
    class Overflows(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer._is_overflow = state.global_step < until  # Accelerate sets this for fp16's scaler

    trainer = build(tmp_path, max_steps=max_steps, max_completion_length=2, callbacks=[Overflows()])
    if until == 9:
        trainer.train()
        assert trainer.state.global_step == max_steps
    else:
        with pytest.raises(ValueError, match=r"Step 10: the gradients of the last 10 steps overflowed in float16"):
            trainer.train()


@pytest.mark.slow
def test_prediction_does_not_change_the_next_evaluation(tokenizer, tmp_path):
    trainers = [record(tokenizer, tmp_path, eval_dataset=make_dataset(3), max_steps=1) for _ in range(2)]
    predicted = trainers[0].predict(make_dataset(7)).metrics["test_loss"]
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert losses[0] == losses[1] != predicted


def test_metrics_without_positions_are_absent(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, rock_set=rock_file(tmp_path / "rocks.json", [1]))
    line = trainer.state.log_history[0]
    assert line["rock/token_share"] == 0.0
    assert "rock/mean_kl" not in line


def test_evaluation_is_never_weighted(tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", ROCKS)
    found = []
    for weighting in ({}, {"token_weighting": "rock", "rock_weight": 0.0, "rock_window": 2}):
        trainer = build(tmp_path, rock_set=rocks, eval_dataset=make_dataset(4), generation_kwargs=GREEDY, **weighting)
        found.append(timeless(trainer.evaluate()))
    assert found[0] == found[1]
    assert found[0]["eval_weight/zero_share"] == 0.0


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


# Arms


def test_control_weighting_weights_the_control_types(tokenizer, tmp_path):
    controls = Controls(ids=list(range(200, 240)), mass_ratio=1.0, matched=True)
    rocks = rock_file(tmp_path / "rocks.json", ROCKS, controls=controls)
    trainer = record(tokenizer, tmp_path, token_weighting="control", rock_weight=0.25, rock_set=rocks)
    for *_, batch in trainer.batches:
        mask = batch["completion_mask"].bool()
        chosen = torch.isin(batch["completion_ids"], torch.tensor(controls.ids))
        assert torch.equal(batch["weights"], torch.where(chosen, 0.25, 1.0) * mask)


@pytest.mark.slow
def test_random_weighting_draws_the_share_of_rocks_and_repeats_its_draw(tokenizer, tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", ROCKS[:4])  # 4 rocks of count 10 in 100 tokens
    trainers = [
        record(tokenizer, tmp_path, token_weighting="random", rock_set=rocks, generation_kwargs=GREEDY, **split)
        for split in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    ]
    for first, second in zip(trainers[0].batches, trainers[1].batches, strict=True):
        assert torch.equal(first[3]["weights"], second[3]["weights"])
        mask = first[3]["completion_mask"].bool()
        expected = random_weights(mask, share=0.4, rock_weight=0.0, seed=7, step=first[1])
        assert torch.equal(first[3]["weights"], expected)


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
