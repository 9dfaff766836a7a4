"""A LoRA student that is saved as a whole model computes what it computed with its adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_opd import OPDTrainer
from trl_opd.models.quantised import make_readable
from trl_opd.saving.merging import replace_by_merged

from tests.helpers.tiny import make_config, make_dataset, make_model
from tests.helpers.trainers import build

IDS = torch.tensor([[1, 87, 85, 274, 201, 40, 50], [3, 5, 299, 17, 201, 9, 12]])
QUANTISED = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def student(path, family: str, quantization: str | None, **changes):
    """Return a student with a random adapter, on a base that was loaded from a folder."""
    make_model(family, width=64).save_pretrained(path)
    config = None if quantization is None else BitsAndBytesConfig(**QUANTISED[quantization])
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    torch.manual_seed(3)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **changes))


@pytest.mark.parametrize(
    "changes", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=["lora", "head", "dora"]
)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "gpt2", "phi"])
def test_the_merged_model_computes_what_the_student_computed(tmp_path, family, changes):
    model = student(tmp_path / "base", family, None, **changes)
    if "modules_to_save" in changes:
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    want, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "student")
    drawn = torch.get_rng_state()
    replace_by_merged(model, tmp_path / "student")
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), want, rtol=0, atol=1e-4
    )
    assert not list((tmp_path / "student").glob("adapter*"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_quantised_base_is_merged_as_it_was_trained_on(tmp_path, family, quantization):
    """So it is far nearer to the student than the adapter on the base's full weights is."""
    model = student(tmp_path / "base", family, quantization)
    make_readable(model)  # as the trainer does
    want = logits(model)
    model.save_pretrained(tmp_path / "student")
    other = get_peft_model(make_model(family, width=64), model.peft_config["default"])
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    replace_by_merged(model, tmp_path / "student")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert getattr(got.config, "quantization_config", None) is None
    errors = [float((logits(one) - want).abs().mean()) for one in (got, other)]
    # 8-bit layers round what goes in, too, and a merged one does not.
    assert errors[0] < (1e-4 if quantization == "4bit" else 0.06)
    assert errors[1] > 0.01


def test_weights_that_cannot_be_read_are_told(tmp_path):
    model = student(tmp_path / "base", "qwen3", "4bit")
    model.save_pretrained(tmp_path / "student")
    logits(model)  # packs them, on processors that can
    state = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.quant_state
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packed for a CPU"):
        replace_by_merged(model, tmp_path / "student")
    assert (tmp_path / "student" / "adapter_model.safetensors").is_file()


def two_adapters() -> torch.nn.Module:
    model = get_peft_model(make_model(seed=0), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    return model


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "pissa": (LoraConfig(**LORA, init_lora_weights="pissa"), {}),
    "olora": (LoraConfig(**LORA, init_lora_weights="olora"), {}),
    "embeddings of a tied model": (
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
        {"family": "qwen3_tied"},
    ),
    "tokens of a tied model": (LoraConfig(**LORA, trainable_token_indices=[5, 6, 7]), {"family": "qwen3_tied"}),
    "tokens": (LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [5, 6, 7]}), {}),
    "vera": (VeraConfig(r=4, target_modules=["q_proj"]), {}),
    "the second of two": (None, {}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_adapters_of_every_kind_are_merged_as_they_were_trained(tmp_path, kind):
    config, model = KINDS[kind]
    student = two_adapters() if config is None else make_model(**model, seed=0)
    trainer = build(tmp_path, student=student, peft_config=config, merge_adapter=True, max_steps=2, learning_rate=3e-2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"adapter_model.safetensors", "adapter_config.json", "second"}
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(found, logits(trainer.model), rtol=0, atol=1e-4)


def test_merged_model_that_differs_is_refused_and_the_adapter_is_kept(tmp_path, monkeypatch):
    config = LoraConfig(**LORA, init_lora_weights=False)
    trainer = build(tmp_path, student=make_model(seed=0), peft_config=config, merge_adapter=True, max_steps=1)
    trainer.train()
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model: model.unload(), raising=False)
    with pytest.raises(ValueError, match=r"differs from the student by a mean KL of .* The adapter is saved instead"):
        trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def run(tokenizer, path, peft_config, **changes) -> OPDTrainer:
    trainer = OPDTrainer(
        model=make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(path, merge_adapter=True, **changes),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.slow
def test_checkpoints_keep_the_adapter_and_the_end_is_a_whole_model(tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = run(tokenizer, tmp_path, lora, save_strategy="steps", save_steps=1)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(got, logits(trainer.model), rtol=0, atol=1e-4)
    resumed = run(tokenizer, tmp_path, lora, save_strategy="steps", save_steps=1, max_steps=3)
    assert resumed.state.global_step == 3


def test_a_student_without_an_adapter_is_not_merged(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="merge_adapter is for a student with a LoRA adapter"):
        run(tokenizer, tmp_path, None)


def test_sharded_weights_are_not_merged(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="merge_adapter does not work with FSDP"):
        run(tokenizer, tmp_path, LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize(("given", "kept"), [({}, "end"), ({"hub_strategy": "checkpoint"}, "checkpoint")])
def test_no_adapter_of_a_checkpoint_is_pushed_beside_a_merged_model(tmp_path, given, kept):
    assert make_config(tmp_path, merge_adapter=True, **given).hub_strategy.value == kept
    assert make_config(tmp_path).hub_strategy.value == "every_save"
