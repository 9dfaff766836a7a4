"""`trl-opd`: help without torch, real runs from flags and from YAML, resuming, a sentence for every wrong input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from trl import DistillationConfig

from trl_opd import OPDConfig
from trl_opd.cli import COMMANDS, main
from trl_opd.cli.models import make_parser
from trl_opd.cli.options import OPD_OPTIONS
from trl_opd.cli.parsing import parse

from tests.helpers.command_line import flags
from tests.helpers.paths import ROOT
from tests.helpers.rock_sets import rock_file

RECIPES = ROOT / "examples" / "recipes"


def test_help_needs_no_torch_and_lists_every_command_and_option():
    code = (
        "import sys; from trl_opd.cli import main; main(['--help']); main(['train', '--help']); "
        "loaded = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules); sys.exit(len(loaded))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(f"\n  {command} " in run.stdout for command in COMMANDS)
    assert all(f"--{option} " in run.stdout for option in OPD_OPTIONS)


def test_the_table_of_options_is_that_of_the_dataclass():
    new = {f.name: f.default for f in dataclasses.fields(OPDConfig)}
    inherited = {f.name for f in dataclasses.fields(DistillationConfig)}
    shown = {name: "none" if value is None else str(value).lower() for name, value in new.items()}
    assert {name: default for name, (default, _) in OPD_OPTIONS.items()} == {
        name: shown[name] for name in new if name not in inherited
    }


def test_help_all_lists_the_options_of_trl_and_ours(capsys):
    assert main(["train", "--help_all"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{option}" in printed for option in (*OPD_OPTIONS, "lora_r", "dataset_name", "max_completion_length"))


def test_a_lora_student_and_a_four_bit_teacher_train_save_resume_and_load_again(world, tmp_path, capsys):
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


def test_a_qlora_student_trains_from_yaml_with_a_rock_set(world, tmp_path, capsys):
    rocks = rock_file(tmp_path / "rocks.json", range(60, 180))
    given = flags(world, tmp_path / "out", use_peft=True, load_in_4bit=True, token_weighting="rock", rock_set=rocks)
    pairs = [part.removeprefix("--") for part in given]
    recipe, place = {}, 0
    while place < len(pairs):
        alone = place + 1 == len(given) or given[place + 1].startswith("--")
        recipe[pairs[place]] = True if alone else pairs[place + 1]
        place += 1 if alone else 2
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe.items()))
    assert main(["train", "--config", str(path), "--max_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Trained 1 steps" in printed
    assert "rock/token_share" in printed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_name_or_path": None}, "A student is required"),
        ({"teacher_model_name_or_path": None}, "A teacher is required"),
        ({"dataset_name": None}, "Prompts are required"),
        ({"dataset_name": "nowhere.jsonl"}, "no dataset file nowhere.jsonl"),
        ({"dataset_name": "BROKEN"}, "cannot be read"),
        ({"dataset_name": "EMPTY"}, "empty.jsonl is empty"),
        ({"dataset_train_split": "learn"}, "no split 'learn' (it has train)"),
        ({"eval_strategy": "steps"}, "no split 'test'"),
        ({"token_weighting": "rocks"}, "token_weighting must be one of"),
        ({"token_weighting": "rock"}, "needs a rock set"),
        ({"token_weighting": "rock", "rock_set": "nowhere.json"}, "No rock set at nowhere.json"),
        ({"rock_weight": "2"}, "rock_weight must be in [0, 1]"),
        ({"rock_window": "-1"}, "rock_window must be a whole number of at least 0"),
        ({"num_generations": "3"}, "do not divide into groups of num_generations=3"),
        ({"weight_normalization": "sum"}, "weight_normalization must be one of"),
        ({"micro_batching": "loose"}, "micro_batching must be one of"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
        ({"resume_from_checkpoint": True}, "There is no checkpoint in"),
        ({"model_name_or_path": "./nowhere"}, "nowhere"),
        ({"teacher_model_init_kwargs": '{"foo": 1}'}, "cannot be loaded with `teacher_model_init_kwargs`"),
        ({"attn_implementation": "flash_attention_2"}, "lash"),
        ({"use_vllm": True}, "vLLM is not available"),
        ({"teacher_tokenizer_name_or_path": "./nowhere"}, "holds no tokenizer"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_exit_code_one(world, tmp_path, capsys, changes, sentence):
    if changes.get("dataset_name") == "BROKEN":
        changes = {"dataset_name": tmp_path / "broken.jsonl"}
        changes["dataset_name"].write_text('{"prompt": "a"}\n{"prompt": ')
    if changes.get("dataset_name") == "EMPTY":
        changes = {"dataset_name": tmp_path / "empty.jsonl"}
        changes["dataset_name"].touch()
    assert main(["train", *flags(world, tmp_path / "out", **changes)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("trl-opd train: error: ")
    assert sentence in last


@pytest.mark.parametrize(("content", "sentence"), [(None, "No such file"), ("a: [", "is not YAML"), ("- a", "mapping")])
def test_a_wrong_config_file_is_one_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["train", "--config", str(path)]) == 1
    assert sentence in capsys.readouterr().err


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n" for before, one in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{one}: &{one} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, one in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (BOMB, "with its anchors unfolded it has more than 16384 values"),
        (MERGES, "with its anchors unfolded it has more than 16384 values"),
        ("output_dir: &a [*a]", "with its anchors unfolded it has more than"),
        ("output_dir: " + "[" * 500, "nested too deeply"),
        ("a: '" + "x" * 70_000 + "'", "it has more than 65536 bytes"),
        ("seed: !!python/object/apply:os.system ['touch ran']", "is not YAML: could not determine a constructor"),
        ("learning_rate: !!float ''", "is not YAML"),
        ("bf16: !!bool perhaps", "is not YAML: 'perhaps'"),
        ("1: 2", "1 is no name of an option"),
        ("self: 2", "'self' is no name of an option"),
        ("env: [A]", "env must be a mapping of names to values"),
        ("learning_rate: [1]", "learning_rate is [1], and must be float"),
        ("max_steps: 1.5", "max_steps is 1.5, and must be int"),
        ("output_dir: {a: 1}", "output_dir is {'a': 1}, and must be str"),
        ("output_dir: true", "output_dir is True, and must be str"),
        ("lora_target_modules: {a: 1}", "lora_target_modules is {'a': 1}, and must be list"),
        ("generation_kwargs: greedy", "generation_kwargs takes a dictionary such as {'do_sample': False}"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_sentence(tmp_path, monkeypatch, capsys, content, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(content)
    assert main(["train", "--config", "recipe.yaml", "--use_cpu", "--bf16", "false"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_anchors_merges_and_numbers_of_a_recipe_are_read(tmp_path, monkeypatch):
    from trl_opd.cli.models import make_parser
    from trl_opd.cli.train import parse

    monkeypatch.setenv("OPD_TEST", "before")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env: {OPD_TEST: 3}\noutput_dir: &name 2026\nrun_name: *name\nlearning_rate: 1\nlora_r: 4\n")
    on_this_machine = ["--use_cpu", "--bf16", "false", "--lora_r", "8"]
    _, training_args, model_args, _ = parse(make_parser(), ["--config", str(recipe), *on_this_machine])
    assert (training_args.output_dir, training_args.run_name, training_args.learning_rate) == ("2026", "2026", 1)
    assert model_args.lora_r == 8, "a flag comes before the file"
    assert os.environ["OPD_TEST"] == "3"
    recipe.write_text("no_such_option: 1")
    with pytest.raises(SystemExit):
        parse(make_parser(), ["--config", str(recipe), *on_this_machine])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("resume_from_checkpoint: false", "resume_from_checkpoint", False),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("max_steps: 100.0", "max_steps", 100),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("run_name: 2026-11-24", "run_name", "2026-11-24"),
        ("run_name: 7", "run_name", "7"),
    ],
)
def test_a_value_of_a_file_is_of_the_kind_that_its_option_takes(tmp_path, line, name, value):
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n{line}\n")
    _, config, *_ = parse(make_parser(), ["--config", str(tmp_path / "recipe.yaml")])
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


def test_a_word_that_yaml_reads_as_a_truth_is_told(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("save_strategy: no\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 1
    assert "YAML reads yes, no, on and off as truths: put them in quotes" in capsys.readouterr().err


def test_weights_that_are_a_pointer_are_named_as_such(world, tmp_path, capsys):
    student = tmp_path / "student"
    shutil.copytree(world / "student", student)
    (student / "model.safetensors").unlink()
    (student / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert main(["train", *flags(world, tmp_path / "out", model_name_or_path=student)]) == 1
    assert "trl-opd train: error: The folder of student or teacher holds a file that torch" in capsys.readouterr().err


def test_the_config_may_stand_behind_an_equals_sign(tmp_path, capsys):
    assert main(["train", f"--config={tmp_path / 'nowhere.yaml'}"]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["distil"], ["train", "--config"], ["train", "--no_such_option", "1"]])
def test_bad_usage_is_exit_code_two(argv, world, tmp_path, capsys):
    if "--no_such_option" in argv:
        argv = [*argv, *flags(world, tmp_path)]
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr().err
    assert "usage: trl-opd" in printed
    assert len(printed.splitlines()) < 20


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_into_the_options_it_names(recipe, tmp_path):
    from trl_opd.cli.models import make_parser
    from trl_opd.cli.train import parse

    on_this_machine = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    script_args, training_args, model_args, _ = parse(make_parser(), ["--config", str(recipe), *on_this_machine])
    assert training_args.num_generations == 4
    assert script_args.dataset_name
    assert model_args.lora_dropout == 0.0 or not model_args.use_peft
