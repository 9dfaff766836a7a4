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
    """Leave out of the loss mask the rows that Accelerate repeats to fill the last evaluation batch of every process.

    So an evaluation set that the number of processes does not divide counts every prompt once. Accelerate's `remainder`
    is the number of real rows of that batch over all processes, in order of rank.
    """
    state, rows = accelerator.gradient_state, len(batch["completion_mask"])
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return
    place = accelerator.process_index * rows + torch.arange(rows, device=batch["completion_mask"].device)
    batch["tool_mask"] = loss_mask(batch).long() * (place < state.remainder)[:, None]


@contextmanager
def own_random_stream(seed: int):
    """Draw from a stream of its own, the same each time, and leave every random state as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        set_seed(seed, device_specific=True)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def sampling_mode(model: torch.nn.Module):
    """Hold the model in eval mode: dropout in a rollout would sample from another model than the one that is scored."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def positions_from_mask(model: torch.nn.Module):
    """Give a model with learned absolute positions those of the attention mask, in every forward inside.

    With left padding such a model (GPT-2, OPT) otherwise counts the padding and sees another prompt. Rotary and other
    relative positions do not care, and are left alone.
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
    """Return the generation settings as `generate` resolves them: what is left open is as the model's own has it."""
    settings, _ = model._prepare_generation_config(given)
    return settings


def logits_processor_names(model: PreTrainedModel, settings: GenerationConfig) -> set[str]:
    """Return the class names of the logits processors that `generate` would apply with some settings."""
    model._prepare_special_tokens(settings, device=model.device)  # some processors look for them
    processors = model._get_logits_processor(settings, input_ids_seq_length=1)
    return {type(processor).__name__ for processor in processors}
