"""Merges a LoRA student into a full model that computes the same, for users who load it without PEFT."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def replace_by_merged(model: PeftModel, folder: str | os.PathLike) -> None:
    """Write the merged model in the place of an adapter that was saved to a folder.

    Built from the weights that the adapter was trained on, those of a quantised base in full precision again: so the
    merged model computes what the student computed, not what the adapter would do on other weights. It is built on the
    host and takes as much of its memory as the whole model.

    Args:
        model (`peft.PeftModel`): The student, unwrapped.
        folder (`str` or `os.PathLike`): Where its adapter lies.

    Raises:
        `ValueError`: if bitsandbytes has packed a 4-bit base ([`OPDTrainer`] keeps it from that).
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):  # the new model draws random weights, which are then overwritten
        merged = PeftModel.from_pretrained(_base_on_host(model), folder).merge_and_unload()
    merged.save_pretrained(folder)
    remove_adapter(folder)


def remove_adapter(folder: str | os.PathLike) -> None:
    """Remove an adapter's files from a folder, if there are any."""
    for name in ADAPTER_FILES:
        (Path(folder) / name).unlink(missing_ok=True)


@torch.no_grad()
def _base_on_host(model: PeftModel) -> PreTrainedModel:
    """Return the base of an adapter on the CPU, as it is without the adapter, not quantised."""
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = model.dtype
    found = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    modules = dict(base.named_modules())
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in modules.values()]
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError("The 4-bit base was packed for a CPU, which cannot be undone exactly: load the base again.")
    state = {}
    for name, tensor in base.state_dict().items():
        path, _, leaf = name.rpartition(".")
        parts = path.split(".")
        if "modules_to_save" in parts or any(part.startswith(model.base_model.prefix) for part in parts):
            continue
        owner = modules.get(path)
        if leaf not in ("weight", "bias") and not hasattr(owner, leaf):
            continue  # this entry is a constant of a quantised weight
        if leaf == "weight" and not tensor.is_floating_point():
            tensor = dequantize_bnb_weight(owner.weight, getattr(owner, "state", None)).to(model.dtype)
            if getattr(owner, "source_cls", None) is Conv1D:  # GPT-2's layer, which stores its weights transposed
                tensor = tensor.T
        plain = [part for part in parts if part not in ("base_layer", "original_module")]
        state[".".join([*plain, leaf])] = tensor.cpu().contiguous()
    found.load_state_dict(state)
    found.generation_config = base.generation_config
    return found
