"""`trl-opd fit`: the printed plan, changes for one that does not fit, wrong input, and the tables of the pages."""

import json
import re

import pytest
import yaml

from trl_opd.models.memory_plan import GIB, Setup, peak
from trl_opd.models.shape import read_shape

from tests.helpers.paths import ROOT
from tests.helpers.qwen3 import save_config


@pytest.fixture
def pair(tmp_path) -> list[str]:
    models = save_config(tmp_path, "4B"), save_config(tmp_path, "14B")
    return ["fit", "--model_name_or_path", models[0], "--teacher_model_name_or_path", models[1]]


FOURTEEN = ["--teacher_quantization", "4bit", "--teacher_placement", "parked", "--use_peft"]


def test_plan_that_fits_says_so(pair, output_of):
    printed = output_of(*pair, *FOURTEEN, "--gpu", "24GB", "--per_device_train_batch_size", "4")
    assert "KV cache" in printed
    assert printed.splitlines()[-1].startswith("It fits: at most ")
    assert "of 23.25 GiB. Predicted, not measured." in printed


def test_plan_that_does_not_fit_names_changes_that_would(pair, output_of):
    printed = output_of(*pair, "--teacher_quantization", "4bit", "--use_peft", "--gpu", "20GB")
    assert "It does not fit" in printed
    assert "--teacher_placement parked" in printed
    printed = output_of(*pair, *FOURTEEN, "--gpu", "4GB")
    assert "None of the known changes is enough. Even " in printed


def test_json_is_one_object_with_the_same_numbers(pair, output_of):
    plan = json.loads(output_of(*pair, *FOURTEEN, "--gpu", "24GB", "--reserve", "1.5", "--json"))
    assert plan["available"] == 22.5 * GIB
    assert plan["peak"] == max(sum(parts.values()) for parts in plan["phases"].values())
    assert plan["fits"] == (plan["peak"] <= plan["available"])
    assert plan["changes"] == []


def test_settings_may_come_from_a_file(pair, tmp_path, output_of):
    (tmp_path / "fit.yaml").write_text("gpu: 24GB\nuse_peft: true\nteacher_quantization: 4bit\n")
    assert "GiB on the GPU" in output_of(*pair, "--config", tmp_path / "fit.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--gpu", "big"], "--gpu takes a size such as 24GB, got 'big'"),
        (["--gpu", "0GB"], "--gpu takes a size"),
        (["--teacher_quantization", "3bit"], "--teacher_quantization must be one of 8bit, 4bit"),
        (["--teacher_placement", "away"], "--teacher_placement must be one of resident, parked"),
        (["--teacher_placement", "parked", "--teacher_quantization", "8bit"], "cannot move a teacher"),
        (["--load_in_4bit"], "add --use_peft"),
        (
            ["--max_completion_length", "0"],
            "--max_completion_length must be a whole number of at least 1",
        ),
        (["--reserve", "-1"], "--reserve must be a number of GiB"),
        (["--reserve", "nan"], "--reserve must be a number of GiB"),
        (["--reserve", "inf"], "--reserve must be a number of GiB"),
        (["--reserve", "24"], "--reserve 24.0 leaves nothing of --gpu 24GB"),
        (["--model_name_or_path", " "], "--model_name_or_path takes a folder or a name"),
        (["--dtype", "int3"], "--dtype must be one of bfloat16, float16, float32"),
    ],
)
def test_wrong_value_is_a_one_line_error_before_anything_is_read(changes, message, error_of):
    nowhere = ["fit", "--model_name_or_path", "/nowhere/s", "--teacher_model_name_or_path", "/nowhere/t"]
    assert message in error_of(*nowhere, "--gpu", "24GB", *changes)


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
def test_value_of_the_wrong_type_in_a_file_is_a_one_line_error(pair, tmp_path, line, message, error_of):
    (tmp_path / "fit.yaml").write_text(f"gpu: 24GB\n{line}\n")
    models = pair if "model_name" not in line else ["fit", *pair[3:]]
    assert message in error_of(*models, "--config", tmp_path / "fit.yaml")


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
@pytest.mark.slow
def test_unreadable_configuration_is_a_one_line_error(tmp_path, pair, content, error_of):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    error_of(*pair, "--gpu", "24GB", "--model_name_or_path", tmp_path)


def test_missing_folder_is_named(pair, error_of):
    error = error_of(*pair, "--gpu", "24GB", "--model_name_or_path", "/nowhere")
    assert "There is no model in /nowhere: no such folder." in error


@pytest.mark.slow
def test_table_of_the_page_has_the_numbers_of_the_planner(tmp_path):
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
def test_recipes_fit_their_gpus(tmp_path, recipe, card):
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
