"""Checks of single options: each error names the option, what it takes and what it got."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

# Counts of transformers' engine, with the least that it works with.
ENGINE_COUNTS = {"page_size": 4, "num_blocks": 1, "max_batch_tokens": 1, "max_requests_per_batch": 1}


def require_engine_settings(engine: Any) -> None:
    """Raise `ValueError` for settings on which transformers' engine fails late, waits for ever or looks away."""
    where = "transformers_continuous_batching_config"
    if not isinstance(engine, dict):
        raise ValueError(f"{where} takes a dictionary such as {{'page_size': 256}}, got {engine!r}.")
    try:
        config = ContinuousBatchingConfig(**engine)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error
    for name, least in ENGINE_COUNTS.items():
        if getattr(config, name) is not None:
            require_whole(f"{where}: {name}", getattr(config, name), least)
    share = config.max_memory_percent
    if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
        raise ValueError(f"{where}: max_memory_percent must be a number in (0, 1], got {share!r}.")
    require_choice(f"{where}: scheduler_type", config.scheduler_type, tuple(SCHEDULER_MAPPING))


def is_greedy(generation_kwargs: Any) -> bool:
    """Return whether settings of the generation ask for greedy rollouts; raise `ValueError` where they are none."""
    if generation_kwargs is not None and not isinstance(generation_kwargs, dict):
        raise ValueError(
            f"generation_kwargs takes a dictionary such as {{'do_sample': False}}, got {generation_kwargs!r}."
        )
    return (generation_kwargs or {}).get("do_sample") is False


def require_whole(name: str, value: Any, least: int) -> None:
    """Raise `ValueError` unless a value is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_device(name: str, value: Any, own: str) -> None:
    """Raise `ValueError` unless a value names the CPU, a GPU, or a device of the kind `own`."""
    try:
        kind = torch.device(value).type
    except (RuntimeError, TypeError):
        kind = None
    if kind not in ("cpu", "cuda", own) or kind == "meta":
        raise ValueError(
            f"{name} must be 'cpu', a GPU such as 'cuda:1', or of the student's kind ({own}), got {value!r}."
        )
