"""The teacher: quantised when it is loaded, placed on its device, and errors for settings that cannot work."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from trl_opd import OPDConfig, OPDTrainer

from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.tiny import FOUR_BIT, config_kwargs, make_config, make_dataset, save
from tests.helpers.trainers import PARKED, build, loss_and_gradient

# Quantised


def test_four_bits_are_nf4_twice_quantised_with_a_head_in_full_precision(tmp_path):
    trainer = build(tmp_path, teacher=save(tmp_path / "teacher", seed=1), teacher_quantization="4bit")
    layer = trainer.teacher_model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.float32  # of a CPU
    head = trainer.teacher_model.get_output_embeddings().weight
    assert head.dtype == torch.float32
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").lm_head.weight)


@pytest.mark.parametrize(
    ("bits", "by_hand", "distance"),
    [
        ("4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, 0.3),
        ("8bit", {"load_in_8bit": True}, 0.1),
    ],
)
@pytest.mark.slow
def test_teacher_quantization_equals_the_same_config_in_init_kwargs(tmp_path, bits, by_hand, distance):
    paths = save(tmp_path / "student", seed=0), save(tmp_path / "teacher", seed=1)
    settings = [{}, {"teacher_quantization": bits}, {"teacher_model_init_kwargs": {"quantization_config": by_hand}}]
    exact, one, two = (loss_and_gradient(build(tmp_path, *paths, **given), make_inputs())[0] for given in settings)
    assert one == pytest.approx(two, rel=1e-6)
    assert one == pytest.approx(exact, rel=distance)
    assert one != exact


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantising_fused_experts_raises_before_weights_are_read(tmp_path, bits):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 64}
    config = Qwen3MoeConfig(vocab_size=300, head_dim=16, **shape, **experts)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path / "moe")  # no weights there
    with pytest.raises(ValueError, match=r"experts are fused parameters, so 0\.00 of 0\.00 billion") as caught:
        build(tmp_path, teacher=str(tmp_path / "moe"), teacher_quantization=bits)
    assert "\n" not in str(caught.value)


# Wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_quantization": "3bit"}, "teacher_quantization must be one of"),
        ({"teacher_placement": "away"}, "teacher_placement must be one of"),
        ({"teacher_placement": "parked", "teacher_quantization": "8bit"}, "cannot move an 8-bit teacher"),
        (
            {"teacher_quantization": "4bit", "teacher_model_init_kwargs": {"quantization_config": FOUR_BIT}},
            "choose one",
        ),
        ({"teacher_device": "gpu one"}, "teacher_device must be 'cpu', a GPU"),
        ({"teacher_device": "meta"}, "teacher_device must be 'cpu', a GPU"),
        ({"teacher_device": "mps"}, "teacher_device must be 'cpu', a GPU"),
        ({"teacher_device": 3.5}, "teacher_device must be 'cpu', a GPU"),
    ],
)
def test_invalid_settings_are_a_one_line_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        OPDConfig(**config_kwargs(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_quantising_an_instantiated_teacher_raises(tmp_path):
    with pytest.raises(ValueError, match="`teacher_quantization` has no effect on a teacher that is already inst"):
        build(tmp_path, teacher_quantization="4bit")


@pytest.mark.parametrize("changes", [PARKED, {"teacher_device": "cpu"}])
@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_a_sharded_teacher_is_not_moved(tmp_path, monkeypatch, changes, sharding):
    config = make_config(tmp_path, **changes)
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    with pytest.raises(ValueError, match=f"does not work with {sharding}"):
        OPDTrainer("no such student", "no such teacher", config, make_dataset())


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has the device")
def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_device='cuda:7': there are \d CUDA devices here"):
        build(tmp_path, teacher_device="cuda:7")


def test_configured_teacher_device_gives_the_same_loss(tmp_path):
    found = [
        loss_and_gradient(build(tmp_path, **changes), make_inputs()) for changes in ({}, {"teacher_device": "cpu"})
    ]
    assert found[0][0] == found[1][0]
