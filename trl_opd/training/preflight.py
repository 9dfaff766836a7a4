"""What is refused, or warned of, before the work that it would spoil."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from ..opd_config import OPDConfig

logger = logging.getLogger(__name__)
# Two unrelated distributions over 150 000 tokens differ by about 12 nats; a teacher of the same family by 0.1 to 2.
FIRST_STEP_LIMIT = 10.0


def prompts_per_step(args: OPDConfig) -> int:
    """Return the different prompts of an optimizer step, over all processes.

    Raises:
        `ValueError`: unless its rollouts divide into groups of `num_generations`.
    """
    if not isinstance(args, OPDConfig):
        raise TypeError(f"OPDTrainer takes an OPDConfig, got a {type(args).__name__}: change that name too.")
    rollouts = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    if rollouts % args.num_generations:
        raise ValueError(
            f"The {rollouts} rollouts of an optimizer step (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {args.world_size} processes x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}) do not divide into groups of num_generations={args.num_generations}."
        )
    return rollouts // args.num_generations


def default_config(model: str | PreTrainedModel) -> OPDConfig:
    """Return the configuration of a trainer that was given none, named after its student as TRL names it."""
    name = model if isinstance(model, str) else model.config.name_or_path
    return OPDConfig(f"{name.split('/')[-1]}-OPD")


def check_devices(args: OPDConfig) -> None:
    """Warn of processes that were not started; raise `ValueError` for a teacher that cannot be placed as asked."""
    warn_of_one_process(args)
    require_placeable(args)


def require_placeable(args: OPDConfig) -> None:
    """Raise `ValueError` for a teacher that is to be parked, or to lie elsewhere, with FSDP or DeepSpeed."""
    sharding = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
    sharding += [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    if sharding and args.merge_adapter:
        raise ValueError(
            f"merge_adapter does not go with {sharding[0].upper()}, which shards the weights: save the adapter, and "
            "merge it in one process afterwards."
        )
    moved = [name for name in ("teacher_placement", "teacher_device") if getattr(args, name) not in (None, "resident")]
    if sharding and moved:
        raise ValueError(
            f"{moved[0]}={getattr(args, moved[0])!r} does not go with {sharding[0].upper()}, which needs the teacher "
            "on every GPU in every micro-batch: leave it out."
        )
    if args.teacher_device is None:
        return
    device = torch.device(args.teacher_device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"teacher_device={args.teacher_device!r}: there are {torch.cuda.device_count()} CUDA devices here."
        )


def require_mergeable(args: OPDConfig, model: PreTrainedModel) -> None:
    """Raise `ValueError` for a student without an adapter that is to be merged."""
    if args.merge_adapter and not is_peft_model(model):
        raise ValueError("merge_adapter is for a student with a LoRA adapter, and this one has none: leave it out.")


def require_text(vision: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for a vision-language student, and for a tokenizer that cannot end a rollout."""
    if vision:
        raise ValueError(
            "OPDTrainer distils text models only for now; use trl.DistillationTrainer for the vision-language student."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos_token, so no rollout could end: set `tokenizer.eos_token` to the token that ends "
            "an answer."
        )


def require_step(state: TrainerState, dataset, prompts: int) -> None:
    """Raise `ValueError` for a run that ended before its first step, for want of `prompts` prompts."""
    if state.global_step > 0 or state.max_steps <= 0:
        return
    rows = f"{len(dataset)} rows" if isinstance(dataset, Dataset) else "fewer rows"
    raise ValueError(
        f"Nothing was trained: an optimizer step needs {prompts} prompts (per_device_train_batch_size x processes x "
        f"gradient_accumulation_steps / num_generations) and the dataset has {rows}. Lower them, or add prompts."
    )


def ids_to_suppress(vocab_size: int, rows: int, end_ids: Sequence[int], *, use_vllm: bool) -> range:
    """Return the ids that the student has and the teacher lacks, which sampling must avoid.

    Warns when no end of a rollout is left.

    Args:
        vocab_size (`int`): The range of ids that student and teacher share.
        rows (`int`): Vocabulary entries of the student.
        end_ids (`Sequence[int]`): Ids that end a rollout.
        use_vllm (`bool`): Whether vLLM samples.

    Raises:
        `ValueError`: if the engine cannot avoid them.
    """
    ids = range(vocab_size, rows)
    if use_vllm:
        raise ValueError(
            f"The student has {len(ids)} vocabulary entries that the teacher cannot embed, and vLLM cannot be kept "
            "from sampling them: use generation by transformers, or a student of the teacher's vocabulary size."
        )
    if set(end_ids) <= set(ids):
        warnings.warn(
            f"Every end of a rollout (eos_token ids {list(end_ids)}) is a token that the teacher cannot embed, "
            "so rollouts run up to max_completion_length: use the teacher's eos_token.",
            stacklevel=2,
        )
    return ids


def warn_of_one_process(args: OPDConfig) -> None:
    """Warn when a launcher prepared several processes on the CPU and this is the only one.

    `accelerate launch --cpu --num_processes 2` does so in accelerate 1.15: it names a meeting place and starts one.
    """
    prepared = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if prepared and "WORLD_SIZE" not in os.environ and args.world_size == 1:
        warnings.warn(
            "The launcher was asked for several processes on the CPU and has started one. Start them with "
            "`python -m torch.distributed.run --nproc_per_node N SCRIPT` instead of `accelerate launch --cpu`.",
            stacklevel=2,
        )


def warn_of_float32(device: torch.device, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Warn when weights that are never trained lie in float32 on an accelerator."""
    if device.type == "cpu":
        return
    for name, model in (("student", student), ("teacher", teacher)):
        frozen = name == "teacher" or is_peft_model(model)
        if frozen and any(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters()):
            warnings.warn(
                f"The frozen weights of the {name} are in float32 on a GPU, twice the memory of bfloat16 for nothing: "
                "pass `--dtype bfloat16`, or `dtype` in its init kwargs.",
                stacklevel=2,
            )


def warn_of_first_step(mean_divergence: float | None) -> None:
    """Warn when the first step's mean divergence (nats per token) is that of unrelated models."""
    if mean_divergence is not None and mean_divergence > FIRST_STEP_LIMIT:
        warnings.warn(
            f"The divergence of the first step is {mean_divergence:.1f} nats per token, as between unrelated models: "
            "is it the right teacher, and does it have the student's tokenizer and chat template?",
            stacklevel=2,
        )
