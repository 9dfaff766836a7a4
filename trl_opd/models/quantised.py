"""Checks and conversions that make quantised and adapted layers readable by the divergence and trainable."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device, is_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from ..loss.lm_head import LMHead, lm_head


def read_head(model: torch.nn.Module) -> LMHead:
    """Return the LM head of an unwrapped model, also where a `device_map` has offloaded its weights."""
    with align_module_device(model.get_output_embeddings()):
        return lm_head(model)


def make_readable(model: PreTrainedModel) -> None:
    """Convert the quantised layers of a student or teacher in place to the form that the trainer reads and trains.

    Raises:
        `ValueError`: if the LM head cannot be dequantised.
    """
    dequantize_head(model)
    keep_4bit_layout(model)


def dequantize_head(model: PreTrainedModel) -> None:
    """Replace an LM head that bitsandbytes has quantised by one in full precision; leave any other head as it is.

    The divergence reads the head's weight directly, and a packed weight has neither the right shape nor the values.

    Raises:
        `ValueError`: if the head is quantised in a way that cannot be undone here.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    head = model.get_output_embeddings()
    if head.weight.is_floating_point():
        return
    weight = dequantize_bnb_weight(head.weight, getattr(head, "state", None))
    if not weight.is_floating_point():
        raise ValueError(
            "The LM head of student or teacher is quantised in a way that cannot be undone here: load it with "
            "`lm_head` among the modules that its quantisation skips (`llm_int8_skip_modules`)."
        )
    rows, columns = weight.shape
    full = torch.nn.Linear(columns, rows, bias=head.bias is not None, device="meta")
    full.weight = torch.nn.Parameter(weight.to(model.dtype), requires_grad=False)
    if head.bias is not None:
        full.bias = head.bias
    model.set_output_embeddings(full)


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """Keep the 4-bit layers of a model in the layout that has gradients, on every CPU.

    On CPUs with avx512_bf16, bitsandbytes 0.50 repacks a `Linear4bit` at its first forward in eval mode. The packed
    layout has no backward (every gradient of a QLoRA student is None from then on) and crashes on widths that 32 does
    not divide. The layout was introduced by
    https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804; this can go when the packed layout can be
    trained.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_scalable(model: torch.nn.Module) -> None:
    """Convert the trainable weights of a student to float32 where they are in half precision, for training in fp16.

    The gradient scaler of fp16 takes float32 gradients only, and TRL converts the adapter of a quantised student to
    bfloat16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def is_by_bitsandbytes(config: BitsAndBytesConfig | dict | None) -> bool:
    """Return whether a quantisation config is one of bitsandbytes."""
    if isinstance(config, dict):
        return bool(config.get("load_in_4bit") or config.get("load_in_8bit"))
    return isinstance(config, BitsAndBytesConfig)


def require_linear_weights(name: str, kwargs: dict) -> None:
    """Raise `ValueError` if more than a tenth of a model's weights are fused experts, which would stay unquantised.

    Only the configuration is read. bitsandbytes quantises only `torch.nn.Linear`, and transformers 5 keeps the
    experts of Qwen3-MoE and others as one fused parameter each: 28.99 of 30.53 billion weights.
    """
    hub = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    config = AutoConfig.from_pretrained(name, **hub)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return  # for other classes, or custom code from the Hub, the layers are unknown until the model is loaded
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    fused = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 2)
    total = sum(parameter.numel() for parameter in model.parameters())
    if fused > total / 10:
        raise ValueError(
            f"The teacher {name} cannot be quantised by bitsandbytes: its experts are fused parameters, so "
            f"{fused / 1e9:.2f} of {total / 1e9:.2f} billion weights would stay unquantised. Use a dense teacher, or "
            "load it without quantisation (`trl-opd fit` prints its real size)."
        )
