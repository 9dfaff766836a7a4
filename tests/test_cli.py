"""`trl-opd`: help without torch, real runs from flags and from YAML, resuming, a sentence for every wrong input."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from trl import DistillationConfig

from trl_opd import OPDConfig
from trl_opd.cli import COMMANDS, main
from trl_opd.cli.collect import CollectArguments
from trl_opd.cli.demo import DemoArguments
from trl_opd.cli.detect import DetectArguments
from trl_opd.cli.fit import FitArguments
from trl_opd.cli.gradients import GradientArguments
from trl_opd.cli.models import make_parser
from trl_opd.cli.options import Option, options_of, options_of_config, show_default
from trl_opd.cli.parsing import parse
from trl_opd.cli.probe import ProbeArguments
from trl_opd.cli.report import ReportArguments

from .test_laws import rock_file
from .tiny import PROMPTS, make_model, make_tokenizer

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a student, a teacher, chat prompts and plain prompts."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("student", "teacher")):
        make_model("qwen3", seed=seed, width=64).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    chats = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n")
    return folder


def flags(world: Path, output: Path, **changes) -> list[str]:
    """Return the flags of a short run; a value of `True` stands for a flag without one, `None` leaves it out."""
    settings = {
        "model_name_or_path": world / "student",
        "teacher_model_name_or_path": world / "teacher",
        "dataset_name": world / "chats.jsonl",
        "output_dir": output,
        "use_cpu": True,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
        **changes,
    }
    given = [(name, value) for name, value in settings.items() if value is not None]
    return [part for name, value in given for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


@pytest.mark.parametrize("command", ["--help", *COMMANDS])
def test_help_answers_in_a_second_without_torch(command):
    argv = [command] if command == "--help" else [command, "--help"]
    code = (
        f"import sys; from trl_opd.cli import main; main({argv!r}); "
        "sys.exit(len({'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - began < 1.0
    assert run.stdout.startswith("usage: trl-opd ")
    assert max(map(len, run.stdout.splitlines())) <= 120
    if command == "--help":
        assert all(f"\n  {name} " in run.stdout for name in COMMANDS)


OPTIONS = {
    "collect": options_of(CollectArguments),
    "demo": options_of(DemoArguments),
    "detect": options_of(DetectArguments),
    "fit": options_of(FitArguments),
    "gradients": options_of(GradientArguments),
    "probe": options_of(ProbeArguments),
    "report": options_of(ReportArguments),
    "train": options_of_config(),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option_with_its_default_and_its_documentation(command, capsys):
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    words = " ".join(page.split())
    for option in OPTIONS[command]:
        assert option.help.endswith(".")
        assert " ".join(option.help.split()) in words, option.name
        row = next(line for line in page.splitlines() if line.startswith(f"  --{option.name} "))
        assert f" {show_default(option)} " in row or " required " in row


def test_the_options_that_help_reads_are_the_fields_of_the_config():
    inherited = {field.name for field in dataclasses.fields(DistillationConfig)}
    new = [field for field in dataclasses.fields(OPDConfig) if field.name not in inherited]
    assert options_of_config() == [Option(field.name, field.default, field.metadata["help"]) for field in new]


def test_the_docstring_of_the_config_documents_every_field():
    words = " ".join(OPDConfig.__doc__.split())
    for option in options_of_config():
        assert re.search(rf"^    {option.name} \(`\w+`.*, \*optional\*", OPDConfig.__doc__, re.MULTILINE)
        assert f": {' '.join(option.help.split())} " in f"{words} "
    assert OPDConfig.__doc__.count("\n    > Parameters that ") == 4
    assert "rock_weight (`float`, *optional*, defaults to `0.0`):" in OPDConfig.__doc__
    assert 'micro_batching (`str`, *optional*, defaults to `"tight"`):' in OPDConfig.__doc__


def test_help_all_lists_the_options_of_trl_and_ours(capsys):
    assert main(["train", "--help_all"]) == 0
    printed = capsys.readouterr().out
    ours = [option.name for option in OPTIONS["train"]]
    assert all(f"--{name}" in printed for name in (*ours, "lora_r", "dataset_name", "max_completion_length"))


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


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "true"),
        (["--resume_from_checkpoint", "--seed", "7"], "true"),
        (["--resume-from-checkpoint"], "true"),
        (["--resume_from_checkpoint", "checkpoint-3"], "checkpoint-3"),
        (["--resume_from_checkpoint=checkpoint-3"], "checkpoint-3"),
        (["--resume_from_checkpoint=true"], "true"),
        (["--resume_from", "--seed", "7"], "true"),  # argparse takes a unique beginning
    ],
)
def test_resume_may_stand_without_a_value(tmp_path, words, value):
    given = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    for argv in ([*given, *words], [*words, *given]):
        _, config, *_ = parse(make_parser(), argv)
        assert config.resume_from_checkpoint == value
        assert config.output_dir == str(tmp_path)


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
