"""Load the teacher, move it to its device, and check that its vocabulary is the student's."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._trl import create_model_from_path, prepare_deepspeed
from ..opd_config import OPDConfig
from .model_check import require_causal_lm
from .quantised import is_by_bitsandbytes, make_readable, require_linear_weights
from .vocabulary import require_same_vocabulary


def load_teacher(teacher: str | PreTrainedModel | None, student: str | PreTrainedModel, args: OPDConfig):
    """Return the frozen teacher in eval mode: the given object, or the model loaded from a name or path.

    Args:
        teacher (`str` or `transformers.PreTrainedModel`, *optional*):
            Name, path or object; `args.teacher_model_name_or_path` when `None`.
        student (`str` or `transformers.PreTrainedModel`): The student as the trainer received it.
        args (`OPDConfig`): The configuration.

    Raises:
        `OSError`: if there is no model at the path or under the name.
        `ValueError`: if there is no teacher, it shares weights with the student, the settings contradict each other,
            or its adapter, LM head or experts cannot be used.
    """
    if teacher is None:
        teacher = args.teacher_model_name_or_path
    if teacher is None:
        raise ValueError(
            "There is no teacher: pass `teacher_model` to the trainer or set `teacher_model_name_or_path`."
        )
    if isinstance(teacher, str):
        if teacher.startswith((".", "/", "~")) and not Path(teacher).is_dir():
            raise FileNotFoundError(f"There is no teacher in {teacher}: no such folder.")
        kwargs = _init_kwargs(args)
        if is_by_bitsandbytes(kwargs.get("quantization_config")):
            require_linear_weights(teacher, kwargs)
        try:
            teacher = create_model_from_path(teacher, **kwargs)
        except TypeError as error:
            raise ValueError(f"The teacher cannot be loaded with `teacher_model_init_kwargs`: {error}") from error
    else:
        for name in ("teacher_model_init_kwargs", "teacher_quantization"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"`{name}` has no effect on a teacher that is already instantiated: remove it, or pass the "
                    "teacher's name."
                )
        # We compare parameters, not objects, because PEFT puts an adapter's layers into the base model's own object.
        student_parameters = set() if isinstance(student, str) else set(student.parameters())
        if not student_parameters.isdisjoint(teacher.parameters()):
            raise ValueError(
                "Student and teacher are the same object, or share weights: training one would change the other. Load "
                "the teacher separately, or pass its name."
            )
    require_causal_lm(teacher, "teacher")
    make_readable(teacher)
    return teacher.eval().requires_grad_(False)


def place_teacher(
    teacher: PreTrainedModel, accelerator: Accelerator, device: str | None = None, *, sharded: bool
) -> PreTrainedModel:
    """Return the teacher on a device (by default the accelerator's), or wrapped as in TRL with FSDP or DeepSpeed."""
    if sharded:
        if accelerator.state.deepspeed_plugin is not None:
            return prepare_deepspeed(teacher, accelerator)
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    # Loading has already placed a quantised model or one with a device map, and moving it raises an error.
    if getattr(teacher, "hf_device_map", None) is None and not getattr(teacher, "is_quantized", False):
        teacher.to(device or accelerator.device)
    return teacher


def load_teacher_tokenizer(teacher: PreTrainedModel, args: OPDConfig) -> PreTrainedTokenizerBase | None:
    """Return the teacher's tokenizer, or `None` if the teacher names no tokenizer that can be loaded.

    Args:
        teacher (`transformers.PreTrainedModel`): The teacher, whose configuration names its tokenizer.
        args (`OPDConfig`): The configuration, which may name another tokenizer.

    Raises:
        `ValueError`: if the configuration names a tokenizer that cannot be loaded.
    """
    name = args.teacher_tokenizer_name_or_path or teacher.config.name_or_path
    if not name:
        return None
    revision = None if args.teacher_tokenizer_name_or_path else args.teacher_model_revision
    try:
        found = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
        # For a folder without tokenizer files transformers 5 builds a tokenizer that has only special tokens.
        if found.get_vocab().keys() <= found.get_added_vocab().keys():
            raise ValueError("its vocabulary is empty")
        return found
    except (OSError, ValueError, KeyError) as error:
        if args.teacher_tokenizer_name_or_path:
            raise ValueError(f"`teacher_tokenizer_name_or_path` {name!r} holds no tokenizer: {error}") from error
        return None


def check_teacher_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    *,
    student_rows: int,
    teacher_rows: int,
) -> None:
    """Raise `ValueError` if the ids of student and teacher mean different tokens, or warn if that cannot be known.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): The student's tokenizer.
        teacher_tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): The teacher's, if it is known.
        student_rows (`int`): Number of rows of the student's output embeddings.
        teacher_rows (`int`): Number of rows of the teacher's output embeddings.

    Raises:
        `ValueError`: if the tokenizers differ, or the teacher has none and the numbers of rows differ.
    """
    if teacher_tokenizer is not None:
        require_same_vocabulary(tokenizer, teacher_tokenizer)
        _warn_of_other_template(tokenizer, teacher_tokenizer)
        return

    advice = "Set `teacher_tokenizer_name_or_path` to the teacher's tokenizer."
    if student_rows != teacher_rows:
        raise ValueError(
            f"The student has {student_rows} vocabulary entries, the teacher {teacher_rows}, and the teacher names no "
            f"tokenizer that can be loaded, so we cannot check that their ids mean the same tokens. {advice}"
        )
    warnings.warn(
        f"The teacher names no tokenizer that can be loaded: we assume that its {teacher_rows} ids mean the "
        f"same tokens as the student's. {advice}",
        stacklevel=2,
    )


def teacher_end_ids(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids at which a teacher ends its generations, empty if they are not known.

    Args:
        teacher (`transformers.PreTrainedModel`): The teacher; its generation settings come before its configuration.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Its tokenizer, read only if neither has them.
    """
    for holder in (getattr(teacher, "generation_config", None), teacher.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else ids
    return []


def _init_kwargs(args: OPDConfig) -> dict:
    kwargs = dict(args.teacher_model_init_kwargs or {})
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        torch_dtype = getattr(torch, dtype, None)
        if not isinstance(torch_dtype, torch.dtype):
            raise ValueError(
                f"`dtype` of the teacher must be 'auto' or a torch dtype such as 'bfloat16', got {dtype!r}."
            )
        kwargs["dtype"] = torch_dtype
    # None is TRL's own default for the teacher, whose configuration names the dtype in which it was saved.
    kwargs.setdefault("dtype", None)
    if args.teacher_quantization is not None:
        kwargs["quantization_config"] = _quantization(args, kwargs)
    if args.teacher_device is not None:
        kwargs.setdefault("device_map", {"": args.teacher_device})
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    # The default device map, "auto", would spread the teacher over the GPUs of other ranks.
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED") and args.teacher_device is None:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return kwargs


def _quantization(args: OPDConfig, kwargs: dict) -> BitsAndBytesConfig:
    """Return the config that `teacher_quantization` names, and set `kwargs["dtype"]` for layers left unquantised."""
    dtype = _compute_dtype(torch.device(args.teacher_device or args.device))
    if kwargs["dtype"] is None:
        kwargs["dtype"] = dtype
    if args.teacher_quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which quantised layers compute on a device; cards before Ampere only emulate bfloat16."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _warn_of_other_template(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    if ours.chat_template and theirs.chat_template and ours.chat_template != theirs.chat_template:
        warnings.warn(
            "The chat templates of student and teacher differ. Prompts are rendered with the student's, so the teacher "
            "sees a format that it was not trained on: expect a larger divergence, or give the student's tokenizer the "
            "teacher's template.",
            stacklevel=3,
        )
