"""ModelPair: the student, its frozen teacher, and the method that computes the hidden states of both.

Training steps and the studies of a student use it, so that they need no attributes of the trainer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artefacts.fingerprint import fingerprint
from ..loss.lm_head import lm_head
from ..loss.signals import HiddenStates
from ..opd_config import OPDConfig
from ..rollouts.batches import at_loss_positions, forward_inputs
from .teacher_states import CallInWrappedForward, LastHiddenState, ShardedTeacherStates, TeacherStates


@dataclass(frozen=True)
class ModelPair:
    """The two models of a distillation and the settings of the divergence between them.

    Args:
        student (`torch.nn.Module`): The student, unwrapped.
        teacher_states (`TeacherStates` or `ShardedTeacherStates`): Runs the teacher.
        last_hidden_state (`Callable`): Runs a model's backbone, as TRL's `_get_last_hidden_state`.
        call_in_wrapped_forward (`Callable`):
            Takes a wrapped model, a function and its further arguments, and calls the function with the unwrapped model
            inside the wrapper's forward, where FSDP and DeepSpeed gather the weights.
        vocab_size (`int`): The range of ids that student and teacher share.
        beta (`float`): Direction of the divergence that is trained: 0 forward KL, 1 reverse KL.
        temperature (`float`): Softmax temperature of both distributions.
        device (`torch.device`): Device of the batches.
        measure (`dict`): Names of divergence, models and tokenizer, as [`TokenStats`] takes them.
        starts_at_base (`bool`): Whether the student with its adapter switched off is the student as the run began.
    """

    student: torch.nn.Module
    teacher_states: TeacherStates | ShardedTeacherStates
    last_hidden_state: LastHiddenState
    call_in_wrapped_forward: CallInWrappedForward
    vocab_size: int
    beta: float
    temperature: float
    device: torch.device
    measure: dict[str, Any]
    starts_at_base: bool

    def hidden_states(self, inputs: dict[str, torch.Tensor], *, student: torch.nn.Module | None = None) -> HiddenStates:
        """Return the hidden states that predict the tokens of a micro-batch's loss mask, `(N, H)` for each model.

        Args:
            inputs (`dict[str, torch.Tensor]`): A micro-batch of [`locate_loss_positions`].
            student (`torch.nn.Module`, *optional*): Another student, unwrapped; `self.student` by default.
        """
        student = self.student if student is None else student
        hidden = self.last_hidden_state(student, *forward_inputs(inputs, self.vocab_size))
        # The head is read after the forward, because FSDP2 gathers it with the final norm and averages the gradient of
        # the gathered weights. A head read while it is sharded would get the gradient of this process's tokens alone.
        student_head = lm_head(student)
        device = student_head.weight.device
        teacher_hidden, teacher_head = self.teacher_states.at_loss_positions(inputs)
        student_hidden = at_loss_positions(hidden, inputs, device)
        return HiddenStates(student_hidden, teacher_hidden.to(device), student_head, teacher_head)

    def teacher_resident(self) -> AbstractContextManager[None]:
        """Return a context in which a parked teacher stays on its device."""
        return self.teacher_states.resident()

    def occurrence_metadata(self) -> dict[str, Any]:
        """Return the metadata of a file of occurrences: the models, the tokenizer and the measure."""
        return {
            "vocab_size": self.vocab_size,
            "reference": None,
            "student": self.measure["student"],
            "teacher": self.measure["teacher"],
            "tokenizer": self.measure["tokenizer"],
            "temperature": self.measure["temperature"],
            "beta": self.measure["beta"],
        }


def describe_measure(
    args: OPDConfig, student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the `measure` of a run's statistics: divergence, temperature, dropout, models and tokenizer."""
    divergences = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return {
        "divergence": divergences.get(float(args.beta), "jsd"),
        "beta": float(args.beta),
        "temperature": float(args.temperature),
        "dropout": _largest_dropout(student),
        "student": student.config.name_or_path,
        "teacher": teacher.config.name_or_path,
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "vocab_size": len(tokenizer),
            "fingerprint": fingerprint(tokenizer),
        },
    }


def _largest_dropout(model: PreTrainedModel) -> float:
    """Return the largest dropout probability of a model in training mode."""
    largest = 0.0
    for module in model.modules():
        name = "p" if isinstance(module, torch.nn.Dropout) else "attention_dropout"
        rate = getattr(module, name, 0.0)
        if isinstance(rate, (int, float)):
            largest = max(largest, float(rate))
    return largest
