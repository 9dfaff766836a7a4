"""A generation batch: which of its positions count in the loss, and which of its rollouts were cut."""

from collections.abc import Sequence

import torch


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the positions of the loss, bool, shape `(B, C)`: tokens of the completion that no tool wrote."""
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def is_truncated(completion_ids: torch.Tensor, completion_mask: torch.Tensor, stop_ids: Sequence[int]) -> torch.Tensor:
    """Return which rollouts were cut at the length limit, bool, shape `(B,)`: those that end in no stop token.

    Args:
        completion_ids (`torch.Tensor`): Right-padded completions, int64, shape `(B, C)`.
        completion_mask (`torch.Tensor`): 1 on tokens, 0 on padding, shape `(B, C)`.
        stop_ids (`Sequence[int]`): End-of-sequence ids and the padding id (TRL's rule).
    """
    last = completion_mask.sum(dim=1, keepdim=True).clamp(min=1) - 1
    last_ids = completion_ids.gather(1, last.long()).squeeze(1)
    return ~torch.isin(last_ids, torch.tensor(list(stop_ids), device=completion_ids.device))


def forward_inputs(batch: dict[str, torch.Tensor], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return ids and attention mask of prompts and completions, `(B, P + C)` each, and the completion length C."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    input_ids = input_ids.clamp(max=vocab_size - 1)  # the padding id may be one that the teacher lacks
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return input_ids, attention_mask, batch["completion_ids"].size(1)
