"""Micro-batches: every rollout once, little padding, and the loss of TRL's micro-batches."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from trl_opd import OPDTrainer, TokenStats
from trl_opd.loss.divergence import loss_and_signals
from trl_opd.loss.lm_head import LMHead
from trl_opd.loss.signals import HiddenStates
from trl_opd.rollouts.batches import completions_of, is_truncated, locate_loss_positions, loss_mask, tight_micro_batches
from trl_opd.training.finite import FiniteGuard
from trl_opd.training.metrics import MetricSums

from tests.helpers import reference
from tests.helpers.padded_rollouts import LENGTHS, split
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_dataset, make_model
from tests.helpers.trainers import ROCKS, build

SINGLE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
SINGLE |= {"max_completion_length": 24, "max_steps": 1}


def student_that_ends() -> torch.nn.Module:
    """Return a model some of whose rollouts end before the length limit."""
    student = make_model(seed=0)
    with torch.no_grad():
        student.lm_head.weight[2] *= 4
    return student


def rollouts_of(batches) -> list[tuple]:
    """Return prompt, completion, weights and tool mask of each rollout, without padding."""
    found = []
    for batch in batches:
        is_prompt = batch["prompt_mask"].bool()
        is_completion = batch["completion_mask"].bool()
        for row in range(len(is_prompt)):
            parts = [batch["prompt_ids"][row][is_prompt[row]]]
            for name in ("completion_ids", "weights", "tool_mask"):
                if name in batch:
                    parts.append(batch[name][row][is_completion[row]])
            found.append(tuple(tuple(part.tolist()) for part in parts))
    return found


@settings(deadline=None)
@given(lengths=LENGTHS, steps=st.integers(1, 4), multiple=st.sampled_from([None, 1, 4, 64]), tools=st.booleans())
def test_tight_micro_batches_have_every_rollout_once_and_little_padding(lengths, steps, multiple, tools):
    batches = split(lengths, steps, tools=tools)
    before = copy.deepcopy(batches)
    tight = tight_micro_batches(batches, multiple)
    found = rollouts_of(tight)
    assert sorted(found) == sorted(rollouts_of(before))
    totals = [len(prompt) + len(completion) for prompt, completion, *_ in found]
    assert totals == sorted(totals, reverse=True)
    assert [len(batch["prompt_ids"]) for batch in tight] == [len(lengths)] * steps
    for batch in tight:
        assert batch["num_items_in_batch"] == 77
        for name, width in (("prompt", 12), ("completion", 15)):
            longest = int(batch[f"{name}_mask"].sum(1).max())
            rounded = math.ceil(longest / (multiple or 1)) * (multiple or 1)
            assert batch[f"{name}_ids"].shape[1] == batch[f"{name}_mask"].shape[1] == min(rounded, width)
        assert batch["weights"].shape == batch["completion_ids"].shape
    for batch, old in zip(batches, before, strict=True):
        torch.testing.assert_close(batch, old, rtol=0, atol=0)


@settings(deadline=None)
@given(lengths=LENGTHS, tools=st.booleans())
def test_loss_positions_are_those_of_the_loss_mask_in_order(lengths, tools):
    (batch,) = split(lengths, 1, tools=tools)
    located = locate_loss_positions(batch)
    mask = loss_mask(batch)
    assert torch.equal(batch["completion_ids"].flatten()[located["positions"]], batch["completion_ids"][mask])
    assert torch.equal(located["position_weights"], batch["weights"][mask])
    without = {key: value for key, value in batch.items() if key != "weights"}
    assert torch.equal(locate_loss_positions(without)["position_weights"], torch.ones(int(mask.sum())))


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("weighting", [{}, {"token_weighting": "rock", "rock_weight": 0.25, "rock_window": 1}])
@pytest.mark.slow
def test_a_step_of_tight_micro_batches_is_that_of_trls(tokenizer, tmp_path, family, weighting):
    settings = {
        "gradient_accumulation_steps": 4,
        "max_completion_length": 24,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "disable_dropout": True,
        "rock_set": rock_file(tmp_path / "rocks.json", ROCKS),
        **weighting,
    }
    moved = {}
    for micro_batching in ("trl", "tight"):
        student = student_that_ends() if family == "qwen3" else make_model(family, seed=0)
        old = copy.deepcopy(student.state_dict())
        teacher = make_model(family, seed=1)
        trainer = build(tmp_path, student, teacher, tokenizer, micro_batching=micro_batching, **settings)
        trainer.train()
        found = {name: value - old[name] for name, value in trainer.model.state_dict().items()}
        line = trainer.state.log_history[0]
        found["log"] = torch.tensor([line["loss"], line["kl/mean"], line["rock/mean_kl"]])
        moved[micro_batching] = found
    assert reference.relative_error(moved["tight"], moved["trl"]) < 1e-5


@pytest.mark.slow
def test_default_micro_batches_pad_less_than_trls(tokenizer, tmp_path):
    shares = {}
    for changes in ({}, {"micro_batching": "trl"}):
        trainer = build(tmp_path, student_that_ends(), tokenizer=tokenizer, **SINGLE, **changes)
        trainer.train()
        shares[trainer.args.micro_batching] = trainer.state.log_history[0]["batch/padding_share"]
    assert shares["tight"] == 0.0  # a micro-batch of one rollout has no padding
    assert shares["trl"] > 0.1


def test_longest_micro_batch_comes_first(tokenizer, tmp_path):
    seen = []

    class Watch(OPDTrainer):
        def _get_last_hidden_state(self, model, input_ids, *rest, **kwargs):
            if model is not self.teacher_model:
                seen.append(input_ids.shape[1])
            return super()._get_last_hidden_state(model, input_ids, *rest, **kwargs)

    trainer = build(tmp_path, student_that_ends(), tokenizer=tokenizer, cls=Watch, **SINGLE)
    seen.clear()  # the trainer compares the models with themselves when it is built
    trainer.train()
    assert len(seen) == 8
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1]


@pytest.mark.slow
def test_evaluation_in_the_middle_of_a_step_does_not_change_its_micro_batches(tokenizer, tmp_path):
    class EvaluateBetween(TrainerCallback):
        def on_substep_end(self, *_, **__):
            trainer.evaluate()

    found = []
    for callbacks in ([], [EvaluateBetween()]):
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "callbacks": callbacks}
        trainer = build(tmp_path, tokenizer=tokenizer, eval_dataset=make_dataset(3), **settings)
        trainer.train()
        found.append(trainer.model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("measure_frozen", [False, True])
def test_host_does_not_wait_for_the_device_between_two_logs(measure_frozen):
    # Tensors on "meta" have shapes and no values, so code that reads a value fails.
    meta = torch.device("meta")
    student = torch.empty(6, 8, device=meta, requires_grad=True)
    teacher = torch.empty(6, 12, device=meta)
    heads = [LMHead(torch.empty(50, width, device=meta)) for width in (8, 12)]
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 1.0])
    loss, signals = loss_and_signals(
        HiddenStates(student, teacher, *heads),
        torch.empty(6, dtype=torch.long, device=meta),
        weights,
        torch.empty((), device=meta),
        measure_frozen=measure_frozen,
        beta=1.0,
        temperature=1.0,
    )
    loss.backward()
    metrics = MetricSums(torch.zeros(50, dtype=torch.long), meta)
    metrics.add_forward(torch.empty(2, 5, device=meta))
    metrics.add_signals(signals, measure_frozen)
    TokenStats(50, {"divergence": "reverse_kl"}, "meta").update(signals)
    guard = FiniteGuard(SimpleNamespace(device=meta))
    guard.note(signals.entropy, signals.divergence, measure_frozen | (weights != 0))
    with pytest.raises(RuntimeError, match="meta"):
        loss.detach().item()  # reading a value does fail


def test_rollout_is_truncated_if_it_does_not_end_in_a_stop_token():
    ids = torch.tensor([[5, 2, 0], [5, 6, 7], [5, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    assert is_truncated(ids, mask, [2]).tolist() == [False, True, True]


def test_completions_have_no_padding_and_at_least_one_loss_position():
    batch = {
        "completion_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 2], [4, 2, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]),
    }
    assert completions_of(batch) == [[5, 6], [7, 8, 9, 2]]
