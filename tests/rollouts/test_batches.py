"""Micro-batches: every rollout once, no padding beyond its own, and the loss of TRL's split."""

import copy
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
from tests.helpers.tiny import make_config, make_dataset, make_model
from tests.helpers.trainers import ROCKS, record


def rollouts_of(batches) -> list[tuple]:
    """Return what is known of each rollout without its padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["prompt_ids"])):
            kept = batch["completion_mask"][row].bool()
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            parts = [batch[name][row][kept] for name in ("completion_ids", "weights", "tool_mask") if name in batch]
            found.append((tuple(prompt.tolist()), *(tuple(part.tolist()) for part in parts)))
    return found


@settings(deadline=None)
@given(lengths=LENGTHS, steps=st.integers(1, 4), multiple=st.sampled_from([None, 1, 4, 64]), tools=st.booleans())
def test_every_rollout_is_in_one_micro_batch_with_no_padding_but_its_own(lengths, steps, multiple, tools):
    batches = split(lengths, steps, tools=tools)
    before = copy.deepcopy(batches)
    tight = tight_micro_batches(batches, multiple)
    assert sorted(rollouts_of(tight)) == sorted(rollouts_of(before))
    assert [len(batch["prompt_ids"]) for batch in tight] == [len(lengths)] * steps
    assert all(batch["num_items_in_batch"] == 77 for batch in tight)
    for batch in tight:
        for name, width in (("prompt", 12), ("completion", 15)):
            longest = int(batch[f"{name}_mask"].sum(1).max())
            rounded = longest if multiple is None else -(-longest // multiple) * multiple
            assert batch[f"{name}_ids"].shape[1] == batch[f"{name}_mask"].shape[1] == min(rounded, width)
        assert batch["weights"].shape == batch["completion_ids"].shape
    totals = [sum(len(part) for part in rollout[:2]) for rollout in rollouts_of(tight)]
    assert totals == sorted(totals, reverse=True)
    assert all(torch.equal(batch[key], old[key]) for batch, old in zip(batches, before, strict=True) for key in old)


@settings(deadline=None)
@given(lengths=LENGTHS, tools=st.booleans())
def test_positions_are_those_of_the_loss_mask_in_order(lengths, tools):
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
    moved = {}
    student = make_model(family, seed=0)
    if family == "qwen3":
        with torch.no_grad():  # some rollouts end early
            student.lm_head.weight[2] *= 4
    for micro_batching in ("trl", "tight"):
        config = make_config(
            tmp_path,
            micro_batching=micro_batching,
            rock_set=rock_file(tmp_path / "rocks.json", ROCKS),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_completion_length=24,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            disable_dropout=True,
            **weighting,
        )
        models = copy.deepcopy(student), make_model(family, seed=1)
        trainer = OPDTrainer(*models, config, make_dataset(), processing_class=tokenizer)
        trainer.train()
        old = dict(student.named_parameters())
        moved[micro_batching] = {
            name: p.detach() - old[name].detach() for name, p in trainer.model.named_parameters()
        } | {"line": torch.tensor([trainer.state.log_history[0][name] for name in ("loss", "kl/mean", "rock/mean_kl")])}
    assert reference.relative_error(moved["tight"], moved["trl"]) < 1e-5


@pytest.mark.slow
def test_tight_micro_batches_are_the_default_and_pad_less(tokenizer, tmp_path):
    shares = {}
    for changes in ({}, {"micro_batching": "trl"}):
        student = make_model(seed=0)
        with torch.no_grad():
            student.lm_head.weight[2] *= 4
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_completion_length": 24}
        trainer = record(tokenizer, tmp_path, student=student, max_steps=1, **settings, **changes)
        shares[trainer.args.micro_batching] = trainer.state.log_history[0]["batch/padding_share"]
    assert shares["tight"] == 0.0  # a micro-batch of one rollout has no padding
    assert shares["trl"] > 0.1


def test_the_longest_micro_batch_comes_first(tokenizer, tmp_path):
    seen = []

    class Watch(OPDTrainer):
        def _get_last_hidden_state(self, model, input_ids, *rest, **kwargs):
            if model is not self.teacher_model:
                seen.append(input_ids.shape[1])
            return super()._get_last_hidden_state(model, input_ids, *rest, **kwargs)

    student = make_model(seed=0)
    with torch.no_grad():
        student.lm_head.weight[2] *= 4
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_completion_length": 24}
    config = make_config(tmp_path, max_steps=1, **settings)
    Watch(student, make_model(seed=1), config, make_dataset(), processing_class=tokenizer).train()
    assert len(seen) == 8
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1]


@pytest.mark.slow
def test_an_evaluation_in_the_middle_of_a_step_leaves_its_micro_batches_alone(tokenizer, tmp_path):
    class EvaluateBetween(TrainerCallback):
        def on_substep_end(self, *_, **__):
            trainer.evaluate()

    found = []
    for callbacks in ([], [EvaluateBetween()]):
        config = make_config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
        models = make_model(seed=0), make_model(seed=1)
        trainer = OPDTrainer(*models, config, make_dataset(), make_dataset(3), tokenizer, callbacks)
        trainer.train()
        found.append(dict(trainer.model.named_parameters()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("measure_frozen", [False, True])
def test_nothing_between_two_logs_waits_for_the_device(measure_frozen):
    # Tensors on "meta" have shapes and no values: whatever would have to look at one fails.
    hidden = [torch.empty(6, width, device="meta") for width in (8, 12)]
    hidden[0].requires_grad_()
    heads = [LMHead(torch.empty(50, width, device="meta")) for width in (8, 12)]
    ids, weights = torch.empty(6, dtype=torch.long, device="meta"), torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 1.0])
    loss, signals = loss_and_signals(
        HiddenStates(*hidden, *heads),
        ids,
        weights,
        torch.empty((), device="meta"),
        measure_frozen=measure_frozen,
        beta=1.0,
        temperature=1.0,
    )
    loss.backward()
    figures = MetricSums(torch.zeros(50, dtype=torch.long), torch.device("meta"))
    figures.add_forward(torch.empty(2, 5, device="meta"))
    figures.add_signals(signals, measure_frozen)
    TokenStats(50, {"divergence": "reverse_kl"}, "meta").update(signals)
    FiniteGuard(SimpleNamespace(device=torch.device("meta"))).note(
        signals.entropy, signals.divergence, measure_frozen | (weights != 0)
    )
    with pytest.raises(RuntimeError, match="meta"):
        loss.detach().item()  # the check can fail


def test_a_rollout_is_truncated_when_it_ends_in_no_stop():
    ids = torch.tensor([[5, 2, 0], [5, 6, 7], [5, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    assert is_truncated(ids, mask, [2]).tolist() == [False, True, True]


def test_completions_are_without_padding_and_those_without_a_position_are_left_out():
    batch = {
        "completion_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 2], [4, 2, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]),
    }
    assert completions_of(batch) == [[5, 6], [7, 8, 9, 2]]
