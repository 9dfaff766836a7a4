"""Twenty bugs of TRL 1.16's DistillationTrainer that OPDTrainer fixes.

Each test shows the bug in TRL's class and the fix in ours, so a test fails if TRL fixes a bug, and our correction can
then be removed. The numbers are those of the table in docs/training.md.
"""

import copy
import json
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_opd import OPDConfig, OPDTrainer
from trl_opd.training.preflight import warn_of_one_process

from tests.helpers import reference
from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.tiny import config_kwargs, make_config, make_dataset, make_model, make_tokenizer

CLASSES = [DistillationTrainer, OPDTrainer]


def build(cls, path, student=None, teacher=None, dataset=None, eval_dataset=None, tokenizer=None, **changes):
    config = OPDConfig if issubclass(cls, OPDTrainer) else DistillationConfig
    return cls(
        model=make_model(seed=0) if student is None else student,
        teacher_model=make_model(seed=1) if teacher is None else teacher,
        args=config(**config_kwargs(path, **changes)),
        train_dataset=make_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or make_tokenizer(),
    )


def recorder(cls):
    """Return the class, keeping the prompts and the generation batches."""

    class Recorder(cls):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            self.batches = [*getattr(self, "batches", []), ([row["prompt"] for row in inputs], batch)]
            return batch

    return Recorder


# 1


def dtypes_of_backbones(cls, path) -> set:
    trainer, seen = build(cls, path, bf16=True), set()
    hook = lambda module, args, output: seen.add(output.dtype)  # noqa: E731
    for model in (trainer.model, trainer.teacher_model):
        model.model.layers[0].self_attn.q_proj.register_forward_hook(hook)
    trainer.model.train()
    trainer.compute_loss(trainer.accelerator.prepare_model(trainer.model), make_inputs()).backward()
    return seen


def test_01_bf16_reaches_both_backbones_and_not_the_divergence(tmp_path):
    assert dtypes_of_backbones(DistillationTrainer, tmp_path) == {torch.float32}
    assert dtypes_of_backbones(OPDTrainer, tmp_path) == {torch.bfloat16}
    trainer = build(OPDTrainer, tmp_path, bf16=True)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, make_inputs())
    assert loss.dtype == torch.float32
    exact = build(OPDTrainer, tmp_path)
    exact.model.train()
    assert loss.item() == pytest.approx(exact.compute_loss(exact.model, make_inputs()).item(), rel=0.05)


# 2


def prompts_of_epochs(cls, path, *, stop_at: int) -> list[list[str]]:
    """Return the prompts of epochs 1 to 3, with the run stopped after `stop_at` steps and resumed."""
    changes = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": stop_at}
    trainer = build(recorder(cls), path, dataset=make_dataset(8, chat=False), **changes)
    trainer.train()
    resumed = build(recorder(cls), path, dataset=make_dataset(8, chat=False), **changes)
    resumed.train(resume_from_checkpoint=str(path / f"checkpoint-{stop_at}"))
    whole = [prompts for prompts, _ in trainer.batches]
    return whole[stop_at:], [prompts for prompts, _ in resumed.batches]


@pytest.mark.parametrize("stop_at", [2, 3])
@pytest.mark.slow
def test_02_resumed_run_draws_the_prompts_of_its_epoch(tmp_path, stop_at):
    theirs, found = prompts_of_epochs(DistillationTrainer, tmp_path / "trl", stop_at=stop_at)
    assert found != theirs
    expected, found = prompts_of_epochs(OPDTrainer, tmp_path / "ours", stop_at=stop_at)
    assert found == expected == theirs  # every epoch in the order that an unbroken run of TRL has
    assert len(expected) == 6 - stop_at


# 3


def test_03_adapter_outside_the_teachers_backbone_is_an_error(tmp_path):
    head = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    build(DistillationTrainer, tmp_path, teacher=get_peft_model(make_model(seed=1), head))  # without a word
    with pytest.raises(ValueError, match=r"teacher has a PEFT adapter on its LM head.*merge_and_unload"):
        build(OPDTrainer, tmp_path, teacher=get_peft_model(make_model(seed=1), head))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="teacher has a prompt-learning adapter"):
        build(OPDTrainer, tmp_path, teacher=get_peft_model(make_model(seed=1), prompt))


# 4


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.slow
def test_04_quantised_lm_head_of_the_teacher_is_dequantised_once(tmp_path, kind):
    make_model(seed=1, width=64).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    skip = {"llm_int8_skip_modules": ["none_of_them"]}
    config = BitsAndBytesConfig(**(four_bit if kind == "4bit" else {"load_in_8bit": True}), **skip)
    changes = {"teacher_model_init_kwargs": {"quantization_config": config}, "teacher": str(tmp_path / "teacher")}
    theirs = build(DistillationTrainer, tmp_path, **changes)
    if kind == "4bit":
        with pytest.raises(RuntimeError):
            theirs.train()
    else:  # TRL takes the integer codes for weights and trains on them
        theirs.train()
        assert theirs.state.log_history[0]["loss"] > 5
    trainer = build(OPDTrainer, tmp_path, **changes)
    exact, found = make_model(seed=1, width=64).lm_head.weight, trainer.teacher_model.lm_head.weight
    assert found.shape == exact.shape
    assert found.is_floating_point()
    assert (torch.linalg.norm(found.float() - exact) / torch.linalg.norm(exact)).item() < 0.15
    trainer.train()
    assert 0 < trainer.state.log_history[0]["kl/mean"] < 5


# 5


def test_05_teachers_dtype_can_be_a_torch_dtype(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    changes = {"teacher_model_init_kwargs": {"dtype": torch.bfloat16}, "teacher": str(tmp_path / "teacher")}
    with pytest.raises(TypeError):
        build(DistillationTrainer, tmp_path, **changes)
    assert build(OPDTrainer, tmp_path, **changes).teacher_model.dtype == torch.bfloat16


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
    changes = {"teacher_model_name_or_path": str(tmp_path / "teacher")}
    theirs = DistillationTrainer(
        model=make_model(),
        args=DistillationConfig(**config_kwargs(tmp_path, **changes)),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    assert theirs.teacher_model is None
    given = {"model": make_model(), "train_dataset": make_dataset(), "processing_class": make_tokenizer()}
    assert OPDTrainer(args=make_config(tmp_path, **changes), **given).teacher_model is not None
    with pytest.raises(ValueError, match="There is no teacher"):
        OPDTrainer(args=make_config(tmp_path), **given)


# 8


def evaluations(cls, path) -> list[float]:
    trainer = build(cls, path, eval_dataset=make_dataset(4))
    return [trainer.evaluate()["eval_loss"] for _ in range(2)]


@pytest.mark.slow
def test_08_evaluation_uses_its_own_rng(tmp_path):
    first, second = evaluations(DistillationTrainer, tmp_path)
    assert first != second
    first, second = evaluations(OPDTrainer, tmp_path)
    assert first == second
    losses = {}
    for cls in CLASSES:
        for strategy in ("no", "steps"):
            trainer = build(cls, tmp_path, eval_dataset=make_dataset(4), eval_strategy=strategy, eval_steps=1)
            trainer.train()
            losses[cls, strategy] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[DistillationTrainer, "no"] != losses[DistillationTrainer, "steps"]
    assert losses[OPDTrainer, "no"] == losses[OPDTrainer, "steps"]


def test_08_evaluation_restores_every_rng_state(tmp_path):
    trainer = build(OPDTrainer, tmp_path, eval_dataset=make_dataset(2))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    trainer.evaluate()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# 9


def test_09_evaluation_loss_and_entropy_are_means_over_tokens(tmp_path):
    found = {}
    for cls in CLASSES:
        for batch in (1, 3, 8):
            student = make_model(seed=0)
            with torch.no_grad():  # rollouts of very different lengths
                student.lm_head.weight[2] *= 4
            greedy = {"generation_kwargs": {"do_sample": False}, "per_device_eval_batch_size": batch}
            data = make_dataset(8, chat=False)
            trainer = build(cls, tmp_path, student=student, eval_dataset=data, max_completion_length=24, **greedy)
            found[cls, batch] = (trainer.evaluate()["eval_loss"], trainer.state.log_history[-1]["eval_entropy"])
    assert found[DistillationTrainer, 1] != pytest.approx(found[DistillationTrainer, 8], rel=1e-3)
    for batch in (1, 3):
        assert found[OPDTrainer, batch] == pytest.approx(found[OPDTrainer, 8], rel=1e-5)
    assert found[DistillationTrainer, 8] == pytest.approx(found[OPDTrainer, 8], rel=1e-5)


# 10


def test_10_rollouts_are_sampled_without_dropout(tmp_path):
    for cls in CLASSES:
        student = make_model(seed=0, attention_dropout=0.9)
        trainer = build(cls, tmp_path, student=student, generation_kwargs={"do_sample": False})
        trainer.model.train()
        prompts = [[5, 6, 7], [8, 9, 10]]
        found = [trainer._generate_single_turn(prompts, None, {}) for _ in range(2)]
        without = make_model(seed=0).eval()
        same = [
            without.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 3:].tolist()
            for ids in prompts
        ]
        assert (found[0] == found[1] == same) == (cls is OPDTrainer)
        assert trainer.model.training


# 11


@pytest.mark.parametrize("stream", [False, True])
def test_11_dataset_smaller_than_one_step_is_an_error_with_the_number_of_prompts(tmp_path, stream):
    def data():
        rows = make_dataset(3)
        return IterableDataset.from_generator(lambda: iter(rows)) if stream else rows

    theirs = build(DistillationTrainer, tmp_path, dataset=data())
    theirs.train()
    assert theirs.state.global_step == 0
    with pytest.raises(ValueError, match=r"Nothing was trained: an optimizer step needs 4 prompts"):
        build(OPDTrainer, tmp_path, dataset=data()).train()


# 12


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"question": ["a"] * 8}, r"training dataset has no column 'prompt' \(it has question\)"),
        ({"prompt": ["a", "b", "", "c"] * 2}, "row 2 of the training dataset is empty"),
        ({"prompt": [1, 2, 3, 4]}, "row 0 of the training dataset is neither a text nor a list of messages"),
        ({"prompt": ["a", None, "b", "c"]}, "row 1 of the training dataset is neither"),
        ({"prompt": [[{"role": "user", "content": "a"}], []] * 4}, "row 1 of the training dataset is empty"),
        ({"prompt": [[{"role": "user", "content": None}]] * 4}, "row 0 of the training dataset has a message of role"),
        ({"prompt": ["a", "b", "c", "so " * 300] * 2}, "row 3 of the dataset has 300 tokens|row 3 .* tokens and the"),
    ],
)
def test_12_invalid_prompt_is_an_error_with_its_row(tmp_path, rows, sentence):
    dataset = Dataset.from_dict(rows)
    with pytest.raises(ValueError, match=sentence):
        build(OPDTrainer, tmp_path, dataset=dataset, shuffle_dataset=False).train()


def test_12_trl_raises_a_key_error_for_a_missing_column(tmp_path):
    with pytest.raises(KeyError):
        build(DistillationTrainer, tmp_path, dataset=Dataset.from_dict({"question": ["a"] * 8})).train()


def test_12_row_of_a_stream_is_checked_when_it_is_read(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in ["a", "b", "", "c"]))
    with pytest.raises(ValueError, match="The prompt in a row of the dataset is empty"):
        build(OPDTrainer, tmp_path, dataset=stream).train()


def test_12_evaluation_dataset_is_checked(tmp_path):
    parts = {"a": make_dataset(2), "b": Dataset.from_dict({"prompt": ["a", ""]})}
    with pytest.raises(ValueError, match=r"row 1 of the evaluation dataset\['b'\] is empty"):
        build(OPDTrainer, tmp_path, eval_dataset=parts)


# 13


def test_13_rollouts_without_a_limit_end_at_the_context_length(tmp_path):
    lengths = {}
    for cls in CLASSES:
        student = make_model(seed=0, max_position_embeddings=64)
        with torch.no_grad():
            student.lm_head.weight[2] = 0
        trainer = build(
            recorder(cls),
            tmp_path,
            student=student,
            dataset=make_dataset(chat=False),
            max_completion_length=None,
            max_steps=1,
            generation_kwargs={"suppress_tokens": [0, 2]},
        )
        trainer.train()
        batch = trainer.batches[0][1]
        lengths[cls] = (batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1])
    assert sum(lengths[DistillationTrainer]) < 64
    assert sum(lengths[OPDTrainer]) == 64


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
        trainer = build(cls, tmp_path, student=student, teacher=teacher)
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
    trainer = build(
        OPDTrainer,
        tmp_path,
        student=make_model("gpt2"),
        teacher=make_model("gpt2", seed=1),
        generation_kwargs={"do_sample": False},
        bf16=bf16,
    )
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
    theirs = build(DistillationTrainer, tmp_path, student=model, teacher=model)
    theirs.train()
    assert theirs.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-6)
    model = make_model()
    with pytest.raises(ValueError, match="same object"):
        build(OPDTrainer, tmp_path, student=model, teacher=model)


# 16


@pytest.mark.slow
def test_16_completions_are_logged_once_per_step(tmp_path, monkeypatch):
    import trl.trainer.distillation_trainer as module

    for cls, expected in ((DistillationTrainer, [1, 2, 2]), (OPDTrainer, [1, 2])):
        printed = []
        sample = lambda *args: printed.append(args[4])  # noqa: E731, B023
        monkeypatch.setattr(module, "print_prompt_completions_sample", sample)
        monkeypatch.setattr(module, "is_rich_available", lambda: True)
        trainer = build(cls, tmp_path / cls.__name__, log_completions=True)
        trainer.train()
        assert printed == expected
        assert trainer.log_completions
        assert len(list((Path(trainer.args.output_dir) / "completions").iterdir())) == 2


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
        assert "train.py" in command  # one command, whatever was asked for
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for name in ("MASTER_ADDR", "ACCELERATE_USE_CPU"):
                if name in environment:
                    patch.setitem(os.environ, name, environment[name])
            warn_of_one_process(config)
        warned[processes] = any("several processes" in str(warning.message) for warning in record)
    assert warned == {1: False, 2: True}


# 18


@pytest.mark.slow
def test_18_resuming_a_finished_run_does_nothing(tmp_path):
    steps = {}
    for cls in CLASSES:
        folder = tmp_path / cls.__name__
        settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
        for resume in (None, str(folder / "checkpoint-3")):
            trainer = build(cls, folder, **settings)
            trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        steps[cls] = trainer.state.global_step
    assert steps == {DistillationTrainer: 4, OPDTrainer: 3}
    saved = [(folder / "model.safetensors").read_bytes() for folder in (folder, folder / "checkpoint-3")]
    assert saved[0] == saved[1]


# 19


def prompts_of_a_stream(cls, folder, *, resume=None, **changes) -> list[list[str]]:
    rows = list(make_dataset(8, chat=False))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5} | changes
    trainer = build(recorder(cls), folder, dataset=stream, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return [prompts for prompts, _ in trainer.batches]


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [5, 9])
def test_19_resumed_stream_continues_where_it_stopped(tmp_path, max_steps):
    """Two steps are a pass; for transformers `max_steps` steps are one, so it errs from the second pass on."""
    for cls in CLASSES:
        whole = prompts_of_a_stream(cls, tmp_path / cls.__name__)
        assert len(whole) == 5
        assert whole[:2] != whole[2:4]  # every pass has another order
        for step in range(1, 5):
            checkpoint = str(tmp_path / cls.__name__ / f"checkpoint-{step}")
            found = prompts_of_a_stream(cls, tmp_path / "resumed", resume=checkpoint, max_steps=max_steps)
            assert (found[: 5 - step] == whole[step:]) == (cls is OPDTrainer or step < 3), step


# 20


@pytest.mark.slow
def test_20_incomplete_checkpoint_is_skipped_on_resume(tmp_path):
    steps = {}
    for cls in CLASSES:
        folder = tmp_path / cls.__name__
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        build(cls, folder, **settings).train()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / "checkpoint-4" / name).unlink()
        trainer = build(cls, folder, **(settings | {"max_steps": 5}))
        began = []
        trainer.add_callback(Beginning(began))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=True)
        steps[cls] = began[0]
    assert steps == {DistillationTrainer: 4, OPDTrainer: 2}  # TRL's optimizer starts over, without a warning
    assert any("the run resumes from checkpoint-2" in str(warning.message) for warning in caught)


class Beginning(TrainerCallback):
    """Keeps the step at which a training begins."""

    def __init__(self, steps: list[int]):
        self._steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self._steps.append(state.global_step)
