"""Rollouts from transformers' continuous batching: the same tokens as from `generate`, or a one-line error."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_opd import OPDConfig
from trl_opd.rollouts.continuous_batching import engine_config

from tests.helpers import trainers
from tests.helpers.tiny import FOUR_BIT, config_kwargs, make_dataset, make_model, save

ENGINE = {"use_transformers_continuous_batching": True}
GREEDY = {"generation_kwargs": {"do_sample": False}}
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]]


@pytest.fixture
def build(tokenizer, tmp_path):
    """Build a trainer that samples with the engine."""

    def build(**changes):
        return trainers.build(tmp_path, tokenizer=tokenizer, eval_dataset=make_dataset(3), **ENGINE | changes)

    return build


def rollouts_of(trainer) -> list[list[int]]:
    return trainer._generate_single_turn([list(ids) for ids in PROMPTS], None, {})


def student_of(kind: str, tmp_path) -> dict:
    if kind == "absolute positions":
        return {"student": make_model("gpt2")}
    if kind == "full":
        return {}
    adapter = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
    if kind == "LoRA":
        return adapter
    quantization = BitsAndBytesConfig(**FOUR_BIT)
    return adapter | {"student": save(tmp_path / "student", seed=0), "quantization_config": quantization}


@pytest.mark.parametrize("kind", ["full", "absolute positions", "LoRA", "QLoRA"])
@pytest.mark.slow
def test_greedy_rollouts_equal_those_of_generate_and_the_student_is_unchanged(build, tmp_path, kind):
    found = []
    for engine in (False, True):
        torch.manual_seed(0)
        changes = student_of(kind, tmp_path)
        trainer = build(**changes, **GREEDY, use_transformers_continuous_batching=engine)
        model = trainer.model.train()
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        attention = model.config._attn_implementation
        found.append(rollouts_of(trainer))
        assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
        assert model.config._attn_implementation == attention
        assert model.training
    assert found[0] == found[1]
    assert max(map(len, found[0])) > 1


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
@pytest.mark.slow
def test_adapter_is_trained_on_these_rollouts(build, tmp_path, kind):
    trainer = build(**student_of(kind, tmp_path), max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert not all(torch.equal(after[name], old) for name, old in before.items())
    assert {"kl/mean", "completions/mean_length"} <= trainer.state.log_history[0].keys()


@pytest.mark.slow
def test_run_samples_the_same_rollouts_again_and_different_ones_in_each_step(build):
    seen = []
    for _ in range(2):
        trainer = build(cls=trainers.Recorder)
        trainer.train()
        seen.append([batch["completion_ids"].tolist() for *_, batch in trainer.batches])
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]


@pytest.mark.slow
def test_ids_that_the_teacher_lacks_are_not_sampled(build, tmp_path):
    student = make_model(seed=0, rows=320)
    with torch.no_grad():
        student.lm_head.weight[300:] = student.lm_head.weight[:20] * 10
    rollouts = rollouts_of(build(student=student, teacher=save(tmp_path / "teacher", seed=1)))
    assert 0 < max(map(max, rollouts)) < 300


@pytest.mark.slow
def test_temperature_top_k_top_p_and_min_p_are_applied(build):
    greedy = rollouts_of(build(**GREEDY))
    for setting in ({"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert rollouts_of(build(**setting)) == greedy


@pytest.mark.slow
def test_evaluation_samples_with_its_own_random_state(build):
    trainer = build()
    state = torch.get_rng_state()
    losses = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "NoRepeatNGramLogitsProcessor"),
        ({"generation_kwargs": {"num_beams": 2}}, "beam_sample"),
        ({"generation_kwargs": {"min_new_tokens": 3}}, "MinNewTokensLengthLogitsProcessor"),
        ({"generation_kwargs": {"stop_strings": ["x"]}}, "stop_strings"),
    ],
)
def test_generation_setting_that_the_engine_does_not_apply_is_an_error(build, changes, named):
    with pytest.raises(ValueError, match=f"Continuous batching does not apply .*{named}"):
        rollouts_of(build(**changes))


def test_such_a_setting_of_the_students_generation_config_is_an_error(build):
    student = make_model(seed=0)
    student.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(ValueError, match="NoRepeatNGramLogitsProcessor"):
        rollouts_of(build(student=student))


def test_lost_rollout_is_an_error(build):
    small = {"num_blocks": 1, "page_size": 4, "max_batch_tokens": 4}
    with pytest.raises(RuntimeError, match=r"Continuous batching lost [1-3] of 3 rollouts"):
        rollouts_of(build(transformers_continuous_batching_config=small))


@pytest.mark.parametrize("where", ["nan", "inf"])
def test_student_with_nan_or_infinite_logits_is_an_error(build, where):
    student = trainers.broken(make_model(seed=0), where)
    with pytest.raises(ValueError, match="Step 1: the student's logits are not finite"):
        rollouts_of(build(student=student))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**ENGINE, "use_vllm": True}, "choose one"),
        ({"transformers_continuous_batching_config": {"page_size": 64}}, "has no effect without"),
    ],
)
def test_contradicting_options_are_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        OPDConfig(**config_kwargs(tmp_path, **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pages": 1}, "pages"),
        ([1], "takes a dictionary"),
        ({"page_size": 0}, "page_size must be a whole number of at least 4"),
        ({"num_blocks": "x"}, "num_blocks must be a whole number of at least 1"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1"),
        ({"max_batch_tokens": True}, "max_batch_tokens must be a whole number"),
        ({"max_memory_percent": "x"}, r"max_memory_percent must be a number in \(0, 1\]"),
        ({"max_memory_percent": 90}, r"max_memory_percent must be a number in \(0, 1\]"),
        ({"scheduler_type": "lifo"}, "scheduler_type must be one of 'fifo', 'prefill_first'"),
    ],
)
def test_invalid_setting_of_the_engine_is_a_one_line_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        OPDConfig(**config_kwargs(tmp_path, **ENGINE, transformers_continuous_batching_config=settings))
    assert "\n" not in str(caught.value)


def test_engine_settings_may_be_json_and_by_default_leave_memory_for_training():
    config = OPDConfig(**config_kwargs("nowhere", **ENGINE, transformers_continuous_batching_config='{"page_size": 8}'))
    model = make_model(seed=0)
    engine = engine_config(model, config.transformers_continuous_batching_config, PROMPTS, 12)
    assert engine.page_size == 8
    assert engine.max_memory_percent == 0.5
    assert engine.num_blocks == 2 + 2 + 3  # 15, 14 and 18 tokens
    assert not engine.auto_switch_to_flash
    assert engine_config(model, {"num_blocks": 5, "auto_switch_to_flash": True}, PROMPTS, 12).num_blocks == 5
