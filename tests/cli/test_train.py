"""`trl-opd train`: real runs from flags and from YAML, resuming, and a one-line error for each wrong input."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from trl_opd.cli import main

from tests.helpers.command_line import flags
from tests.helpers.rock_sets import rock_file


@pytest.mark.slow
def test_lora_student_with_a_four_bit_teacher_trains_saves_resumes_and_loads_again(world, tmp_path, capsys):
    four_bit = json.dumps({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}})
    changes = {"use_peft": True, "num_generations": 4, "teacher_model_init_kwargs": four_bit, "save_steps": 1}
    assert main(["train", *flags(world, tmp_path, **changes)]) == 0
    assert "Trained 2 steps, divergence" in capsys.readouterr().out
    assert main(["train", *flags(world, tmp_path, **changes, max_steps=3), "--resume_from_checkpoint"]) == 0
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "kl/mean" in line] == [1, 2, 3]
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    base = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert not torch.allclose(adapter(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.slow
def test_qlora_student_trains_from_yaml_with_a_rock_set(world, tmp_path, capsys):
    rocks = rock_file(tmp_path / "rocks.json", range(60, 180))
    given = flags(world, tmp_path / "out", use_peft=True, load_in_4bit=True, token_weighting="rock", rock_set=rocks)
    recipe = {}
    for flag, value in pairwise([*given, "--"]):
        if flag.startswith("--"):
            recipe[flag.removeprefix("--")] = True if value.startswith("--") else value
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe.items()))
    assert main(["train", "--config", str(path), "--max_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Trained 1 steps" in printed
    assert "rock/token_share" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "A student is required"),
        ({"teacher_model_name_or_path": None}, "A teacher is required"),
        ({"dataset_name": None}, "Prompts are required"),
        ({"dataset_name": "nowhere.jsonl"}, "no dataset file nowhere.jsonl"),
        ({"dataset_name": "BROKEN"}, "cannot be read"),
        ({"dataset_name": "EMPTY"}, "empty.jsonl is empty"),
        ({"dataset_train_split": "learn"}, "no split 'learn' (it has train)"),
        ({"eval_strategy": "steps"}, "no split 'test'"),
        ({"token_weighting": "rock"}, "needs a rock set"),
        ({"token_weighting": "rock", "rock_set": "nowhere.json"}, "No rock set at nowhere.json"),
        ({"rock_weight": "2"}, "rock_weight must be in [0, 1]"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
        ({"resume_from_checkpoint": True}, "There is no checkpoint in"),
        ({"model_name_or_path": "./nowhere"}, "nowhere"),
        ({"teacher_model_init_kwargs": '{"foo": 1}'}, "cannot be loaded with `teacher_model_init_kwargs`"),
        ({"attn_implementation": "flash_attention_2"}, "lash"),
        ({"use_vllm": True}, "vLLM is not available"),
        ({"teacher_tokenizer_name_or_path": "./nowhere"}, "holds no tokenizer"),
    ],
)
def test_wrong_input_is_a_one_line_error_and_exit_code_one(world, tmp_path, capsys, changes, message):
    if changes.get("dataset_name") == "BROKEN":
        changes = {"dataset_name": tmp_path / "broken.jsonl"}
        changes["dataset_name"].write_text('{"prompt": "a"}\n{"prompt": ')
    if changes.get("dataset_name") == "EMPTY":
        changes = {"dataset_name": tmp_path / "empty.jsonl"}
        changes["dataset_name"].touch()
    assert main(["train", *flags(world, tmp_path / "out", **changes)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("trl-opd train: error: ")
    assert message in last


def test_git_lfs_pointer_in_place_of_weights_is_explained(world, tmp_path, capsys):
    student = tmp_path / "student"
    shutil.copytree(world / "student", student)
    (student / "model.safetensors").unlink()
    (student / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert main(["train", *flags(world, tmp_path / "out", model_name_or_path=student)]) == 1
    assert "trl-opd train: error: The folder of student or teacher holds a file that torch" in capsys.readouterr().err
