"""The memory planner: adapters and sums computed by hand, suggested changes, and the sizes that it assumes."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.kernels import chunked_divergence

from trl_opd.models import memory_plan
from trl_opd.models.memory_plan import GIB, Setup, parse_gigabytes, peak, phases, suggest_savings
from trl_opd.models.shape import quantization_constants, read_shape, shape_of, weight_bytes
from trl_opd.training import teacher_states

from tests.helpers.qwen3 import save_config
from tests.helpers.tiny import make_model


def make_setup(**changes) -> Setup:
    shape = shape_of(make_model("qwen3", width=64))
    return replace(Setup(student=shape, teacher=shape, lora_r=4, per_device=2, accumulation=3), **changes)


def test_adapter_bytes_equal_those_of_peft():
    setup = make_setup(lora_r=8)
    adapted = get_peft_model(make_model("qwen3", width=64), LoraConfig(r=8, target_modules="all-linear"))
    real = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    parts = phases(setup)["student"]
    assert parts["adapters"] == parts["gradients"] == real
    assert parts["optimizer"] == 2 * real
    quantised = phases(replace(setup, load_in_4bit=True))["student"]
    assert quantised["adapters"] == real // 2  # TRL holds them in bfloat16 then


def test_kv_cache_bytes_equal_those_of_a_forward():
    setup = make_setup(bytes_per_weight=4, prompt_length=5, completion_length=7)
    model = make_model("qwen3", width=64)
    cache = model(input_ids=torch.ones(6, 12, dtype=torch.long), use_cache=True).past_key_values
    real = sum(tensor.numel() * 4 for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert phases(setup)["generation"]["KV cache"] == real


def test_peak_is_the_largest_sum_of_a_phase():
    setup = make_setup(completion_length=10)
    parts = phases(setup)
    base = weight_bytes(setup.student, None, 2)
    for phase in parts.values():
        assert phase["student weights"] == base
        assert phase["teacher on the GPU"] == base  # of the same shape, resident
    assert parts["teacher"]["teacher's hidden states"] == 6 * 10 * 64 * 2
    assert parts["student"]["gradients"] > 0
    assert not {"gradients", "student activations"} & (parts["generation"].keys() | parts["teacher"].keys())
    assert peak(setup) == max(sum(phase.values()) for phase in parts.values())


def test_parked_teacher_is_on_the_gpu_only_in_its_own_phase():
    setup = make_setup(teacher_quantization="4bit", teacher_placement="parked")
    resident, parked = phases(replace(setup, teacher_placement="resident")), phases(setup)
    assert parked["teacher"] == resident["teacher"]
    head = 300 * 64 * 2 + quantization_constants(setup.teacher, nested=True)
    for phase in ("generation", "student"):
        assert parked[phase]["teacher on the GPU"] == head < resident[phase]["teacher on the GPU"]


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
def test_larger_setting_never_needs_less_memory(more):
    setup = make_setup()
    before, after = phases(setup), phases(replace(setup, **more))
    growth = [sum(after[phase].values()) - sum(before[phase].values()) for phase in before]
    assert min(growth) >= 0
    assert max(growth) > 0


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Return the shapes of Qwen3 4B and 14B."""
    folder = tmp_path_factory.mktemp("shapes")
    return [read_shape(save_config(folder, name)) for name in ("4B", "14B")]


def test_each_suggested_change_fits_in_the_memory(shapes):
    student, teacher = shapes
    setup = Setup(student=student, teacher=teacher, teacher_quantization="4bit", lora_r=16, completion_length=1024)
    available = peak(setup) - 1
    found = suggest_savings(setup, available)
    assert found
    assert all(size <= available for _, size in found)
    assert found[0][0] == "--teacher_placement parked"
    parked = replace(setup, teacher_placement="parked")
    assert found[0][1] == peak(parked)


def test_changes_are_combined_if_one_is_not_enough(shapes):
    student, teacher = shapes
    setup = Setup(student=student, teacher=teacher, lora_r=16)
    ((name, size),) = suggest_savings(setup, 16 * GIB)
    assert " and " in name
    assert size <= 16 * GIB
    ((_, least),) = suggest_savings(setup, 1 * GIB)
    assert least > 1 * GIB  # even all changes together do not fit, and the peak shows it


def test_combination_contains_no_unnecessary_change(shapes):
    student, teacher = shapes
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
            found = suggest_savings(setup, card * GIB)
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


def test_sizes_that_the_planner_assumes_equal_those_in_use():
    assert memory_plan.GROUP_TOKENS == teacher_states.GROUP_TOKENS
    assert memory_plan.TILE_ROWS == chunked_divergence.TOKEN_CHUNK_SIZE
    assert memory_plan.TILE_ENTRIES == chunked_divergence.VOCAB_CHUNK_SIZE


@pytest.mark.parametrize(
    ("text", "gigabytes"), [("24GB", 24), ("24 GB", 24), ("8gb", 8), ("23.5GB", 23.5), ("80", 80), ("16GiB", 16)]
)
def test_gpu_size_is_read_in_gigabytes(text, gigabytes):
    assert parse_gigabytes(text) == gigabytes * GIB
