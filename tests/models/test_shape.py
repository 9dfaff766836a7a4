"""Shapes of models: weights counted to the byte, in full precision and quantised."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_opd.models.memory_plan import Setup, suggest_savings
from trl_opd.models.shape import read_shape, shape_of, weight_bytes

from tests.helpers.qwen3 import REAL, real_config, save_config
from tests.helpers.tiny import FOUR_BIT, make_model


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


FAMILIES = ["qwen3", "qwen3_tied", "llama", "phi", "gemma2", "gpt2", "opt", "granite", "cohere"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_unquantised_weights_are_counted_to_the_byte(family, dtype, size):
    model = make_model(family).to(dtype)
    assert weight_bytes(shape_of(model), None, size) == stored_bytes(model)


def quantised(path, family: str, width: int, **settings) -> torch.nn.Module:
    make_model(family, width=width).save_pretrained(path)
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)


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
    model = quantised(tmp_path, family, width, **FOUR_BIT, bnb_4bit_use_double_quant=nested)
    assert weight_bytes(read_shape(str(tmp_path)), "4bit", 2, nested=nested) == stored_bytes(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bit_weights_are_counted_to_the_byte(tmp_path, family):
    model = quantised(tmp_path, family, 64, load_in_8bit=True)
    assert weight_bytes(read_shape(str(tmp_path)), "8bit", 2) == stored_bytes(model)


@pytest.mark.parametrize("name", REAL)
def test_sizes_of_real_models_equal_the_published_ones(tmp_path, name):
    shape = read_shape(save_config(tmp_path, name))
    _, billions, gigabytes = REAL[name]
    assert shape.size / 1e9 == pytest.approx(billions, abs=0.01)
    assert weight_bytes(shape, "4bit", 2) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(real_config(name))
    assert weight_bytes(shape, None, 4) == stored_bytes(model)


def test_fused_experts_are_counted_as_unquantised():
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
    changes = [name for name, _ in suggest_savings(Setup(student=shape, teacher=shape), 0)]
    assert not any("teacher_quantization" in name or "load_in_4bit" in name for name in changes)
