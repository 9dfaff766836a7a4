"""OPDTrainer with mixed models, on both paths of the loss, and with ids outside the shared vocabulary."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from trl_opd.models.quantised import keep_4bit_layout

from tests.helpers import reference
from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.tiny import (
    AS_TRL,
    FOUR_BIT,
    make_model,
    make_tokenizer,
    save,
)
from tests.helpers.trainers import assert_close, build, loss_and_gradient, reference_of

ADAPTER = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
QUANTISED = {"quantization_config": BitsAndBytesConfig(**FOUR_BIT), "peft_config": ADAPTER}


# Both paths of the loss: TRL's (without statistics) and ours (with them)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
        {"teacher_model_init_kwargs": {"quantization_config": FOUR_BIT}},
        {"model_init_kwargs": {"dtype": "bfloat16"}},
        QUANTISED,
        {"gradient_checkpointing": True, "peft_config": ADAPTER},
    ],
    ids=["bfloat16 teacher", "4-bit teacher", "bfloat16 student", "QLoRA student", "LoRA with checkpointing"],
)
@pytest.mark.slow
def test_our_loss_equals_trls_for_mixed_precision_and_adapters(tmp_path, changes):
    paths = save(tmp_path / "student", seed=0), save(tmp_path / "teacher", seed=1)
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        trainer = build(tmp_path, *paths, **changes, **({} if own else AS_TRL))
        assert trainer._uses_trl_loss != own
        if trainer.args.gradient_checkpointing:  # as Trainer does it, inside `train`
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        found.append(loss_and_gradient(trainer, make_inputs()))
    assert found[0][0] > 0.5
    # Padding changes bfloat16 rounding, and TRL rounds the gradient of the logits to the student's dtype. The gradient
    # of a bfloat16 student is 0.024 from the float64 reference in TRL and 0.023 here. QLoRA's adapters are bfloat16.
    (loss, gradients), expected = found[1], found[0]
    rounding = 1e-2 if "bfloat16" in str(changes) else 1e-5
    of_gradients = {torch.bfloat16: 3e-2, torch.float32: rounding}
    assert loss == pytest.approx(expected[0], rel=rounding)
    dtype = next(iter(gradients.values())).dtype
    assert reference.relative_error(gradients, expected[1]) < of_gradients[dtype]


def test_four_bit_teacher_can_be_an_object(tmp_path):
    path, quantised = save(tmp_path / "teacher", seed=1), {"quantization_config": BitsAndBytesConfig(**FOUR_BIT)}
    teacher = AutoModelForCausalLM.from_pretrained(path, **quantised)
    losses = set()
    for given in ({"teacher": teacher}, {"teacher": path, "teacher_model_init_kwargs": quantised}):
        losses.add(loss_and_gradient(build(tmp_path, make_model(seed=0, width=64), **given), make_inputs())[0])
    assert len(losses) == 1


@pytest.mark.parametrize("settings", [{}, AS_TRL], ids=["ours", "as TRL"])
def test_the_teacher_scores_without_its_dropout(tmp_path, settings):
    teacher = make_model("gpt2", seed=1)
    assert teacher.config.resid_pdrop > 0
    trainer, inputs = build(tmp_path, teacher=teacher, **settings), make_inputs()
    assert not teacher.training
    teacher.train()  # as a callback of the user may leave it
    assert loss_and_gradient(trainer, inputs)[0] == pytest.approx(reference_of(trainer, inputs)[0], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, AS_TRL], ids=["ours", "as TRL"])
def test_loss_uses_the_head_that_peft_trains(tmp_path, settings):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    trainer, inputs = build(tmp_path, peft_config=config, **settings), make_inputs()
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(1.5)  # the copy that trains; the original stays below it
    expected = reference_of(trainer, inputs)
    loss, gradients = loss_and_gradient(trainer, inputs)
    assert_close((loss, gradients), expected)
    assert any("lm_head" in name and gradient is not None for name, gradient in gradients.items())


@pytest.mark.parametrize("inner", ["teacher", "student"])
def test_adapter_around_the_other_models_object_is_an_error(tmp_path, inner):
    base = make_model(seed=0)
    outer = get_peft_model(base, ADAPTER)
    models = {"student": outer, "teacher": base} if inner == "teacher" else {"student": base, "teacher": outer}
    with pytest.raises(ValueError, match=r"same|share"):
        build(tmp_path, **models).train()


def test_student_with_a_quantised_head_is_compared_by_its_own_logits(tmp_path):
    quantised = BitsAndBytesConfig(**FOUR_BIT, llm_int8_skip_modules=["none_of_them"])
    path, inputs = save(tmp_path / "student", seed=0), make_inputs()
    student = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantised).eval()
    assert not student.lm_head.weight.is_floating_point()
    keep_4bit_layout(student)
    rows = reference.token_divergences(student, make_model(seed=1), inputs, beta=1.0, temperature=1.0, vocab=300)
    expected = torch.stack([value for row in rows for value in row]).mean().item()
    config = LoraConfig(r=4, target_modules=["q_proj"])  # starts as the model itself
    trainer = build(tmp_path, path, make_model(seed=1), quantization_config=quantised, peft_config=config)
    loss, gradients = loss_and_gradient(trainer, inputs)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert all(gradients[name].abs().sum() > 0 for name in gradients if "lora_B" in name)


# Vocabularies


@pytest.fixture
def wider(tmp_path):
    """A tokenizer with one more token, id 300, than the teacher embeds, and the option that names the teacher's."""
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    return make_tokenizer(extra=("<|new|>",)), {"teacher_tokenizer_name_or_path": str(tmp_path / "narrow")}


def test_padding_token_that_the_teacher_lacks_does_not_change_the_loss(tmp_path, wider):
    tokenizer, changes = wider
    tokenizer.pad_token = "<|new|>"
    inputs = make_inputs()
    trainer = build(tmp_path, make_model(seed=0, rows=301), tokenizer=tokenizer, **changes)
    expected = loss_and_gradient(trainer, inputs)[0]
    padded = copy.deepcopy(inputs)
    for name in ("prompt", "completion"):
        padded[f"{name}_ids"][padded[f"{name}_mask"] == 0] = tokenizer.pad_token_id
    assert loss_and_gradient(trainer, padded)[0] == pytest.approx(expected, rel=1e-6)
    trainer.train()
    assert trainer.state.global_step == 2


def test_end_that_the_teacher_lacks_is_a_warning(tmp_path, wider):
    tokenizer, changes = wider
    tokenizer.eos_token = "<|new|>"
    student = make_model(seed=0, rows=301, eos_token_id=300)
    with pytest.warns(UserWarning, match=r"Every end of a rollout \(eos_token ids \[300\]\)"):
        build(tmp_path, student, tokenizer=tokenizer, **changes)
    student.generation_config.eos_token_id = [2, 300]  # the other end remains
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(tmp_path, student, tokenizer=tokenizer, **changes)
    assert not any("end of a rollout" in str(warning.message) for warning in caught)


def test_ids_suppressed_by_the_students_generation_config_stay_suppressed(tmp_path, wider):
    _, changes = wider
    drawn = {}
    for rows in (300, 320):
        student = make_model(seed=0, rows=rows)
        student.generation_config.suppress_tokens = [40]
        with torch.no_grad():
            student.lm_head.weight[40] *= 50
        completions = build(tmp_path, student, **changes)._generate_single_turn([[5, 6, 7]] * 4, None, {})
        drawn[rows] = sum(ids.count(40) for ids in completions)
    assert drawn[300] == 0  # TRL lets the student's own setting hold
    assert drawn[320] == 0


class Stranger(TrainerCallback):
    """A callback of another package that also has a method `attach`."""

    def attach(self):
        raise AssertionError("only callbacks of this package are attached")


def test_attach_method_of_other_callbacks_is_not_called(tmp_path):
    trainer = build(tmp_path)
    trainer.add_callback(Stranger())
    trainer.train()
    assert trainer.state.global_step == 2
