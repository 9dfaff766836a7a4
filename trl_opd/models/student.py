"""Load a student, either a model or a LoRA adapter on its base, and the reference student before distillation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from .._trl import create_model_from_path
from ..artefacts.run_files import RUN_FILE, TOKENIZER_FILE, read_run
from ..loss.lm_head import output_rows
from .model_check import kl_between, largest_difference, own_logits, require_causal_lm
from .quantised import make_readable


def load_student(
    name: str, kwargs: dict[str, Any], quantization: BitsAndBytesConfig | None, *, needs_base: bool = False
) -> tuple[str | PeftModel, str]:
    """Return the student as a trainer takes it, and the name of its tokenizer.

    For a model this is its name, and the trainer loads it; for an adapter it is the adapter loaded on its base.

    Args:
        name (`str`): A folder, or a name on the Hub.
        kwargs (`dict`): Keyword arguments of the model's `from_pretrained`.
        quantization (`transformers.BitsAndBytesConfig`, *optional*): Quantisation of the base of an adapter.
        needs_base (`bool`): Whether an adapter, switched off, has to leave the student from before its distillation.

    Raises:
        `OSError`: if there is no such folder.
        `ValueError`: if an adapter does not name its base model, or does not leave the student from before.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"There is no student in {name}: no such folder. Name an existing folder or a model on the Hub."
        )
    if find_adapter_config_file(name) is None:
        return name, name
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter in {name} does not name its base model, so it cannot be loaded: merge it, and pass "
            "the merged model."
        )
    if quantization is not None:
        kwargs = {**kwargs, "quantization_config": quantization}

    tokenizer_name = name if Path(name, TOKENIZER_FILE).is_file() else base
    base_model = create_model_from_path(base, **kwargs)
    if not needs_base:
        return PeftModel.from_pretrained(base_model, name), tokenizer_name
    _require_start_at_base(name)
    make_readable(base_model)
    before = own_logits(base_model)
    student = PeftModel.from_pretrained(base_model, name)
    with adapter_switched_off(student):
        difference = kl_between(before, own_logits(student))
    if not difference <= largest_difference(student):
        raise ValueError(
            f"The adapter in {name} has changed the weights of its base (PiSSA, OLoRA, CorDA and LoftQ do), so that "
            f"without it the student is another model, by {difference:.2g} nats per token. Pass "
            f"--reference_model_name_or_path {base}."
        )
    return student, tokenizer_name


@contextmanager
def adapter_switched_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapter of a model off inside the block, and restore which weights are trainable after it.

    PEFT makes the whole adapter trainable when it is switched on again.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _require_start_at_base(name: str) -> None:
    """Raise `ValueError` if the run that trained an adapter did not begin at its base, as far as its record says."""
    for folder in (Path(name), Path(name).parent):  # a checkpoint lies in the folder of its run
        path = folder / RUN_FILE
        if path.is_file():
            if read_run(path)["student"].get("starts_at_base") is False:
                raise ValueError(
                    f"The run of {folder} continued another adapter, or began with one that is not zero (PiSSA), so "
                    "the student without its adapter is not the student before this run: name that student with "
                    "--reference_model_name_or_path."
                )
            return


def load_student_model(
    name: str, kwargs: dict[str, Any], quantization: BitsAndBytesConfig | None
) -> tuple[PreTrainedModel | PeftModel, str]:
    """Return a student that will not be trained, in eval mode and frozen, and the name of its tokenizer.

    Args:
        name (`str`): A folder, or a name on the Hub: a model, or a LoRA adapter.
        kwargs (`dict`): Keyword arguments of the model's `from_pretrained`.
        quantization (`transformers.BitsAndBytesConfig`, *optional*): For the model, or the base of an adapter.

    Raises:
        `OSError`: if there is no such folder.
    """
    model, tokenizer_name = load_student(name, kwargs, quantization)
    if isinstance(model, str):
        quantised = {} if quantization is None else {"quantization_config": quantization}
        model = create_model_from_path(model, **kwargs, **quantised)
    make_readable(model)
    return model.eval().requires_grad_(False), tokenizer_name


def load_reference(
    name: str,
    kwargs: dict[str, Any],
    quantization: BitsAndBytesConfig | None,
    *,
    student: PreTrainedModel | PeftModel,
    device: torch.device,
) -> PreTrainedModel | PeftModel:
    """Return the student before the distillation, frozen and in eval mode.

    Args:
        name (`str`): A folder, or a name on the Hub.
        kwargs (`dict`): Keyword arguments of the model's `from_pretrained`.
        quantization (`transformers.BitsAndBytesConfig`, *optional*): For the model, or the base of an adapter.
        student (`transformers.PreTrainedModel`): The student with which it is compared.
        device (`torch.device`): Device that it is moved to, unless loading placed it already.

    Raises:
        `ValueError`: if its vocabulary is not the student's.
    """
    model, _ = load_student_model(name, kwargs, quantization)
    require_causal_lm(model, "reference student")
    reference_rows = output_rows(model)
    student_rows = output_rows(student)
    if reference_rows != student_rows:
        raise ValueError(
            f"The reference student {name} has {reference_rows} vocabulary entries, the student {student_rows}, so "
            "they cannot be compared: pass the student's own model from before the distillation."
        )
    if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
        model.to(device)
    return model
