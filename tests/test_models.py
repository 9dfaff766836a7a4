"""OPDTrainer with every kind of student and teacher, and with vocabularies of one tokenizer and two sizes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_opd import OPDConfig, OPDTrainer

from tests.helpers import reference
from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.tiny import (
    FOUR_BIT,
    config_kwargs,
    make_config,
    make_dataset,
    make_model,
    make_tokenizer,
    save,
    swapped_tokenizer,
)
from tests.helpers.trainers import Rollouts

LORA = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture
def paths(tmp_path) -> tuple[str, str]:
    return save(tmp_path / "student", seed=0), save(tmp_path / "teacher", seed=1)


def trained(trainer) -> dict[str, torch.Tensor]:
    """Train, and return by how much every parameter of the student that can move has moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    teacher = {name: p.detach().clone() for name, p in trainer.teacher_model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, teacher[name]) for name, p in trainer.teacher_model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher_model.parameters())
    return {name: (p.detach() - before[name]).norm() for name, p in trainer.model.named_parameters() if name in before}


def test_documented_trl_example_runs_with_our_two_class_names(paths, tmp_path):
    trainer = OPDTrainer(
        model=paths[0],
        teacher_model=paths[1],
        args=OPDConfig(**config_kwargs(tmp_path)),
        train_dataset=make_dataset(),
    )
    assert all(distance > 0 for distance in trained(trainer).values())


def test_arguments_may_be_given_in_the_order_of_trl(paths, tmp_path, tokenizer):
    trainer = OPDTrainer(*paths, make_config(tmp_path), make_dataset(), make_dataset(4), tokenizer)
    assert trainer.evaluate()["eval_kl/mean"] > 0
    assert trainer.processing_class is tokenizer


def test_the_teacher_may_be_named_in_the_config_alone(paths, tmp_path):
    config = make_config(tmp_path, teacher_model_name_or_path=paths[1])
    trainer = OPDTrainer(model=paths[0], args=config, train_dataset=make_dataset())
    named = AutoModelForCausalLM.from_pretrained(paths[1])
    assert torch.equal(trainer.teacher_model.lm_head.weight, named.lm_head.weight)


def test_student_resumes_from_a_saved_adapter(paths, tmp_path):
    first = OPDTrainer(
        model=paths[0],
        teacher_model=paths[1],
        args=make_config(tmp_path),
        train_dataset=make_dataset(),
        peft_config=LORA,
    )
    moved = trained(first)
    assert moved
    assert all("lora" in name for name in moved)
    first.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(paths[0])
    student = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(input_ids=ids).logits, first.model.eval()(input_ids=ids).logits)
    second = OPDTrainer(student, paths[1], make_config(tmp_path), make_dataset(), processing_class=make_tokenizer())
    assert all(distance > 0 for distance in trained(second).values())


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
    config = make_config(tmp_path, teacher_model_init_kwargs=init_kwargs)
    trainer = OPDTrainer(model=paths[0], teacher_model=paths[1], args=config, train_dataset=make_dataset())
    if "dtype" in init_kwargs:
        assert trainer.teacher_model.dtype == torch.bfloat16
    else:
        assert trainer.teacher_model.is_loaded_in_4bit
    assert all(distance > 0 for distance in trained(trainer).values())
    assert trainer.state.log_history[-2]["kl/mean"] > 0


def test_a_four_bit_teacher_may_have_a_width_that_32_does_not_divide(tmp_path):
    teacher = save(tmp_path / "teacher", seed=1, width=56, head_dim=28)
    config = make_config(tmp_path, teacher_model_init_kwargs={"quantization_config": FOUR_BIT})
    student = save(tmp_path / "student", seed=0)
    trainer = OPDTrainer(model=student, teacher_model=teacher, args=config, train_dataset=make_dataset())
    assert all(distance > 0 for distance in trained(trainer).values())


@pytest.mark.slow
def test_a_qlora_student_trains_evaluates_and_trains_again(paths, tmp_path):
    trainer = OPDTrainer(
        model=paths[0],
        teacher_model=paths[1],
        args=make_config(tmp_path, learning_rate=1e-2),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(4),
        quantization_config=BitsAndBytesConfig(**FOUR_BIT),
        peft_config=LORA,
    )
    for _ in range(2):
        moved = trained(trainer)
        assert moved
        assert all(distance > 0 for name, distance in moved.items() if "lora_B" in name)
        assert trainer.evaluate()["eval_kl/mean"] > 0


# Vocabularies


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(300, 320), (320, 300)])
def test_one_tokenizer_and_two_paddings_train_on_the_shared_range(tmp_path, student_rows, teacher_rows):
    student = save(tmp_path / "student", seed=0, rows=student_rows)
    teacher = save(tmp_path / "teacher", seed=1, rows=teacher_rows)
    trainer = OPDTrainer(student, teacher, make_config(tmp_path), make_dataset())
    inputs = make_inputs()
    rows = [[1.0] * int(mask.sum()) for mask in inputs["completion_mask"]]
    count = int(inputs["completion_mask"].sum())
    expected = reference.loss_and_gradient(trainer.model, trainer.teacher_model, inputs, rows, count, vocab=300)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    found = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert reference.relative_error(found, expected[1]) < 1e-5
    assert all(distance > 0 for distance in trained(trainer).values())


@pytest.mark.parametrize("generation_kwargs", [None, {"do_sample": False}, {"suppress_tokens": [40, 41]}])
def test_sampling_never_leaves_the_shared_range(tmp_path, generation_kwargs):
    student, teacher = make_model(seed=0, rows=320), make_model(seed=1, rows=300)
    with torch.no_grad():  # left alone, nearly every token would be one that the teacher does not have
        student.lm_head.weight[300:] = student.lm_head.weight[:20] * 50
        student.lm_head.weight[40:42] *= 50
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    config = make_config(tmp_path, generation_kwargs=generation_kwargs)
    trainer = Rollouts(str(tmp_path / "student"), str(tmp_path / "teacher"), config, make_dataset())
    trainer.train()
    sampled = torch.cat([batch["completion_ids"][batch["completion_mask"].bool()] for batch in trainer.seen])
    assert sampled.max() < 300
    suppressed = torch.isin(sampled, torch.tensor([40, 41])).any()
    assert suppressed == (generation_kwargs is None or "suppress_tokens" not in generation_kwargs)


def test_different_ids_raise_even_if_sizes_agree(tmp_path):
    student = save(tmp_path / "student", seed=0)
    teacher = save(tmp_path / "teacher", seed=1, tokenizer=swapped_tokenizer())
    with pytest.raises(ValueError, match="number their tokens differently"):
        OPDTrainer(student, teacher, make_config(tmp_path), make_dataset())


def test_unequal_sizes_need_a_tokenizer_to_compare(tmp_path, tokenizer):
    student, teacher = make_model(seed=0, rows=320), make_model(seed=1)
    with pytest.raises(ValueError, match=r"320 vocabulary entries, the teacher 300.*teacher_tokenizer_name_or_path"):
        OPDTrainer(student, teacher, make_config(tmp_path), make_dataset(), processing_class=tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = make_config(tmp_path, teacher_tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    OPDTrainer(student, teacher, config, make_dataset(), processing_class=tokenizer).train()


def test_equal_sizes_without_a_tokenizer_to_compare_are_a_warning(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="names no tokenizer that can be loaded"):
        OPDTrainer(make_model(), make_model(seed=1), make_config(tmp_path), make_dataset(), processing_class=tokenizer)


def test_prompt_that_the_teacher_cannot_embed_raises(tmp_path):
    tokenizer = make_tokenizer(extra=("<|new|>",))
    student = make_model(seed=0, rows=len(tokenizer))
    config = make_config(tmp_path, teacher_tokenizer_name_or_path=save(tmp_path / "teacher", seed=1))
    dataset = make_dataset(chat=False).map(lambda row: {"prompt": row["prompt"] + "<|new|>"})
    trainer = OPDTrainer(student, make_model(seed=1), config, dataset, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"token id 300 \('<\|new\|>'\)"):
        trainer.train()


def test_different_chat_templates_give_a_warning(tmp_path):
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("<|start|>", "###")
    student, teacher = save(tmp_path / "student", seed=0), save(tmp_path / "teacher", seed=1, tokenizer=other)
    with pytest.warns(UserWarning, match="chat templates of student and teacher differ"):
        OPDTrainer(student, teacher, make_config(tmp_path), make_dataset())


def test_a_peft_teacher_scores_with_its_adapter(tmp_path, tokenizer):
    torch.manual_seed(3)
    teacher = get_peft_model(make_model(seed=1), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    student, inputs = make_model(seed=0), make_inputs()
    rows = [[1.0] * int(mask.sum()) for mask in inputs["completion_mask"]]
    count = int(inputs["completion_mask"].sum())
    expected, _ = reference.loss_and_gradient(student, teacher, inputs, rows, count)
    trainer = OPDTrainer(student, teacher, make_config(tmp_path), make_dataset(), processing_class=tokenizer)
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-5)
