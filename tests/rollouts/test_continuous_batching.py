"""Rollouts from transformers' continuous batching engine: the same tokens as from `generate`, or a sentence."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_opd import OPDConfig
from trl_opd.rollouts.continuous_batching import engine_config

from tests.helpers import trainers
from tests.helpers.tiny import FOUR_BIT, config_kwargs, make_dataset, make_model, save

ADAPTER = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
ENGINE = {"use_transformers_continuous_batching": True}
GREEDY = {"generation_kwargs": {"do_sample": False}}
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]]


def build(tokenizer, path, **changes):
    return trainers.build(path, tokenizer=tokenizer, eval_dataset=make_dataset(3), **changes)


def rollouts_of(trainer) -> list[list[int]]:
    return trainer._generate_single_turn([list(ids) for ids in PROMPTS], None, {})


def students(tmp_path) -> dict:
    quantised = {"quantization_config": BitsAndBytesConfig(**FOUR_BIT), "peft_config": ADAPTER}
    return {
        "full": lambda: {"student": make_model(seed=0)},
        "absolute positions": lambda: {"student": make_model("gpt2", seed=0)},
        "LoRA": lambda: {"student": make_model(seed=0), "peft_config": ADAPTER},
        "QLoRA": lambda: {"student": save(tmp_path / "student", seed=0), **quantised},
    }


@pytest.mark.parametrize("kind", ["full", "absolute positions", "LoRA", "QLoRA"])
@pytest.mark.slow
def test_greedy_rollouts_are_those_of_generate_and_the_student_stays_as_it_was(tokenizer, tmp_path, kind):
    found = []
    for engine in ({}, ENGINE):
        torch.manual_seed(0)
        trainer = build(tokenizer, tmp_path, **students(tmp_path)[kind](), **GREEDY, **engine)
        trainer.model.train()
        dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
        attention = trainer.model.config._attn_implementation
        found.append(rollouts_of(trainer))
        assert {name: parameter.dtype for name, parameter in trainer.model.named_parameters()} == dtypes
        assert trainer.model.config._attn_implementation == attention
        assert trainer.model.training
    assert found[0] == found[1]
    assert max(map(len, found[0])) > 1


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
@pytest.mark.slow
def test_an_adapter_trains_on_these_rollouts(tokenizer, tmp_path, kind):
    torch.manual_seed(0)
    trainer = build(tokenizer, tmp_path, **students(tmp_path)[kind](), **ENGINE)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    ]
    assert moved
    assert {"kl/mean", "completions/mean_length"} <= trainer.state.log_history[0].keys()


@pytest.mark.slow
def test_a_run_draws_the_same_rollouts_again_and_different_ones_in_each_step(tokenizer, tmp_path):
    seen = []
    for _ in range(2):
        trainer = build(tokenizer, tmp_path, **ENGINE)
        original, drawn = trainer._generate_single_turn, []

        def keep(*args, original=original, drawn=drawn, **kwargs):
            drawn.append(original(*args, **kwargs))
            return drawn[-1]

        trainer._generate_single_turn = keep
        trainer.train()
        seen.append(drawn)
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]


@pytest.mark.slow
def test_ids_that_the_teacher_lacks_are_not_sampled(tokenizer, tmp_path):
    student = make_model(seed=0, rows=320)
    with torch.no_grad():
        student.lm_head.weight[300:] = student.lm_head.weight[:20] * 10
    trainer = build(tokenizer, tmp_path, student=student, teacher=save(tmp_path / "teacher", seed=1), **ENGINE)
    ids = [id for row in rollouts_of(trainer) for id in row]
    assert ids
    assert max(ids) < 300


@pytest.mark.slow
def test_temperature_and_the_cuts_of_the_distribution_are_applied(tokenizer, tmp_path):
    cold = {"temperature": 1e-3}
    assert rollouts_of(build(tokenizer, tmp_path, **ENGINE, **cold)) == rollouts_of(
        build(tokenizer, tmp_path, **ENGINE, **GREEDY)
    )
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert rollouts_of(build(tokenizer, tmp_path, **ENGINE, **cut)) == rollouts_of(
            build(tokenizer, tmp_path, **ENGINE, **GREEDY)
        )


@pytest.mark.slow
def test_evaluation_draws_from_its_own_stream(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, **ENGINE)
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
def test_what_the_engine_would_leave_out_is_refused(tokenizer, tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"Continuous batching does not apply .*{named}"):
        rollouts_of(build(tokenizer, tmp_path, **ENGINE, **changes))


def test_what_the_students_own_configuration_asks_for_is_refused_too(tokenizer, tmp_path):
    student = make_model(seed=0)
    student.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(ValueError, match="NoRepeatNGramLogitsProcessor"):
        rollouts_of(build(tokenizer, tmp_path, student=student, **ENGINE))


def test_a_lost_rollout_is_an_error(tokenizer, tmp_path):
    small = {"transformers_continuous_batching_config": {"num_blocks": 1, "page_size": 4, "max_batch_tokens": 4}}
    with pytest.raises(RuntimeError, match=r"Continuous batching lost [1-3] of 3 rollouts"):
        rollouts_of(build(tokenizer, tmp_path, **ENGINE, **small))


@pytest.mark.parametrize("where", [float("nan"), float("inf")])
def test_a_student_that_is_not_finite_is_named(tokenizer, tmp_path, where):
    student = make_model(seed=0)
    with torch.no_grad():
        student.lm_head.weight[5] = where
    with pytest.raises(ValueError, match="Step 1: the student's logits are not finite"):
        rollouts_of(build(tokenizer, tmp_path, student=student, **ENGINE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**ENGINE, "use_vllm": True}, "choose one"),
        ({"transformers_continuous_batching_config": {"page_size": 64}}, "has no effect without"),
        *(
            ({**ENGINE, "transformers_continuous_batching_config": given}, message)
            for given, message in (
                ({"pages": 1}, "pages"),
                ([1], "takes a dictionary"),
                ({"page_size": 0}, "page_size must be a whole number of at least 4"),
                ({"num_blocks": "x"}, "num_blocks must be a whole number of at least 1"),
                ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1"),
                ({"max_batch_tokens": True}, "max_batch_tokens must be a whole number"),
                ({"max_memory_percent": "x"}, r"max_memory_percent must be a number in \(0, 1\]"),
                ({"max_memory_percent": 90}, r"max_memory_percent must be a number in \(0, 1\]"),
                ({"scheduler_type": "lifo"}, "scheduler_type must be one of 'fifo', 'prefill_first'"),
            )
        ),
    ],
)
def test_settings_that_contradict_each_other_are_a_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        OPDConfig(**config_kwargs(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_configuration_may_be_json_and_leaves_memory_to_the_training():
    config = OPDConfig(**config_kwargs("nowhere", **ENGINE, transformers_continuous_batching_config='{"page_size": 8}'))
    model = make_model(seed=0)
    engine = engine_config(model, config.transformers_continuous_batching_config, PROMPTS, 12)
    assert (engine.page_size, engine.max_memory_percent) == (8, 0.5)
    assert engine.num_blocks == 2 + 2 + 3  # 15, 14 and 18 tokens
    assert not engine.auto_switch_to_flash
    assert engine_config(model, {"num_blocks": 5, "auto_switch_to_flash": True}, PROMPTS, 12).num_blocks == 5
