"""Sampling of completions: random state, eval mode, prompts of the same length, and what `generate` would apply.

The last two functions call private methods of transformers' generation.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import GenerationConfig, PreTrainedModel

from .batches import loss_mask


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
    """Keep the model in eval mode inside this block: with dropout, the model that samples is not the one we score.

    A mixture of experts that returns its router logits computes a load-balancing loss from them, with an attention mask
    that does not fit while tokens are generated. So inside this block it does not return them.
    """
    training = model.training
    config = model.config.get_text_config()
    router_logits = getattr(config, "output_router_logits", None)
    model.eval()
    if router_logits:
        config.output_router_logits = False
    try:
        yield
    finally:
        model.train(training)
        if router_logits:
            config.output_router_logits = router_logits


def sample_unpadded(
    generate: Callable[[list[list[int]]], list[list[int]]], prompt_ids: list[list[int]], *, together: bool
) -> list[list[int]]:
    """Return one completion per prompt, in order, from calls in which no prompt is padded.

    For students whose state or positions padding would change.

    Args:
        generate (`Callable`): Returns the completions of prompts.
        prompt_ids (`list[list[int]]`): Token ids of the prompts.
        together (`bool`): Whether prompts of one length are sampled in one call; else each has its own.
    """
    places = defaultdict(list)
    for place, ids in enumerate(prompt_ids):
        places[len(ids) if together else place].append(place)

    completions = [[]] * len(prompt_ids)
    for group in places.values():
        sampled = generate([prompt_ids[place] for place in group])
        for place, completion in zip(group, sampled, strict=True):
            completions[place] = completion
    return completions


@contextmanager
def attention_restored(model: PreTrainedModel):
    """Restore the attention implementation of a model after this block.

    Continuous batching switches it, and does not switch it back if it fails before its first rollout (transformers
    5.24, `init_continuous_batching`). Can go when it does.
    """
    implementation = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)


def resolve_generation_config(model: PreTrainedModel, given: GenerationConfig) -> GenerationConfig:
    """Return the generation settings as `generate` resolves them: unset ones come from the model's configuration."""
    settings, _ = model._prepare_generation_config(given)
    return settings


def logits_processor_names(model: PreTrainedModel, settings: GenerationConfig) -> set[str]:
    """Return the class names of the logits processors that `generate` would apply with these resolved settings."""
    model._prepare_special_tokens(settings, device=model.device)  # some processors need them
    processors = model._get_logits_processor(settings, input_ids_seq_length=1)
    return {type(processor).__name__ for processor in processors}
