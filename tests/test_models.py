"""OPDTrainer with each type of student and teacher, and with two vocabulary sizes of one tokenizer."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_opd import OPDConfig, OPDTrainer

from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.tiny import (
    FOUR_BIT,
    config_kwargs,
    make_dataset,
    make_model,
    make_tokenizer,
    save,
    swapped_tokenizer,
)
from tests.helpers.trainers import Recorder, assert_close, build, loss_and_gradient, reference_of

LORA = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    """Folders of a student and a teacher with their tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "student", seed=0), save(folder / "teacher", seed=1)


def movement(trainer) -> dict[str, torch.Tensor]:
    """Train, and return by how much every parameter of the student that can move has moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    teacher = {name: p.detach().clone() for name, p in trainer.teacher_model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, teacher[name]) for name, p in trainer.teacher_model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher_model.parameters())
    return {name: (p.detach() - before[name]).norm() for name, p in trainer.model.named_parameters() if name in before}


def assert_trains(trainer) -> None:
    assert all(distance > 0 for distance in movement(trainer).values())


def test_documented_trl_example_runs_with_our_two_class_names(paths, tmp_path):
    config = OPDConfig(**config_kwargs(tmp_path))
    trainer = OPDTrainer(model=paths[0], teacher_model=paths[1], args=config, train_dataset=make_dataset())
    assert_trains(trainer)


@pytest.mark.slow
def test_student_resumes_from_a_saved_adapter(paths, tmp_path):
    first = build(tmp_path, *paths, peft_config=LORA)
    moved = movement(first)
    assert moved
    assert all("lora" in name for name in moved)
    first.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(paths[0])
    student = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(input_ids=ids).logits, first.model.eval()(input_ids=ids).logits)
    assert_trains(build(tmp_path, student, paths[1]))


@pytest.mark.parametrize(
    "init_kwargs",
    [
        {"dtype": "bfloat16"},
        {"dtype": torch.bfloat16},
        {"quantization_config": BitsAndBytesConfig(**FOUR_BIT)},
        {"quantization_config": FOUR_BIT},
    ],
    ids=["dtype by name", "dtype", "4-bit", "4-bit as a dictionary"],
)
def test_teacher_init_kwargs_reach_the_teacher(paths, tmp_path, init_kwargs):
    trainer = build(tmp_path, *paths, teacher_model_init_kwargs=init_kwargs)
    if "dtype" in init_kwargs:
        assert trainer.teacher_model.dtype == torch.bfloat16
    else:
        assert trainer.teacher_model.is_loaded_in_4bit
    assert_trains(trainer)
    assert trainer.state.log_history[-2]["kl/mean"] > 0


def test_a_four_bit_teacher_may_have_a_width_that_32_does_not_divide(paths, tmp_path):
    teacher = save(tmp_path / "teacher", seed=1, width=56, head_dim=28)
    quantised = {"quantization_config": FOUR_BIT}
    assert_trains(build(tmp_path, paths[0], teacher, teacher_model_init_kwargs=quantised))


@pytest.mark.parametrize("given", ["path", "object"])
@pytest.mark.slow
def test_a_qlora_student_trains_evaluates_and_trains_again(paths, tmp_path, given):
    student, quantised = paths[0], BitsAndBytesConfig(**FOUR_BIT)
    changes = {"peft_config": LORA, "learning_rate": 1e-2, "eval_dataset": make_dataset(4)}
    if given == "path":
        changes["quantization_config"] = quantised
    else:
        student = AutoModelForCausalLM.from_pretrained(student, quantization_config=quantised)
    trainer = build(tmp_path, student, paths[1], **changes)
    for _ in range(2):
        moved = movement(trainer)
        assert moved
        assert all(distance > 0 for name, distance in moved.items() if "lora_B" in name)
        before = loss_and_gradient(trainer, make_inputs())
        assert trainer.evaluate()["eval_kl/mean"] > 0
        after = loss_and_gradient(trainer, make_inputs())
        assert_close(after, before)
        assert all("lora" in name and gradient.abs().sum() > 0 for name, gradient in after[1].items())


def test_a_peft_teacher_scores_with_its_adapter(tmp_path):
    torch.manual_seed(3)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = build(tmp_path, teacher=get_peft_model(make_model(seed=1), adapter))
    inputs = make_inputs()
    assert loss_and_gradient(trainer, inputs)[0] == pytest.approx(reference_of(trainer, inputs)[0], rel=1e-5)


# Vocabularies


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(300, 320), (320, 300)])
def test_one_tokenizer_and_two_paddings_train_on_the_shared_range(tmp_path, student_rows, teacher_rows):
    student = save(tmp_path / "student", seed=0, rows=student_rows)
    teacher = save(tmp_path / "teacher", seed=1, rows=teacher_rows)
    trainer, inputs = build(tmp_path, student, teacher), make_inputs()
    expected = reference_of(trainer, inputs)
    assert_close(loss_and_gradient(trainer, inputs), expected)
    assert_trains(trainer)


@pytest.mark.parametrize("generation_kwargs", [None, {"do_sample": False}, {"suppress_tokens": [40, 41]}])
def test_rollouts_of_training_and_evaluation_stay_in_the_shared_range(tmp_path, generation_kwargs):
    student = make_model(seed=0, rows=320)
    with torch.no_grad():
        student.lm_head.weight[300:] = student.lm_head.weight[:20] * 50
        student.lm_head.weight[40:42] *= 50
        # Left alone, the student samples tokens that the teacher does not have.
        free = student.generate(torch.tensor([[5, 6, 7]] * 4), max_new_tokens=12, do_sample=True)
    assert free.max() >= 300
    teacher = save(tmp_path / "teacher", seed=1, width=32)
    trainer = build(tmp_path, student, teacher, cls=Recorder, generation_kwargs=generation_kwargs)
    trainer.train()
    trainer.evaluate(make_dataset(4))
    sampled = {}
    for training, *_, batch in trainer.batches:
        ids = batch["completion_ids"][batch["completion_mask"].bool()].tolist()
        sampled[training] = sampled.get(training, set()) | set(ids)
    assert max(sampled[True]) < 300
    assert max(sampled[False]) < 300
    suppressed = not sampled[True] & {40, 41}
    assert suppressed == ("suppress_tokens" in (generation_kwargs or {}))


def test_different_ids_raise_even_if_sizes_agree(paths, tmp_path):
    swapped_tokenizer().save_pretrained(tmp_path / "swapped")
    teacher = save(tmp_path / "teacher", seed=1, tokenizer=swapped_tokenizer())
    with pytest.raises(ValueError, match="number their tokens differently"):
        build(tmp_path, paths[0], teacher)
    with pytest.raises(ValueError, match="number their tokens differently"):  # the option has precedence
        build(tmp_path, *paths, teacher_tokenizer_name_or_path=str(tmp_path / "swapped"))
    build(tmp_path, *paths)


@pytest.mark.slow
def test_teacher_without_a_tokenizer_is_a_warning_or_an_error_if_sizes_differ(tmp_path, tokenizer):
    for rows in (300, 320):
        make_model(seed=1, rows=rows).save_pretrained(tmp_path / str(rows))
    for teacher in (make_model(seed=1), str(tmp_path / "300")):
        with pytest.warns(UserWarning, match="names no tokenizer that can be loaded"):
            build(tmp_path, teacher=teacher)
    message = r"300 vocabulary entries, the teacher 320.*names no tokenizer.*teacher_tokenizer_name_or_path"
    for teacher in (make_model(seed=1, rows=320), str(tmp_path / "320")):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, teacher=teacher)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    build(tmp_path, teacher=teacher, teacher_tokenizer_name_or_path=str(tmp_path / "tokenizer")).train()


def test_prompt_that_the_teacher_cannot_embed_raises(tmp_path):
    tokenizer = make_tokenizer(extra=("<|new|>",))
    student = make_model(seed=0, rows=len(tokenizer))
    dataset = make_dataset(chat=False).map(lambda row: {"prompt": row["prompt"] + "<|new|>"})
    own = {"teacher_tokenizer_name_or_path": save(tmp_path / "teacher", seed=1)}
    trainer = build(tmp_path, student, tokenizer=tokenizer, train_dataset=dataset, **own)
    with pytest.raises(ValueError, match=r"token id 300 \('<\|new\|>'\)"):
        trainer.train()


def test_different_chat_templates_give_a_warning(paths, tmp_path):
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("<|start|>", "###")
    with pytest.warns(UserWarning, match="chat templates of student and teacher differ"):
        build(tmp_path, paths[0], save(tmp_path / "teacher", seed=1, tokenizer=other))
