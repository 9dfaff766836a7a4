"""Samples rollouts with transformers' continuous batching: without padding, and the next one starts when one ends.

The options have the names of TRL's GRPOConfig, but two things differ. TRL casts the student that is trained to half
precision for good; here parameters keep their dtype. And it is an error when the engine loses a rollout, or would not
apply a generation setting.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from .sampling import attention_restored, logits_processor_names, resolve_generation_config

# The logits processors that the engine applies to each request. It drops other ones, or calls them without the
# request's tokens.
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
        generation_config (`transformers.GenerationConfig`): Generation settings.
        engine_settings (`dict`, *optional*): Settings of the engine, as [`engine_config`] takes them.

    Raises:
        `ValueError`: if the engine does not apply one of the generation settings.
        `RuntimeError`: if the engine lost a rollout.
    """
    if is_peft_model(model):
        model = model.get_base_model()  # its layers contain the adapter
    settings = resolve_generation_config(model, generation_config)
    require_supported(model, settings)
    engine = engine_config(model, engine_settings, prompt_ids, settings.max_new_tokens)
    with attention_restored(model):
        outputs = model.generate_batch(
            prompt_ids, generation_config=settings, continuous_batching_config=engine, progress_bar=False
        )

    errors = []
    completions = []
    for output in outputs.values():
        if output.error is not None:
            errors.append(output.error)
        else:
            completions.append(output.generated_tokens)
    asked = len(prompt_ids)
    if len(completions) < asked:
        reason = errors[0] if errors else "see the log above"
        raise RuntimeError(
            f"Continuous batching lost {asked - len(completions)} of {asked} rollouts ({reason}): give it more memory "
            "(max_memory_percent in transformers_continuous_batching_config), or leave "
            "use_transformers_continuous_batching out."
        )
    return completions


def require_supported(model: PreTrainedModel, settings: GenerationConfig) -> None:
    """Raise `ValueError` if there are generation settings that the engine does not apply.

    Args:
        model (`transformers.PreTrainedModel`): The student.
        settings (`transformers.GenerationConfig`): Generation settings, resolved.

    Raises:
        `ValueError`: that names these settings.
    """
    unsupported = logits_processor_names(model, settings) - PROCESSORS
    mode = settings.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        unsupported.add(mode)
    for name in ("stop_strings", "max_time"):
        if getattr(settings, name, None) is not None:
            unsupported.add(name)
    if unsupported:
        names = ", ".join(sorted(unsupported))
        raise ValueError(
            f"Continuous batching does not apply {names}, which the generation settings ask for: "
            "remove it (repetition_penalty, generation_kwargs or the student's generation_config.json), or leave "
            "use_transformers_continuous_batching out."
        )


def engine_config(
    model: PreTrainedModel, given: dict[str, Any] | None, prompt_ids: list[list[int]], room: int
) -> ContinuousBatchingConfig:
    """Return the configuration of the engine: the given settings, and defaults that leave memory for training.

    Args:
        model (`transformers.PreTrainedModel`): The student.
        given (`dict`, *optional*): Keyword arguments of `transformers.generation.ContinuousBatchingConfig`.
        prompt_ids (`list[list[int]]`): Token ids of the prompts.
        room (`int`): Maximum length of a completion, in tokens.
    """
    # By default transformers takes 0.9 of the free memory for the cache; TRL takes half.
    settings = {"max_memory_percent": 0.5}
    settings.update(given or {})
    config = ContinuousBatchingConfig(**settings)

    on_cpu = model.device.type == "cpu"
    if on_cpu and config.num_blocks is None:
        # On a CPU the engine would fill half of the machine's memory with zeros, so take only what the rollouts need.
        config.num_blocks = sum(math.ceil((len(ids) + room) / config.page_size) for ids in prompt_ids)
    if "auto_switch_to_flash" not in settings:
        # Flash attention has no float32.
        is_half = model.dtype in (torch.bfloat16, torch.float16)
        config.auto_switch_to_flash = model.device.type == "cuda" and is_half
    return config
