"""`trl-opd fit`: the plan that it prints, what it says of a plan that does not fit, and the tables of the pages."""

import dataclasses
import json
import re

import pytest
import yaml

from trl_opd.cli import fit, main
from trl_opd.models.memory_plan import GIB, Setup, peak
from trl_opd.models.shape import read_shape

from tests.helpers.paths import ROOT
from tests.helpers.qwen3 import save_config


@pytest.fixture
def pair(tmp_path) -> list[str]:
    models = save_config(tmp_path, "4B"), save_config(tmp_path, "14B")
    return ["fit", "--model_name_or_path", models[0], "--teacher_model_name_or_path", models[1]]


FOURTEEN = ["--teacher_quantization", "4bit", "--teacher_placement", "parked", "--use_peft"]


def test_a_plan_that_fits_says_so(pair, capsys):
    assert main([*pair, *FOURTEEN, "--gpu", "24GB", "--per_device_train_batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "KV cache" in printed
    assert printed.splitlines()[-1].startswith("It fits: at most ")
    assert "of 23.25 GiB. Predicted, not measured." in printed


def test_a_plan_that_does_not_fit_says_what_would(pair, capsys):
    assert main([*pair, "--teacher_quantization", "4bit", "--use_peft", "--gpu", "20GB"]) == 0
    printed = capsys.readouterr().out
    assert "It does not fit" in printed
    assert "--teacher_placement parked" in printed
    assert main([*pair, *FOURTEEN, "--gpu", "4GB"]) == 0
    assert "None of the known changes is enough. Even " in capsys.readouterr().out


def test_json_is_one_object_with_the_same_figures(pair, capsys):
    arguments = [*pair, *FOURTEEN, "--gpu", "24GB", "--reserve", "1.5", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["available"] == 22.5 * GIB
    assert plan["peak"] == max(sum(parts.values()) for parts in plan["phases"].values())
    assert plan["fits"] == (plan["peak"] <= plan["available"])
    assert plan["changes"] == []


def test_settings_may_come_from_a_file(pair, tmp_path, capsys):
    (tmp_path / "fit.yaml").write_text("gpu: 24GB\nuse_peft: true\nteacher_quantization: 4bit\n")
    assert main([*pair, "--config", str(tmp_path / "fit.yaml")]) == 0
    assert "GiB on the GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--gpu", "big"], "--gpu takes a size such as 24GB, got 'big'"),
        (["--gpu", "0GB"], "--gpu takes a size"),
        (["--gpu", "24GB", "--teacher_quantization", "3bit"], "--teacher_quantization must be one of 8bit, 4bit"),
        (["--gpu", "24GB", "--teacher_placement", "away"], "--teacher_placement must be one of resident, parked"),
        (["--gpu", "24GB", "--teacher_placement", "parked", "--teacher_quantization", "8bit"], "cannot move a teacher"),
        (["--gpu", "24GB", "--load_in_4bit"], "add --use_peft"),
        (["--gpu", "24GB", "--max_completion_length", "0"], "--max_completion_length must be a whole number above 0"),
        (["--gpu", "24GB", "--reserve", "-1"], "--reserve must be a number of GiB"),
        (["--gpu", "24GB", "--reserve", "nan"], "--reserve must be a number of GiB"),
        (["--gpu", "24GB", "--reserve", "inf"], "--reserve must be a number of GiB"),
        (["--gpu", "24GB", "--reserve", "24"], "--reserve 24.0 leaves nothing of --gpu 24GB"),
        (["--gpu", "24GB", "--model_name_or_path", " "], "--model_name_or_path takes a folder or a name"),
        (["--gpu", "24GB", "--dtype", "int3"], "--dtype must be one of bfloat16, float16, float32"),
    ],
)
def test_a_wrong_value_is_a_sentence_before_anything_is_read(changes, message, capsys):
    nowhere = ["fit", "--model_name_or_path", "/nowhere/s", "--teacher_model_name_or_path", "/nowhere/t"]
    assert main([*nowhere, *changes]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd fit: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora_r: true", "fit.yaml: lora_r is True, and must be int"),
        ("use_peft: 1", "fit.yaml: use_peft is 1, and must be bool"),
        ("model_name_or_path: ''", "--model_name_or_path takes a folder"),
        ("reserve: [1]", "fit.yaml: reserve is [1], and must be float"),
        ("reserve: -1", "--reserve must be a number of GiB"),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_file_is_a_sentence(pair, tmp_path, line, message, capsys):
    (tmp_path / "fit.yaml").write_text(f"gpu: 24GB\n{line}\n")
    models = pair if "model_name" not in line else ["fit", *pair[3:]]
    assert main([*models, "--config", str(tmp_path / "fit.yaml")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        '{"model_type": "t5"}',
        '{"model_type": "mamba"}',
        '{"model_type": "qwen3", "hidden_size": -4}',
        '{"model_type": "qwen3", "hidden_size": NaN}',
        '{"model_type": "qwen3", "num_hidden_layers": "x"}',
    ],
)
def test_a_configuration_that_cannot_be_read_is_a_sentence(tmp_path, pair, content, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert main([*pair, "--gpu", "24GB", "--model_name_or_path", str(folder)]) == 1
    printed = capsys.readouterr().err
    assert "trl-opd fit: error: " in printed
    assert "Traceback" not in printed


def test_a_folder_that_is_not_there_is_named(pair, capsys):
    assert main([*pair, "--gpu", "24GB", "--model_name_or_path", "/nowhere"]) == 1
    assert "There is no model in /nowhere: no such folder." in capsys.readouterr().err


def test_a_missing_argument_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--gpu", "24GB"])
    assert caught.value.code == 2
    assert "--model_name_or_path" in capsys.readouterr().err


def test_the_help_lists_every_option_with_its_default():
    for option in dataclasses.fields(fit.FitArguments):
        row = next(line for line in fit.HELP.splitlines() if line.startswith(f"  --{option.name}"))
        default = option.default
        if option.name in ("model_name_or_path", "teacher_model_name_or_path", "gpu"):
            assert "required" in row
        elif option.name != "dtype":  # its default depends on the student
            assert f" {str(default).lower() if default is not None else 'none'} " in f"{row} "


def test_the_table_of_the_page_is_what_the_planner_says(tmp_path):
    page = (ROOT / "docs" / "consumer_gpus.md").read_text()
    rows = re.findall(
        r"^\| (\d+) GB \| (\S+) (Q?LoRA) \| (\S+) \| ([\d.]+) \| ([\d.]+) \| predicted \|", page, re.MULTILINE
    )
    assert len(rows) == 8
    for card, student, kind, teacher, largest, available in rows:
        setup = Setup(
            student=read_shape(save_config(tmp_path, student)),
            teacher=read_shape(save_config(tmp_path, teacher)),
            teacher_quantization="4bit",
            teacher_placement="parked",
            lora_r=16,
            load_in_4bit=kind == "QLoRA",
            per_device=2,
            accumulation=8,
            prompt_length=512,
            completion_length=1024,
        )
        assert f"{peak(setup) / GIB:.2f}" == largest
        assert float(available) == int(card) - 0.75 > float(largest)


@pytest.mark.parametrize(("recipe", "card"), [("consumer_8gb", 8), ("consumer_24gb", 24)])
def test_the_recipes_fit_their_cards(tmp_path, recipe, card):
    path = ROOT / "examples" / "recipes" / f"{recipe}.yaml"
    settings = yaml.safe_load(path.read_text())
    models = [
        settings[name].removeprefix("Qwen/Qwen3-") for name in ("model_name_or_path", "teacher_model_name_or_path")
    ]
    student, teacher = (read_shape(save_config(tmp_path, name)) for name in models)
    setup = Setup(
        student=student,
        teacher=teacher,
        teacher_quantization=settings["teacher_quantization"],
        teacher_placement=settings["teacher_placement"],
        lora_r=settings["lora_r"],
        load_in_4bit=settings.get("load_in_4bit", False),
        per_device=settings["per_device_train_batch_size"],
        accumulation=settings["gradient_accumulation_steps"],
        completion_length=settings["max_completion_length"],
    )
    assert peak(setup) < (card - 0.75) * GIB
