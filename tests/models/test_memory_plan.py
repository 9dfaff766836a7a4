"""The planner behind `trl-opd fit`: weights to the byte, sums by hand, changes that help, and the command."""

import dataclasses
import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.kernels import chunked_divergence

from trl_opd.cli import fit, main
from trl_opd.models import memory_plan as memory
from trl_opd.models.memory_plan import GIB, Setup, cheaper, parse_gigabytes, peak, phases
from trl_opd.models.shape import quantization_constants, read_shape, shape_of, weight_bytes
from trl_opd.training import teacher_states as teacher_phase

from tests.helpers.paths import ROOT
from tests.helpers.tiny import make_model

# The public configurations of Qwen3: hidden width, layers, heads, intermediate width, tied; weights in billions, and
# gigabytes in 4 bits (docs of the models; DECISIONS, "Teacher").
REAL = {
    "0.6B": ((1024, 28, 16, 3072, True), 0.60, 0.54),
    "1.7B": ((2048, 28, 16, 6144, True), 1.72, 1.35),
    "4B": ((2560, 36, 32, 9728, True), 4.02, 2.65),
    "8B": ((4096, 36, 32, 12288, False), 8.19, 6.07),
    "14B": ((5120, 40, 40, 17408, False), 14.77, 9.9),
    "32B": ((5120, 64, 64, 25600, False), 32.76, 19.2),
}


def real_config(name) -> Qwen3Config:
    width, layers, heads, intermediate, tied = REAL[name][0]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
    )


def save_config(path, name) -> str:
    real_config(name).save_pretrained(path / name)
    return str(path / name)


def stored_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a real model's parameters and of the constants of its quantisation."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = () if state.state2 is None else (state.offset, state.state2.absmax, state.state2.code)
            total += sum(tensor.numel() * tensor.element_size() for tensor in (state.absmax, state.code, *inner))
        scale = getattr(parameter, "SCB", None)
        if scale is not None:
            total += scale.numel() * scale.element_size()
    return total


# Weights


FAMILIES = ["qwen3", "qwen3_tied", "llama", "phi", "gemma2", "gpt2", "opt", "granite", "cohere"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_unquantised_weights_are_counted_to_the_byte(family, dtype, size):
    model = make_model(family).to(dtype)
    assert weight_bytes(shape_of(model), None, size) == stored_bytes(model)


@pytest.mark.parametrize(
    ("family", "width", "nested"),
    [
        *((family, 64, True) for family in FAMILIES),
        ("qwen3", 96, True),
        ("qwen3", 64, False),
        ("qwen3_tied", 96, False),
    ],
)
def test_four_bit_weights_are_counted_to_the_byte(tmp_path, family, width, nested):
    make_model(family, width=width).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert weight_bytes(read_shape(str(tmp_path)), "4bit", 2, nested=nested) == stored_bytes(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bit_weights_are_counted_to_the_byte(tmp_path, family):
    make_model(family, width=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert weight_bytes(read_shape(str(tmp_path)), "8bit", 2) == stored_bytes(model)


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_are_those_that_are_known(tmp_path, name):
    shape = read_shape(save_config(tmp_path, name))
    _, billions, gigabytes = REAL[name]
    assert shape.size / 1e9 == pytest.approx(billions, abs=0.01)
    assert weight_bytes(shape, "4bit", 2) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(real_config(name))
    assert weight_bytes(shape, None, 4) == stored_bytes(model)


def test_fused_experts_stay_as_they_are():
    config = Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        shape = shape_of(Qwen3MoeForCausalLM(config))
    assert shape.size / 1e9 == pytest.approx(30.53, abs=0.01)
    assert weight_bytes(shape, "4bit", 2) / 1e9 == pytest.approx(59.7, abs=0.05)
    changes = [name for name, _ in cheaper(Setup(student=shape, teacher=shape), 0)]
    assert not any("teacher_quantization" in name or "load_in_4bit" in name for name in changes)


def test_adapters_are_those_of_peft():
    model = make_model("qwen3", width=64)
    setup = Setup(student=shape_of(model), teacher=shape_of(model), lora_r=8)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    real = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    parts = phases(setup)["student"]
    assert parts["adapters"] == parts["gradients"] == real
    assert parts["optimizer"] == 2 * real
    quantised = phases(replace(setup, load_in_4bit=True))["student"]
    assert quantised["adapters"] == real // 2  # TRL holds them in bfloat16 then


# Sums


def make_setup(**changes) -> Setup:
    shape = shape_of(make_model("qwen3", width=64))
    return replace(Setup(student=shape, teacher=shape, lora_r=4, per_device=2, accumulation=3), **changes)


def test_the_cache_of_keys_and_values_is_that_of_a_forward():
    model = make_model("qwen3", width=64)
    setup = make_setup(bytes_per_weight=4, prompt_length=5, completion_length=7)
    cache = model(input_ids=torch.ones(6, 12, dtype=torch.long), use_cache=True).past_key_values
    real = sum(tensor.numel() * 4 for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert phases(setup)["generation"]["KV cache"] == real


def test_a_plan_is_the_sum_of_what_is_there_at_once():
    setup = make_setup(completion_length=10)
    parts = phases(setup)
    base = weight_bytes(setup.student, None, 2)
    for phase in parts.values():
        assert phase["student weights"] == base
        assert phase["teacher on the card"] == base  # of the same shape, resident
    assert parts["teacher"]["teacher's hidden states"] == 6 * 10 * 64 * 2
    assert parts["student"]["gradients"] > 0
    assert not {"gradients", "student activations"} & (parts["generation"].keys() | parts["teacher"].keys())
    assert peak(setup) == max(sum(phase.values()) for phase in parts.values())


def test_a_parked_teacher_is_on_the_card_in_its_own_phase_only():
    setup = make_setup(teacher_quantization="4bit", teacher_placement="parked")
    resident, parked = phases(replace(setup, teacher_placement="resident")), phases(setup)
    assert parked["teacher"] == resident["teacher"]
    head = 300 * 64 * 2 + quantization_constants(setup.teacher, nested=True)
    for phase in ("generation", "student"):
        assert parked[phase]["teacher on the card"] == head < resident[phase]["teacher on the card"]


@pytest.mark.parametrize(
    "more",
    [
        {"per_device": 4},
        {"accumulation": 30},
        {"prompt_length": 4000},
        {"completion_length": 4000},
        {"lora_r": 64},
        {"lora_r": None, "bytes_per_weight": 4},
    ],
)
def test_more_never_needs_less(more):
    setup = make_setup()
    before, after = phases(setup), phases(replace(setup, **more))
    for phase in before:
        assert sum(after[phase].values()) >= sum(before[phase].values())
    assert sum(map(sum, (p.values() for p in after.values()))) > sum(map(sum, (p.values() for p in before.values())))


def test_what_fits_after_a_change_fits(tmp_path):
    student, teacher = (read_shape(save_config(tmp_path, name)) for name in ("4B", "14B"))
    setup = Setup(student=student, teacher=teacher, teacher_quantization="4bit", lora_r=16, completion_length=1024)
    available = peak(setup) - 1
    found = cheaper(setup, available)
    assert found
    assert all(size <= available for _, size in found)
    assert found[0][0] == "--teacher_placement parked"
    parked = replace(setup, teacher_placement="parked")
    assert found[0][1] == peak(parked)


def test_changes_are_put_together_where_one_is_not_enough(tmp_path):
    student, teacher = (read_shape(save_config(tmp_path, name)) for name in ("4B", "14B"))
    setup = Setup(student=student, teacher=teacher, lora_r=16)
    ((name, size),) = cheaper(setup, 16 * GIB)
    assert " and " in name
    assert size <= 16 * GIB
    ((_, least),) = cheaper(setup, 1 * GIB)
    assert least > 1 * GIB  # and the plan says so


def test_no_change_is_named_that_the_others_make_needless(tmp_path):
    student, teacher = (read_shape(save_config(tmp_path, name)) for name in ("4B", "14B"))
    flags = {
        "--teacher_placement parked": {"teacher_placement": "parked"},
        "--teacher_quantization 4bit": {"teacher_quantization": "4bit"},
        "--use_peft --lora_r 16": {"lora_r": 16},
        "--load_in_4bit": {"load_in_4bit": True},
        "--max_completion_length 256": {"completion_length": 256},
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 8": {"per_device": 1, "accumulation": 8},
    }
    for lora in (16, None):
        setup = Setup(student=student, teacher=teacher, lora_r=lora)
        for card in (16, 20, 24, 32):
            found = cheaper(setup, card * GIB)
            names = [name.removesuffix(" --use_peft") for name in found[0][0].split(" and ")]
            if len(found) > 1 or len(names) == 1 or found[0][1] > card * GIB:
                continue
            for needless in names:
                rest = setup
                for name in names:
                    if name != needless:
                        lora_of_qlora = {"lora_r": 16} if name == "--load_in_4bit" else {}
                        rest = replace(rest, **flags[name], **lora_of_qlora)
                assert peak(rest) > card * GIB, (card, needless, names)


def test_the_sizes_that_the_planner_assumes_are_those_of_the_code():
    assert memory.GROUP_TOKENS == teacher_phase.GROUP_TOKENS
    assert memory.TILE_ROWS == chunked_divergence.TOKEN_CHUNK_SIZE
    assert memory.TILE_ENTRIES == chunked_divergence.VOCAB_CHUNK_SIZE


@pytest.mark.parametrize(
    ("text", "gigabytes"), [("24GB", 24), ("24 GB", 24), ("8gb", 8), ("23.5GB", 23.5), ("80", 80), ("16GiB", 16)]
)
def test_a_card_is_named_by_its_gigabytes(text, gigabytes):
    assert parse_gigabytes(text) == gigabytes * GIB


# The command


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
    assert "No change that is known here is enough. Even " in capsys.readouterr().out


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
    assert "GiB on the card" in capsys.readouterr().out


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
        (["--gpu", "24GB", "--reserve", "-1"], "--reserve counts GiB"),
        (["--gpu", "24GB", "--reserve", "nan"], "--reserve counts GiB"),
        (["--gpu", "24GB", "--reserve", "inf"], "--reserve counts GiB"),
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
        ("reserve: -1", "--reserve counts GiB"),
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
