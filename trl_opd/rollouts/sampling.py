"""Corrections of how TRL draws prompts and rollouts: epochs after a resume, random streams, absolute positions."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model, set_seed

from .batches import loss_mask


def allow_up_to(trainer, room: int) -> None:
    """Let the trainer's rollouts be `room` tokens long."""
    trainer.generation_config.max_new_tokens = trainer.generation_kwargs["max_new_tokens"] = room


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


def suppress(trainer, ids: range) -> None:
    """Leave `ids` out of the trainer's rollouts, beside those that the user or the model leaves out already."""
    own = trainer.generation_kwargs.get("suppress_tokens", trainer.model.generation_config.suppress_tokens)
    suppressed = sorted({*(own or ()), *ids})
    trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"] = suppressed
