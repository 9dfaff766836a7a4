"""Context managers for sampling: random state, eval mode, absolute positions; and what `generate` would apply.

The last two functions call private methods of transformers' generation.
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

# Options of a model's configuration that show relative positions, and names of modules that embed absolute ones.
RELATIVE_POSITIONS = ("rope_parameters", "rope_theta", "alibi")
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


def mask_repeated(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Remove from the loss mask the rows that Accelerate repeats to fill the last evaluation batch of every process.

    Every prompt then counts once, also where the number of processes does not divide the evaluation set. Accelerate's
    `remainder` is the number of real rows in that batch over all processes, in order of rank.

    Args:
        batch (`dict[str, torch.Tensor]`): Rollouts of this process; gets a new `tool_mask`.
        accelerator (`accelerate.Accelerator`): The accelerator whose dataloader is read.
    """
    state = accelerator.gradient_state
    rows = len(batch["completion_mask"])
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return

    mask = loss_mask(batch)
    first = accelerator.process_index * rows
    places = torch.arange(first, first + rows, device=mask.device)
    is_real = places < state.remainder
    batch["tool_mask"] = mask.long() * is_real[:, None]


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
    """Keep the model in eval mode inside this block: with dropout, the model that samples is not the one we score."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def positions_from_mask(model: torch.nn.Module):
    """Make a model with absolute positions take them from the attention mask, in each forward inside this block.

    Otherwise a model like GPT-2 or OPT counts the padding on the left as positions, and sees a different prompt.
    Nothing changes for models with rotary or other relative positions, which need no correction.
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
    """Return whether a backbone has a table of position embeddings, and so takes `position_ids`."""
    config = backbone.config.get_text_config()
    if any(getattr(config, name, None) for name in RELATIVE_POSITIONS):
        return False
    names = {path.rpartition(".")[2] for path, _ in backbone.named_modules()}
    return not names.isdisjoint(POSITION_TABLES)


def _add_positions(module, args, kwargs):
    """Add the positions to the arguments of a forward, unless its caller has, or its attention mask is no 2D mask."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None or mask is None or mask.ndim != 2:
        return args, kwargs
    ids = args[0] if args else kwargs["input_ids"]
    positions = mask.long().cumsum(-1) - 1
    positions = positions[:, -ids.shape[1] :]  # with a cache, the mask is longer than the new ids
    kwargs["position_ids"] = positions.clamp(min=0)
    return args, kwargs


def resolve_generation_config(model: PreTrainedModel, given: GenerationConfig) -> GenerationConfig:
    """Return the generation settings as `generate` resolves them: unset ones come from the model's configuration."""
    settings, _ = model._prepare_generation_config(given)
    return settings


def logits_processor_names(model: PreTrainedModel, settings: GenerationConfig) -> set[str]:
    """Return the class names of the logits processors that `generate` would apply with these resolved settings."""
    model._prepare_special_tokens(settings, device=model.device)  # some processors need them
    processors = model._get_logits_processor(settings, input_ids_seq_length=1)
    return {type(processor).__name__ for processor in processors}
