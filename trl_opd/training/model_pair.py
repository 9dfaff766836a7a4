"""A micro-batch of a trainer -> the hidden states that are compared, the loss, and what is known of each token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artefacts.fingerprint import fingerprint
from ..loss.divergence import score
from ..loss.lm_head import LMHead, lm_head
from ..opd_config import OPDConfig
from ..rollouts.batches import at_positions, forward_inputs, locate


def compared(
    trainer, student: torch.nn.Module, inputs: dict[str, torch.Tensor], positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LMHead, LMHead]:
    """Return the hidden states that predict the tokens at positions, `(N, H)`, and the heads, of both models.

    Args:
        trainer (`OPDTrainer`): Holds the teacher.
        student (`torch.nn.Module`): The unwrapped student.
        inputs (`dict[str, torch.Tensor]`): A micro-batch.
        positions (`torch.Tensor`): Places of the loss mask in its flattened completions, `(N,)`.
    """
    forward = forward_inputs(inputs, trainer._vocab_size)
    hidden = trainer._get_last_hidden_state(student, *forward)
    # Only now: FSDP2 gathers the head with the final norm, and averages the gradient of what it has gathered. A head
    # that is read while it is sharded would have the gradient of this process's tokens alone.
    head = lm_head(student)
    student_hidden = at_positions(hidden, positions, head)
    teacher_hidden, teacher_head = trainer._teacher_phase.compared(inputs, forward, positions, head)
    return student_hidden, teacher_hidden, head, teacher_head


def weighted_loss(trainer, student: torch.nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch):
    """Return the loss of a micro-batch (scalar), and leave its figures with the trainer.

    No collective may run in here: it runs inside of the wrapped forward.
    """
    inputs = inputs if "positions" in inputs else locate(inputs)
    positions, weights, training = inputs["positions"], inputs["position_weights"], trainer.model.training
    denominator = len(weights) if num_items_in_batch is None else num_items_in_batch
    complete = "weights" not in inputs or trainer._arm.measures_all(trainer.state)
    loss, signals = score(
        *compared(trainer, student, inputs, positions),
        inputs["completion_ids"].flatten()[positions],
        weights,
        inputs.get("weight_denominator", denominator),
        measure_frozen=complete,
        beta=trainer.beta,
        temperature=trainer.temperature,
        chunk_bytes=trainer.args.divergence_chunk_bytes,
    )
    figures = trainer._figures["train" if training else "eval"]
    figures.add_forward(inputs["prompt_mask"], inputs["completion_mask"])
    figures.add_signals(signals, complete)
    if training:
        trainer._stats.update(signals)
        trainer._occurrences.add(inputs, signals, trainer.state)
    trainer._finite.note(signals.entropy, signals.divergence, complete | (weights != 0))
    return loss


def describe_measure(
    args: OPDConfig, student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the `measure` of a run's statistics: divergence, temperature, dropout, models and tokenizer."""
    names = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return {
        "divergence": names.get(float(args.beta), "jsd"),
        "beta": float(args.beta),
        "temperature": float(args.temperature),
        "dropout": _dropout(student),
        "student": student.config._name_or_path,
        "teacher": teacher.config._name_or_path,
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "vocab_size": len(tokenizer),
            "fingerprint": fingerprint(tokenizer),
        },
    }


def _dropout(model: PreTrainedModel) -> float:
    """Return the largest dropout probability of a model in training mode."""
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates += [getattr(module, "attention_dropout", 0.0) for module in model.modules()]
    return max((float(rate) for rate in rates if isinstance(rate, (int, float))), default=0.0)
