"""Checks that raise an error or a warning before a run wastes its work."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from ..models.model_check import is_mixture
from ..opd_config import OPDConfig

logger = logging.getLogger(__name__)
# Two unrelated distributions over 150 000 tokens differ by about 12 nats; a teacher of the same family by 0.1 to 2.
FIRST_STEP_LIMIT = 10.0


def prompts_per_step(args: OPDConfig) -> int:
    """Return the number of different prompts in an optimizer step, over all processes.

    Raises:
        `TypeError`: if `args` is not an `OPDConfig`.
        `ValueError`: if the rollouts do not divide into groups of `num_generations`.
    """
    if not isinstance(args, OPDConfig):
        raise TypeError(f"OPDTrainer takes an OPDConfig, got a {type(args).__name__}: pass an OPDConfig instead.")
    rollouts = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    if rollouts % args.num_generations:
        raise ValueError(
            f"The {rollouts} rollouts of an optimizer step (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {args.world_size} processes x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}) do not divide into groups of num_generations={args.num_generations}: "
            "change one of these numbers."
        )
    return rollouts // args.num_generations


def default_config(model: str | PreTrainedModel) -> OPDConfig:
    """Return the configuration of a trainer without `args`; its output folder is named after the student, as in TRL."""
    name = model if isinstance(model, str) else model.config.name_or_path
    return OPDConfig(f"{name.split('/')[-1]}-OPD")


def check_devices(args: OPDConfig) -> None:
    """Warn of processes that were not started; raise `ValueError` for a teacher that cannot be placed as asked."""
    warn_of_one_process(args)
    require_placeable(args)


def require_placeable(args: OPDConfig) -> None:
    """Raise `ValueError` for a parked or moved teacher, or a merged adapter, with FSDP or DeepSpeed."""
    sharding = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
    sharding += [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    if sharding and args.merge_adapter:
        raise ValueError(
            f"merge_adapter does not work with {sharding[0].upper()}, which shards the weights: save the adapter, and "
            "merge it in one process afterwards."
        )
    moved = [name for name in ("teacher_placement", "teacher_device") if getattr(args, name) not in (None, "resident")]
    if sharding and moved:
        raise ValueError(
            f"{moved[0]}={getattr(args, moved[0])!r} does not work with {sharding[0].upper()}, which needs the "
            "teacher on every GPU in every micro-batch: leave it out."
        )
    if args.teacher_device is None:
        return
    device = torch.device(args.teacher_device)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"teacher_device={args.teacher_device!r}: there are {count} CUDA devices here. Pass one of them, or 'cpu'."
        )


def require_mergeable(args: OPDConfig, model: PreTrainedModel) -> None:
    """Raise `ValueError` if `merge_adapter` is set and the student has no adapter."""
    if args.merge_adapter and not is_peft_model(model):
        raise ValueError("merge_adapter is for a student with a LoRA adapter, and this one has none: leave it out.")


def require_text(vision: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for a vision-language student, and for a tokenizer that cannot end a rollout."""
    if vision:
        raise ValueError(
            "OPDTrainer distils text models only, and the student is a vision-language model: use "
            "trl.DistillationTrainer for it."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos_token, so no rollout could end: set `tokenizer.eos_token` to the token that ends "
            "an answer."
        )


def require_step(state: TrainerState, dataset, prompts: int) -> None:
    """Raise `ValueError` if a run ended before its first step, because the dataset has fewer than `prompts` rows."""
    if state.global_step > 0 or state.max_steps <= 0:
        return
    rows = f"{len(dataset)} rows" if isinstance(dataset, Dataset) else "fewer rows"
    raise ValueError(
        f"Nothing was trained: an optimizer step needs {prompts} prompts (per_device_train_batch_size x processes x "
        f"gradient_accumulation_steps / num_generations) and the dataset has {rows}. Lower "
        "these settings, or add prompts."
    )


def ids_to_suppress(vocab_size: int, rows: int, end_ids: Sequence[int], *, use_vllm: bool) -> range:
    """Return the ids that the student has and the teacher lacks, which must not be sampled.

    Warns if they include every token that ends a rollout.

    Args:
        vocab_size (`int`): The range of ids that student and teacher share.
        rows (`int`): Vocabulary entries of the student.
        end_ids (`Sequence[int]`): Ids that end a rollout.
        use_vllm (`bool`): Whether vLLM samples.

    Raises:
        `ValueError`: with vLLM, which cannot suppress them.
    """
    ids = range(vocab_size, rows)
    if use_vllm:
        raise ValueError(
            f"The student has {len(ids)} vocabulary entries that the teacher cannot embed, and vLLM cannot suppress "
            "them: generate with transformers (use_vllm=False), or use a student of the teacher's vocabulary size."
        )
    if set(end_ids) <= set(ids):
        warnings.warn(
            f"Every end of a rollout (eos_token ids {list(end_ids)}) is a token that the teacher cannot embed, "
            "so rollouts run up to max_completion_length: use the teacher's eos_token.",
            stacklevel=2,
        )
    return ids


def warn_of_one_process(args: OPDConfig) -> None:
    """Warn if a launcher was asked for several processes on the CPU and started only this one.

    Works around accelerate 1.15: `accelerate launch --cpu --num_processes 2` sets the address of the main process, and
    then starts one process. Can go when that command starts two.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if asked and "WORLD_SIZE" not in os.environ and args.world_size == 1:
        warnings.warn(
            "The launcher was asked for several processes on the CPU and started only one. Start them with "
            "`python -m torch.distributed.run --nproc_per_node N SCRIPT` instead of `accelerate launch --cpu`.",
            stacklevel=2,
        )


def warn_of_float32(device: torch.device, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Warn if weights that are never trained are in float32 on an accelerator."""
    if device.type == "cpu":
        return
    for name, model in (("student", student), ("teacher", teacher)):
        frozen = name == "teacher" or is_peft_model(model)
        if frozen and any(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters()):
            warnings.warn(
                f"The frozen weights of the {name} are in float32 on a GPU, which needlessly takes twice the memory of "
                "bfloat16: pass `--dtype bfloat16`, or `dtype` in its init kwargs.",
                stacklevel=2,
            )


def require_trainable(model: PreTrainedModel) -> None:
    """Raise `ValueError` if no weight of the student would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The student has no trainable weights: pass `peft_config`, load its adapter with `is_trainable=True`, or "
            "call `model.requires_grad_(True)`."
        )


def warn_of_router_loss(student: PreTrainedModel) -> None:
    """Say that a mixture of experts is trained without its load-balancing loss."""
    config = student.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_alpha", "output_router_logits")
    if is_mixture(student) and any(getattr(config, name, None) for name in names):
        logger.warning(
            "The student is a mixture of experts: its auxiliary (load-balancing) loss is not part of the loss."
        )


def warn_of_other_loss() -> None:
    """Say that TRL's own loss, which the settings ask for, would be wrong for these models."""
    logger.warning(
        "TRL's own loss is not called, because it pads these models on the left or reads their LM heads in a way that "
        "changes their distributions: our loss is computed instead."
    )


def warn_of_rope_switch(longest: int, limit: int) -> None:
    """Warn that a rollout exceeds the positions up to which the rotary frequencies of a model are constant.

    Args:
        longest (`int`): Tokens of the longest rollout, with its prompt.
        limit (`int`): The positions (see [`rope_switch_length`]).
    """
    warnings.warn(
        f"A rollout has {longest} tokens with its prompt, more than the {limit} of the original context of student or "
        "teacher. Beyond it a longrope or dynamic rope changes the distributions of every rollout in the batch, so "
        "that they depend on the longest one: keep prompt and max_completion_length within "
        f"{limit} tokens for exact numbers.",
        stacklevel=3,
    )


def warn_of_zero_gradient(student: PreTrainedModel) -> None:
    """Warn if every gradient of an unsharded student is exactly 0 after the first step's backward."""
    gradients = [parameter.grad for parameter in student.parameters() if parameter.requires_grad]
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        warnings.warn(
            "The gradient of the first step is exactly 0, so nothing was trained: check that the adapter that is to be "
            "trained is active, that the teacher is not the student itself, and that some token has a weight.",
            stacklevel=2,
        )


def warn_of_first_step(mean_divergence: float | None) -> None:
    """Warn if the first step's mean divergence (nats per token) is as large as between unrelated models."""
    if mean_divergence is not None and mean_divergence > FIRST_STEP_LIMIT:
        warnings.warn(
            f"The divergence of the first step is {mean_divergence:.1f} nats per token, as between unrelated models: "
            "check that it is the right teacher, with the student's tokenizer and chat template.",
            stacklevel=2,
        )
