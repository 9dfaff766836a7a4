"""Merges a LoRA student into a full model that computes the same, for users who load it without PEFT."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from ..models.model_check import largest_difference, mean_difference

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def replace_by_merged(model: PeftModel, folder: str | os.PathLike) -> None:
    """Write the merged model to a folder, in the place of the adapter that was saved there.

    The merged model is built from the weights of the running student, with those of a quantised base in full precision,
    so it computes what the student computed. It is built on the host and takes as much of its memory as the whole
    model. Both are compared before a file is removed.

    Args:
        model (`peft.PeftModel`): The student, unwrapped.
        folder (`str` or `os.PathLike`): Folder of its adapter.

    Raises:
        `ValueError`: if the merged model computes something else, or bitsandbytes has packed a 4-bit base
            ([`OPDTrainer`] prevents that). The adapter is then kept.
    """
    with torch.random.fork_rng(devices=[]):  # new models and adapters draw random weights, which are then overwritten
        merged = _merged_on_host(model)
    difference = mean_difference(model, merged)
    limit = largest_difference(model)
    if not difference <= limit:
        raise ValueError(
            f"The merged model differs from the student by a mean KL of {difference:.2g} nats per token, and rounding "
            f"alone stays below {limit:.0e}, so it is not written. The adapter is saved instead: use it with PEFT, or "
            "train in float32."
        )
    merged.save_pretrained(folder)
    remove_adapter(folder, list(model.peft_config))


def remove_adapter(folder: str | os.PathLike, names: Sequence[str] = ()) -> None:
    """Remove the files of an adapter from a folder, if there are any, and the subfolders of adapters with a name."""
    folder = Path(folder)
    for name in ADAPTER_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        if (folder / name / ADAPTER_FILES[0]).is_file():
            shutil.rmtree(folder / name)


def _merged_on_host(model: PeftModel) -> PreTrainedModel:
    """Return a model on the CPU with the weights of the student's base and its active adapters together."""
    base = _base_on_host(model)
    # An adapter of both leaves them tied.
    if _is_adapted(model.get_input_embeddings()) != _is_adapted(model.get_output_embeddings()):
        _untie(base)

    names = model.active_adapters
    wrapped = None
    for name in names:
        config = copy.deepcopy(model.peft_config[name])
        # PiSSA and others take weights out of the base when they begin, and that has happened.
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False
        if wrapped is None:
            wrapped = PeftModel(base, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(names)

    trained = model.state_dict()
    with torch.no_grad():
        for name, tensor in wrapped.state_dict().items():
            # The weights of a quantised base have another shape, and `base` has them already.
            if name in trained and trained[name].shape == tensor.shape and trained[name].is_floating_point():
                tensor.copy_(trained[name])
    return wrapped.merge_and_unload()


def _is_adapted(layer: torch.nn.Module) -> bool:
    return isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _untie(model: PreTrainedModel) -> None:
    """Give the LM head weights of its own, so that an adapter of the embeddings or of the head changes only these."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@torch.no_grad()
def _base_on_host(model: PeftModel) -> PreTrainedModel:
    """Return the base of an adapter on the CPU, as it is without the adapter, not quantised."""
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = model.dtype
    found = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    state = {}
    for name in found.state_dict():
        path, _, leaf = name.rpartition(".")
        layer = _plain_layer(base, path)
        state[name] = _full_precision(layer, leaf, model.dtype).cpu().contiguous()
    found.load_state_dict(state)
    found.generation_config = base.generation_config
    return found


def _plain_layer(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """Return the layer at a path of a model without adapters, from a model into which PEFT has put adapters."""
    layer = model
    for part in path.split("."):
        layer = getattr(layer, part)
        while _is_adapted(layer):
            layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer


def _full_precision(layer: torch.nn.Module, leaf: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of a layer, dequantised if it is packed."""
    tensor = getattr(layer, leaf)
    if tensor.is_floating_point() or leaf != "weight":
        return tensor
    if getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError("The 4-bit base was packed for a CPU, which cannot be undone exactly: load the base again.")
    full = dequantize_bnb_weight(tensor, getattr(layer, "state", None)).to(dtype)
    # GPT-2's layer stores its weights transposed.
    return full.T if getattr(layer, "source_cls", None) is Conv1D else full
