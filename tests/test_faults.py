"""Twenty bugs of TRL 1.16's DistillationTrainer that OPDTrainer fixes.

Each test shows the bug in TRL's class and the fix in ours, so a test fails if TRL fixes a bug, and our correction can
then be removed. The numbers are those of the table in docs/training.md.
"""

import copy
import json
import os
import random
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from trl_opd import OPDConfig, OPDTrainer
from trl_opd.training.preflight import warn_of_one_process

from tests.helpers import reference
from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.tiny import config_kwargs, make_config, make_dataset, make_model, make_tokenizer, save
from tests.helpers.trainers import GREEDY, assert_same_weights, build, ending_student, recorder, trained

CLASSES = [DistillationTrainer, OPDTrainer]


# 1


@pytest.mark.parametrize(("cls", "dtype"), [(DistillationTrainer, torch.float32), (OPDTrainer, torch.bfloat16)])
def test_01_bf16_reaches_both_backbones_and_not_the_divergence(tmp_path, cls, dtype):
    trainer, seen = build(tmp_path, cls=cls, bf16=True), []
    for model in (trainer.model, trainer.teacher_model):
        projection = model.model.layers[0].self_attn.q_proj
        projection.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.accelerator.prepare_model(trainer.model), make_inputs())
    assert set(seen) == {dtype}
    assert loss.dtype == torch.float32
    exact = build(tmp_path, cls=cls)
    exact.model.train()
    assert loss.item() == pytest.approx(exact.compute_loss(exact.model, make_inputs()).item(), rel=0.05)


# 2


def prompts_of_epochs(cls, path, *, resume: int | None = None, **changes) -> list[list[str]]:
    """Return the prompts of every step of two epochs, or of those after the checkpoint of a step."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "train_dataset": make_dataset(8, chat=False)}
    trainer = build(path, cls=recorder(cls), **settings, **changes)
    trainer.train(resume_from_checkpoint=resume and str(path / f"checkpoint-{resume}"))
    return [prompts for *_, prompts, _ in trainer.batches]


@pytest.mark.slow
def test_02_resumed_run_draws_the_prompts_of_its_epoch(tmp_path):
    whole = {}
    for cls in CLASSES:
        folder = tmp_path / cls.__name__
        whole[cls] = prompts_of_epochs(cls, folder, save_strategy="steps", save_steps=1)
        assert len(whole[cls]) == 4
        for step in (2, 3):  # after the first epoch, and in the second one
            resumed = prompts_of_epochs(cls, folder, resume=step)
            assert (resumed == whole[cls][step:]) == (cls is OPDTrainer), step
    assert whole[OPDTrainer] == whole[DistillationTrainer]


# 3


def test_03_adapter_outside_the_teachers_backbone_is_an_error(tmp_path):
    head = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    build(tmp_path, cls=DistillationTrainer, teacher=get_peft_model(make_model(seed=1), head))  # without a word
    with pytest.raises(ValueError, match=r"teacher has a PEFT adapter on its LM head.*merge_and_unload"):
        build(tmp_path, teacher=get_peft_model(make_model(seed=1), head))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="teacher has a prompt-learning adapter"):
        build(tmp_path, teacher=get_peft_model(make_model(seed=1), prompt))


# 4


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.slow
def test_04_quantised_lm_head_of_the_teacher_is_dequantised_once(tmp_path, kind):
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "4bit" else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=["none_of_them"])
    changes = {"teacher_model_init_kwargs": {"quantization_config": config}}
    changes["teacher"] = save(tmp_path / "teacher", seed=1)
    theirs = build(tmp_path, cls=DistillationTrainer, **changes)
    if kind == "4bit":
        with pytest.raises(RuntimeError):
            theirs.train()
    else:  # TRL takes the integer codes for weights and trains on them
        theirs.train()
        assert theirs.state.log_history[0]["loss"] > 5
    trainer = trained(tmp_path, **changes)
    exact, found = make_model(seed=1, width=64).lm_head.weight, trainer.teacher_model.lm_head.weight
    assert found.shape == exact.shape
    assert found.is_floating_point()
    assert (torch.linalg.norm(found.float() - exact) / torch.linalg.norm(exact)).item() < 0.15
    assert 0 < trainer.state.log_history[0]["kl/mean"] < 5


# 5


def test_05_teachers_dtype_can_be_a_torch_dtype(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    changes = {"teacher_model_init_kwargs": {"dtype": torch.bfloat16}, "teacher": str(tmp_path / "teacher")}
    with pytest.raises(TypeError):
        build(tmp_path, cls=DistillationTrainer, **changes)
    assert build(tmp_path, **changes).teacher_model.dtype == torch.bfloat16


# 6


def test_06_config_with_a_quantised_teacher_converts_to_json(tmp_path):
    kwargs = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.bfloat16}
    changes = {"teacher_model_init_kwargs": kwargs}
    with pytest.raises(TypeError):
        DistillationConfig(**config_kwargs(tmp_path, **copy.deepcopy(changes))).to_json_string()
    config = OPDConfig(**config_kwargs(tmp_path, **changes))
    written = json.loads(config.to_json_string())["teacher_model_init_kwargs"]
    assert written["quantization_config"]["load_in_4bit"] is True
    assert written["dtype"] == "bfloat16"
    assert isinstance(config.teacher_model_init_kwargs["quantization_config"], BitsAndBytesConfig)
    torch.save(config, tmp_path / "training_args.bin")
    json.dumps(config.to_sanitized_dict())


# 7


def test_07_teacher_in_the_config_is_used_and_a_missing_one_is_an_error(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    changes = config_kwargs(tmp_path, teacher_model_name_or_path=str(tmp_path / "teacher"))
    given = {"model": make_model(), "train_dataset": make_dataset(), "processing_class": make_tokenizer()}
    assert DistillationTrainer(args=DistillationConfig(**changes), **given).teacher_model is None
    ours = OPDTrainer(args=OPDConfig(**changes), **given)
    assert_same_weights(ours.teacher_model, make_model(seed=1))
    with pytest.raises(ValueError, match="There is no teacher"):
        OPDTrainer(args=make_config(tmp_path), **given)


# 8


@pytest.mark.slow
def test_08_evaluation_uses_its_own_rng(tmp_path):
    for cls in CLASSES:
        is_ours = cls is OPDTrainer
        trainer = build(tmp_path, cls=cls, eval_dataset=make_dataset(4))
        first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
        assert (first == second) == is_ours
        losses = {}
        for strategy in ("no", "steps"):
            settings = {"eval_dataset": make_dataset(4), "eval_strategy": strategy, "eval_steps": 1}
            log = trained(tmp_path, cls=cls, **settings).state.log_history
            losses[strategy] = [line["loss"] for line in log if "loss" in line]
        assert (losses["no"] == losses["steps"]) == is_ours


def test_08_evaluation_restores_every_rng_state(tmp_path):
    trainer = build(tmp_path, eval_dataset=make_dataset(2))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    trainer.evaluate()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# 9


@pytest.mark.slow
def test_09_evaluation_loss_and_entropy_are_means_over_tokens(tmp_path):
    found = {}
    for cls, batch in ((DistillationTrainer, 1), (DistillationTrainer, 8), (OPDTrainer, 1), (OPDTrainer, 3)):
        settings = {"generation_kwargs": GREEDY, "per_device_eval_batch_size": batch, "max_completion_length": 24}
        data = make_dataset(8, chat=False)
        trainer = build(tmp_path, cls=cls, student=ending_student(), eval_dataset=data, **settings)
        found[cls, batch] = (trainer.evaluate()["eval_loss"], trainer.state.log_history[-1]["eval_entropy"])
    right = found[DistillationTrainer, 8]  # one batch: its mean is the mean over tokens
    assert found[DistillationTrainer, 1] != pytest.approx(right, rel=1e-3)
    for batch in (1, 3):
        assert found[OPDTrainer, batch] == pytest.approx(right, rel=1e-5)


# 10


def test_10_rollouts_are_sampled_without_dropout(tmp_path):
    prompts = [[5, 6, 7], [8, 9, 10]]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    without = make_model(seed=0).eval()
    expected = [without.generate(torch.tensor([ids]), **settings)[0, 3:].tolist() for ids in prompts]
    for cls in CLASSES:
        student = make_model(seed=0, attention_dropout=0.9)
        trainer = build(tmp_path, cls=cls, student=student, generation_kwargs=GREEDY)
        trainer.model.train()
        found = [trainer._generate_single_turn(prompts, None, {}) for _ in range(2)]
        assert (found == [expected, expected]) == (cls is OPDTrainer)
        assert trainer.model.training


# 11


@pytest.mark.parametrize("stream", [False, True])
def test_11_dataset_smaller_than_one_step_is_an_error_with_the_number_of_prompts(tmp_path, stream):
    def data():
        rows = make_dataset(3)
        return IterableDataset.from_generator(lambda: iter(rows)) if stream else rows

    theirs = build(tmp_path, cls=DistillationTrainer, train_dataset=data())
    theirs.train()
    assert theirs.state.global_step == 0
    with pytest.raises(ValueError, match=r"Nothing was trained: an optimizer step needs 4 prompts"):
        build(tmp_path, train_dataset=data()).train()


# 12


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"question": ["a"] * 8}, r"training dataset has no column 'prompt' \(it has question\)"),
        ({"prompt": ["a", "b", "", "c"] * 2}, "row 2 of the training dataset is empty"),
        ({"prompt": [1, 2, 3, 4]}, "row 0 of the training dataset is neither a text nor a list of messages"),
        ({"prompt": ["a", "b", "c", "so " * 300] * 2}, "row 3 of the dataset has 900 tokens"),
    ],
)
def test_12_invalid_prompt_is_an_error_with_its_row(tmp_path, rows, sentence):
    dataset = Dataset.from_dict(rows)
    with pytest.raises(ValueError, match=sentence):
        build(tmp_path, train_dataset=dataset, shuffle_dataset=False).train()


def test_12_trl_raises_a_key_error_for_a_missing_column(tmp_path):
    with pytest.raises(KeyError):
        trained(tmp_path, cls=DistillationTrainer, train_dataset=Dataset.from_dict({"question": ["a"] * 8}))


def test_12_evaluation_dataset_is_checked(tmp_path):
    parts = {"a": make_dataset(2), "b": Dataset.from_dict({"prompt": ["a", ""]})}
    with pytest.raises(ValueError, match=r"row 1 of the evaluation dataset\['b'\] is empty"):
        build(tmp_path, eval_dataset=parts)


# 13


def test_13_rollouts_without_a_limit_end_at_the_context_length(tmp_path):
    lengths = {}
    for cls in CLASSES:
        student = make_model(seed=0, max_position_embeddings=64)
        settings = {"max_completion_length": None, "generation_kwargs": {"suppress_tokens": [0, 2]}, "max_steps": 1}
        dataset = make_dataset(chat=False)
        trainer = trained(tmp_path, cls=recorder(cls), student=student, train_dataset=dataset, **settings)
        *_, batch = trainer.batches[0]
        lengths[cls] = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    assert lengths[DistillationTrainer] < lengths[OPDTrainer] == 64


# 14


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_14_padding_does_not_move_absolute_positions(tmp_path, family):
    inputs = make_inputs()
    rows = [[1.0] * int(mask.sum()) for mask in inputs["completion_mask"]]
    count = int(inputs["completion_mask"].sum())
    errors = {}
    for cls in CLASSES:
        student, teacher = (make_model(family, seed=seed) for seed in (0, 1))
        expected = reference.loss_and_gradient(student, teacher, inputs, rows, count)
        trainer = build(tmp_path, cls=cls, student=student, teacher=teacher)
        trainer.model.eval()  # GPT-2 has dropout
        if cls is OPDTrainer:
            loss = trainer.weighted_loss(trainer.model, inputs, inputs["num_items_in_batch"])
        else:
            loss = trainer._compute_loss(trainer.model, inputs, inputs["num_items_in_batch"])[0]
        loss.backward()
        found = {name: p.grad for name, p in trainer.model.named_parameters()}
        errors[cls] = reference.relative_error(found, expected[1])
    if family == "gpt2":  # OPT counts positions from the mask itself
        assert errors[DistillationTrainer] > 0.1
    assert errors[OPDTrainer] < 1e-5


@pytest.mark.parametrize("bf16", [False, True])
def test_14_generation_sees_the_same_prompt_padded_or_not(tmp_path, bf16):
    models = {"student": make_model("gpt2"), "teacher": make_model("gpt2", seed=1)}
    trainer = build(tmp_path, **models, generation_kwargs=GREEDY, bf16=bf16)
    trainer.accelerator.prepare_model(trainer.model)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    together = trainer._generate_single_turn(prompts, None, {})
    alone = [trainer._generate_single_turn([prompt], None, {})[0] for prompt in prompts]
    if bf16:  # rounding may tell the two apart later on, but the first token is the prompt's
        assert [row[0] for row in together] == [row[0] for row in alone]
    else:
        assert together == alone


# 15


def test_15_one_object_as_student_and_teacher_is_an_error(tmp_path):
    model = make_model()
    theirs = trained(tmp_path, cls=DistillationTrainer, student=model, teacher=model)
    assert theirs.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="same object"):
        build(tmp_path, student=model, teacher=model)


# 16


@pytest.mark.parametrize(("cls", "expected"), [(DistillationTrainer, [1, 2, 2]), (OPDTrainer, [1, 2])])
def test_16_completions_are_logged_once_per_step(tmp_path, monkeypatch, cls, expected):
    printed = []
    monkeypatch.setattr(distillation_trainer, "print_prompt_completions_sample", lambda *args: printed.append(args[4]))
    monkeypatch.setattr(distillation_trainer, "is_rich_available", lambda: True)
    trainer = trained(tmp_path, cls=cls, log_completions=True)
    assert printed == expected
    assert trainer.log_completions
    assert len(list((tmp_path / "completions").iterdir())) == 2


# 17


def test_17_launcher_that_starts_one_of_several_processes_is_a_warning(tmp_path, monkeypatch):
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    config, warned = make_config(tmp_path), {}
    for processes in (1, 2):
        line = ["--cpu", "--num_processes", str(processes), "--mixed_precision", "no", "train.py"]
        args = launch_command_parser().parse_args(line)
        args.num_cpu_threads_per_process, args.dynamo_backend, args.num_machines = 1, "no", 1
        command, environment = prepare_simple_launcher_cmd_env(args)
        assert "train.py" in command  # one command for any number of processes
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for name in ("MASTER_ADDR", "ACCELERATE_USE_CPU"):
                if name in environment:
                    patch.setitem(os.environ, name, environment[name])
            warn_of_one_process(config)
        warned[processes] = any("several processes" in str(warning.message) for warning in record)
    assert warned == {1: False, 2: True}


# 18


@pytest.mark.parametrize(("cls", "steps"), [(DistillationTrainer, 4), (OPDTrainer, 3)])
@pytest.mark.slow
def test_18_resuming_a_finished_run_does_nothing(tmp_path, cls, steps):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}  # not at the end of an epoch
    finished = trained(tmp_path, cls=cls, **settings)
    trainer = build(tmp_path, cls=cls, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == steps
    if cls is OPDTrainer:
        assert_same_weights(trainer.model, finished.model)


# 19


def prompts_of_a_stream(cls, folder, *, resume=None, **changes) -> list[list[str]]:
    rows = list(make_dataset(8, chat=False))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = build(folder, cls=recorder(cls), train_dataset=stream, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return [prompts for *_, prompts, _ in trainer.batches]


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
def test_19_resumed_stream_continues_where_it_stopped(tmp_path, cls):
    """Two steps are a pass; for transformers `max_steps` steps are one, so it errs from the second pass on."""
    whole = prompts_of_a_stream(cls, tmp_path, max_steps=5, save_strategy="steps", save_steps=1)
    assert len(whole) == 5
    assert whole[:2] != whole[2:4]  # every pass has another order
    for step, max_steps in ((2, 5), (3, 5)) if cls is DistillationTrainer else ((1, 5), (2, 5), (3, 5), (4, 7)):
        found = prompts_of_a_stream(cls, tmp_path, max_steps=max_steps, resume=str(tmp_path / f"checkpoint-{step}"))
        assert (found[: 5 - step] == whole[step:]) == (cls is OPDTrainer or step < 3), step


# 20


class Beginning(TrainerCallback):
    """Keeps the step at which a training begins."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


@pytest.mark.parametrize(("cls", "step"), [(DistillationTrainer, 2), (OPDTrainer, 1)])
@pytest.mark.slow
def test_20_incomplete_checkpoint_is_skipped_on_resume(tmp_path, cls, step):
    trained(tmp_path, cls=cls, save_strategy="steps", save_steps=1)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "checkpoint-2" / name).unlink()
    beginning = Beginning()
    trainer = build(tmp_path, cls=cls, max_steps=3, callbacks=[beginning])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=True)
    assert beginning.step == step  # TRL's optimizer starts over, without a warning
    said = any("the run resumes from checkpoint-1" in str(warning.message) for warning in caught)
    assert said == (cls is OPDTrainer)
