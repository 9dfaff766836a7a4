"""How completions are sampled: random streams, eval mode, absolute positions, and what `generate` would apply.

A seam: two functions here read private methods of transformers' generation.
"""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model, set_seed
from transformers import GenerationConfig, PreTrainedModel

from .batches import loss_mask


def mask_repeated(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Remove from the loss mask the rows that Accelerate repeats to fill the last evaluation batch of every process.

    So an evaluation set that the number of processes does not divide counts every prompt once. Accelerate's `remainder`
    is the number of real rows of that batch over all processes, in order of rank.
    """
    state = accelerator.gradient_state
    rows = len(batch["completion_mask"])
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return
    place = accelerator.process_index * rows + torch.arange(rows, device=batch["completion_mask"].device)
    batch["tool_mask"] = loss_mask(batch).long() * (place < state.remainder)[:, None]


@contextmanager
def own_random_stream(seed: int):
    """Seed all random generators inside this block, and restore their states afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        set_seed(seed, device_specific=True)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def sampling_mode(model: torch.nn.Module):
    """Keep the model in eval mode, because with dropout the rollouts would come from another model than we score."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def positions_from_mask(model: torch.nn.Module):
    """Compute the positions of a model with learned absolute positions from the attention mask, in each forward inside.

    With left padding such a model (GPT-2, OPT) otherwise counts the padding and sees another prompt. Models
    with rotary or other relative positions need no correction, so nothing changes for them.
    """
    backbone = model.base_model.model.base_model if is_peft_model(model) else model.base_model
    if not has_absolute_positions(backbone):
        yield
        return
    handle = backbone.register_forward_pre_hook(_add_positions, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def has_absolute_positions(backbone: torch.nn.Module) -> bool:
    """Return whether a backbone embeds positions by a table and takes `position_ids`."""
    config = backbone.config.get_text_config()
    relative = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "alibi"))
    tables = ("wpe", "embed_positions", "position_embeddings")
    return not relative and any(name.rsplit(".", 1)[-1] in tables for name, _ in backbone.named_modules())


def _add_positions(module, args, kwargs):
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and mask is not None and mask.ndim == 2:
        ids = kwargs.get("input_ids") if not args else args[0]
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs["position_ids"] = places[:, -ids.shape[1] :]
    return args, kwargs


def resolve_generation_config(model: PreTrainedModel, given: GenerationConfig) -> GenerationConfig:
    """Return the generation settings as `generate` resolves them: unset ones come from the model's configuration."""
    settings, _ = model._prepare_generation_config(given)
    return settings


def logits_processor_names(model: PreTrainedModel, settings: GenerationConfig) -> set[str]:
    """Return the class names of the logits processors that `generate` would apply with some settings."""
    model._prepare_special_tokens(settings, device=model.device)  # some processors need them
    processors = model._get_logits_processor(settings, input_ids_seq_length=1)
    return {type(processor).__name__ for processor in processors}
