"""Rollouts from transformers' continuous batching: no padding, and a rollout that ends makes room for the next.

The names are those of TRL's GRPOConfig. The behaviour is not: TRL casts the trainable student to half precision for
good, where parameters keep their dtype here, and a rollout that is missing or was sampled otherwise than asked is an
error.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from .sampling import attention_restored, logits_processor_names, resolve_generation_config

# Logits processors that the engine applies to each request. It drops others, or runs them without the request's tokens.
PROCESSORS = {
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
}


def generate_continuously(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    generation_config: GenerationConfig,
    engine_settings: dict[str, Any] | None,
) -> list[list[int]]:
    """Return the ids of one completion per prompt, the end token included.

    Args:
        model (`transformers.PreTrainedModel`): The student, unwrapped, its weights gathered.
        prompt_ids (`list[list[int]]`): Token ids of the prompts.
        generation_config (`transformers.GenerationConfig`): How to sample.
        engine_settings (`dict`, *optional*): As [`engine_config`] takes them.

    Raises:
        `ValueError`: if the generation settings ask for something that the engine does not do.
        `RuntimeError`: if the engine lost a rollout.
    """
    model = model.get_base_model() if is_peft_model(model) else model  # the adapter is inside of its layers
    settings = resolve_generation_config(model, generation_config)
    require_supported(model, settings)
    engine = engine_config(model, engine_settings, prompt_ids, settings.max_new_tokens)
    with attention_restored(model):
        outputs = model.generate_batch(
            prompt_ids, generation_config=settings, continuous_batching_config=engine, progress_bar=False
        )
    failed = [output.error for output in outputs.values() if output.error is not None]
    if failed or len(outputs) < len(prompt_ids):
        lost = len(prompt_ids) - len(outputs) + len(failed)
        raise RuntimeError(
            f"Continuous batching lost {lost} of {len(prompt_ids)} rollouts ({(failed or ['see the log above'])[0]}): "
            "give it more room (`transformers_continuous_batching_config`, max_memory_percent), or leave "
            "use_transformers_continuous_batching out."
        )
    return [output.generated_tokens for output in outputs.values()]


def require_supported(model: PreTrainedModel, settings: GenerationConfig) -> None:
    """Raise `ValueError` for generation settings that the engine would leave out."""
    asked = logits_processor_names(model, settings) - PROCESSORS
    mode = settings.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        asked.add(mode)
    asked |= {name for name in ("stop_strings", "max_time") if getattr(settings, name, None) is not None}
    if asked:
        raise ValueError(
            f"Continuous batching does not apply {', '.join(sorted(asked))}, which the generation settings ask for: "
            "remove it (repetition_penalty, generation_kwargs or the student's generation_config.json), or leave "
            "use_transformers_continuous_batching out."
        )


def engine_config(
    model: PreTrainedModel, given: dict[str, Any] | None, prompt_ids: list[list[int]], room: int
) -> ContinuousBatchingConfig:
    """Return the configuration of the engine: what is given, over defaults that leave memory to the training.

    Args:
        model (`transformers.PreTrainedModel`): The student.
        given (`dict`, *optional*): Keyword arguments of `transformers.generation.ContinuousBatchingConfig`.
        prompt_ids (`list[list[int]]`): Token ids of the prompts.
        room (`int`): Longest completion, in tokens.
    """
    # transformers would take 0.9 of the free memory for the cache; half is TRL's default.
    config = ContinuousBatchingConfig(**{"max_memory_percent": 0.5, **(given or {})})
    if model.device.type == "cpu" and config.num_blocks is None:
        # There it is the machine's memory that would be half filled, with zeros: take what the rollouts need.
        config.num_blocks = sum(-(-(len(ids) + room) // config.page_size) for ids in prompt_ids)
    half = model.dtype in (torch.bfloat16, torch.float16)
    if "auto_switch_to_flash" not in (given or {}):
        config.auto_switch_to_flash = model.device.type == "cuda" and half  # it knows no float32
    return config
