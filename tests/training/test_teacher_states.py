"""The teacher scores each batch once, in groups of similar length, as TRL does, parked or not, and is timed."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_opd import OPDTrainer
from trl_opd.models.parking import Parking
from trl_opd.rollouts.batches import left_aligned, length_groups
from trl_opd.training import teacher_states

from tests.helpers import reference
from tests.helpers.padded_rollouts import LENGTHS, make_inputs, split
from tests.helpers.tiny import AS_TRL, FOUR_BIT, make_dataset, make_model, save
from tests.helpers.trainers import (
    GREEDY,
    PARKED,
    Recorder,
    assert_close,
    build,
    ending_student,
    loss_and_gradient,
    timeless,
    trained,
)

ADAPTER = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
QUANTISED = {"quantization_config": BitsAndBytesConfig(**FOUR_BIT), "peft_config": ADAPTER}


@pytest.fixture
def forwards(monkeypatch):
    """Shapes of the teacher's forwards, as they happen."""
    shapes, original = [], OPDTrainer._get_last_hidden_state

    def watch(self, model, input_ids, *rest, **kwargs):
        if model is self.teacher_model:
            shapes.append(tuple(input_ids.shape))
        return original(self, model, input_ids, *rest, **kwargs)

    monkeypatch.setattr(OPDTrainer, "_get_last_hidden_state", watch)
    return shapes


# Groups


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), tokens=st.integers(1, 200))
def test_groups_hold_every_row_once_and_no_more_tokens_than_allowed(lengths, tokens):
    groups = length_groups(lengths, tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    flat = [lengths[row] for group in groups for row in group]
    assert flat == sorted(flat, reverse=True)
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        longest = lengths[group[0]]
        assert len(group) == 1 or len(group) * longest <= tokens
        assert not following or (len(group) + 1) * longest > tokens  # the next one had no room


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_left_aligned_rollouts_are_prompt_and_completion_without_a_gap(lengths):
    (batch,) = split(lengths, 1)
    rows = list(range(len(lengths)))[::-1]
    longest = max(p + c for p, c in lengths)
    ids, mask = left_aligned(batch, rows, longest)
    assert ids.shape == mask.shape == (len(rows), longest)
    for place, row in enumerate(rows):
        expected = torch.cat(reference.unpadded(batch, row)).tolist()
        assert ids[place, : len(expected)].tolist() == expected
        assert mask[place].tolist() == [1] * len(expected) + [0] * (longest - len(expected))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize(("tokens", "tools"), [(1, False), (20, True), (16_384, False), (16_384, True)])
def test_teacher_states_equal_those_of_each_rollout_alone(tmp_path, monkeypatch, family, tokens, tools):
    monkeypatch.setattr(teacher_states, "GROUP_TOKENS", tokens)
    teacher = make_model(family, seed=1).eval()
    trainer = build(tmp_path, teacher=teacher)
    inputs = make_inputs(tools=tools)
    states = trainer.model_pair.teacher_states.compute_states(inputs)
    for row, found in enumerate(states):
        prompt, completion = reference.unpadded(inputs, row)
        with torch.no_grad():
            hidden = teacher.base_model(input_ids=torch.cat([prompt, completion])[None]).last_hidden_state[0]
        hidden = hidden[len(prompt) - 1 : -1]
        if tools:
            hidden = hidden[inputs["tool_mask"][row][: len(completion)].bool()]
        torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)


def test_the_teacher_runs_once_per_group_and_not_once_per_micro_batch(tmp_path, forwards):
    trainer = build(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=3)
    forwards.clear()  # the trainer has compared the teacher with itself
    trainer.train()
    assert len(forwards) == 3
    assert all(shape[0] == 8 for shape in forwards)


def test_a_group_is_no_longer_than_its_longest_rollout(tmp_path, forwards, monkeypatch):
    monkeypatch.setattr(teacher_states, "GROUP_TOKENS", 100)
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_completion_length": 24}
    trainer = build(tmp_path, ending_student(), cls=Recorder, max_steps=1, **changes)
    forwards.clear()  # the trainer has compared the teacher with itself
    trainer.train()
    ((*_, batch),) = trainer.batches
    totals = (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()
    groups = length_groups(totals, 100)
    assert 1 < len(groups) < 8
    assert forwards == [(len(group), totals[group[0]]) for group in groups]


def test_scoring_each_micro_batch_gives_the_same_result_as_scoring_the_batch(tmp_path):
    found = []
    for sharded in (False, True):
        trainer = build(tmp_path)
        if sharded:
            states = trainer._teacher_states(trainer.model_pair.vocab_size, sharded=True)
            trainer.model_pair = dataclasses.replace(trainer.model_pair, teacher_states=states)
        found.append(loss_and_gradient(trainer, make_inputs()))
    assert_close(found[1], found[0])


# Parked


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "phi"])
@pytest.mark.slow
def test_run_with_a_parked_teacher_equals_the_run_with_a_resident_one(tmp_path, family):
    logs = []
    for placement in ({}, PARKED):
        settings = {"generation_kwargs": GREEDY, "eval_dataset": make_dataset(5), **placement}
        trainer = build(tmp_path, make_model(family, seed=0), make_model(family, seed=1), **settings)
        trainer.train()
        trainer.evaluate()
        logs.append([timeless(line) for line in trainer.state.log_history])
        empty = [p.numel() == 0 for p in trainer.teacher_model.parameters()]
        assert any(empty) == bool(placement)
        assert not all(empty)  # the head is here
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_qlora_student_and_a_parked_four_bit_teacher_train_evaluate_and_train_again(tmp_path):
    paths = save(tmp_path / "student", seed=0), save(tmp_path / "teacher", seed=1)
    settings = {"teacher_quantization": "4bit", "generation_kwargs": GREEDY, "eval_dataset": make_dataset(5)}
    trainer = build(tmp_path, *paths, **settings, **PARKED, **QUANTISED)
    inputs = make_inputs()
    before, _ = loss_and_gradient(trainer, dict(inputs))
    resident = build(tmp_path, *paths, **settings, **QUANTISED)
    resident.model.load_state_dict(trainer.model.state_dict(), strict=False)
    assert loss_and_gradient(resident, dict(inputs))[0] == pytest.approx(before, rel=1e-5)
    trainer.train()
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != first
    _, gradients = loss_and_gradient(trainer, dict(inputs))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_evaluation_loads_a_parked_teacher_once(tmp_path, monkeypatch):
    trainer = build(tmp_path, per_device_eval_batch_size=1, eval_dataset=make_dataset(5), **PARKED)
    left, original = [], Parking.offload
    monkeypatch.setattr(Parking, "offload", lambda self: (left.append(1), original(self)))
    trainer.evaluate()
    assert len(left) == 1
    trainer.train()
    assert len(left) == 3  # one for each step


# Time


def test_log_has_the_seconds_of_each_phase_without_those_of_an_evaluation(tmp_path):
    evaluation = {"eval_dataset": make_dataset(5), "eval_strategy": "steps", "eval_steps": 1}
    trainer = trained(tmp_path, max_steps=4, logging_steps=2, **evaluation)
    assert len(trainer._step_timer._phases) == 0
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        phases = [line[f"phase/{name}_s"] for name in ("generate", "teacher", "student")]
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(line["step_time"], rel=0.2)
    assert not [name for line in trainer.state.log_history if "eval_loss" in line for name in line if "phase" in name]


def test_teacher_inside_trls_loss_has_no_separate_time(tmp_path):
    line = trained(tmp_path, **AS_TRL).state.log_history[0]
    assert {"phase/generate_s", "phase/student_s"} <= line.keys()
    assert "phase/teacher_s" not in line
    assert json.dumps(line)
