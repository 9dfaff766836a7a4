"""A generation batch: its positions of the loss, its cut rollouts, and micro-batches without needless padding."""

from collections.abc import Sequence

import torch

PROMPT_KEYS = ("prompt_ids", "prompt_mask")


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the positions of the loss, bool, shape `(B, C)`: tokens of the completion that no tool wrote."""
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def completions_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return the token ids of the completions of a batch that have a position of the loss, without padding."""
    rows = zip(batch["completion_ids"].tolist(), batch["completion_mask"].sum(1).tolist(), strict=True)
    return [
        ids[:length] for (ids, length), counts in zip(rows, loss_mask(batch).any(1).tolist(), strict=True) if counts
    ]


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


def tight_micro_batches(
    batches: list[dict[str, torch.Tensor]], multiple: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Return the rollouts of micro-batches in micro-batches of the same number and size, of rollouts of like length.

    Sorted by the length of prompt and completion, the longest first: when memory does not suffice, the first
    micro-batch says so. Each is trimmed to its own longest prompt and its own longest completion.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            Micro-batches padded alike: prompts on the left, completions and what goes with them on the right.
        multiple (`int`, *optional*): Lengths are rounded up to a multiple of this.
    """
    whole = {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
    lengths = torch.stack([whole["prompt_mask"].sum(1), whole["completion_mask"].sum(1)]).cpu()
    order = lengths.sum(0).argsort(descending=True, stable=True)
    groups = order.chunk(len(batches))
    return [_trimmed(whole, rows, *lengths[:, rows].amax(1).tolist(), multiple or 1) for rows in groups]


def take_rollouts(batch: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return some rollouts of a batch, int64 `(b,)` on the host, trimmed to their longest prompt and completion."""
    lengths = (batch[name][rows.to(batch[name].device)].sum(1).amax() for name in ("prompt_mask", "completion_mask"))
    return _trimmed(batch, rows, *(int(length) for length in lengths), 1)


def _joined(parts: list) -> torch.Tensor | list:
    if isinstance(parts[0], list):
        return [entry for part in parts for entry in part]
    return torch.cat(parts) if parts[0].ndim else parts[0]


def _trimmed(whole: dict[str, torch.Tensor], rows: torch.Tensor, prompt: int, completion: int, multiple: int):
    prompt, completion = (max(1, -(-length // multiple)) * multiple for length in (prompt, completion))
    width, on_device = whole["completion_ids"].shape[1], rows.to(whole["completion_ids"].device)
    batch = {}
    for key, value in whole.items():
        if isinstance(value, list):  # one entry for each rollout
            batch[key] = [value[row] for row in rows.tolist()]
            continue
        value = value[on_device] if value.ndim else value
        if key in PROMPT_KEYS:
            value = value[:, -prompt:]
        elif value.shape[1:2] == (width,):  # completions, and whatever is known of their positions
            value = value[:, :completion]
        batch[key] = value
    return batch


def locate_loss_positions(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with `positions`, `(N,)`, the places of the loss mask in its completions, flattened, in order.

    And with `position_weights`, float32, `(N,)`, which stay on the host: so it is known there which rows are projected,
    and nobody waits for a device in the middle of a step.
    """
    positions = loss_mask(batch).flatten().cpu().nonzero().squeeze(1)
    weights = batch["weights"].flatten().cpu()[positions] if "weights" in batch else torch.ones(len(positions))
    device = batch["completion_ids"].device
    return {**batch, "positions": positions.to(device), "position_weights": weights.float()}


def length_groups(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return the rows in groups of like length, the longest first, of at most `tokens` tokens each with their padding.

    A row that is longer alone is a group alone.
    """
    groups = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def left_aligned(batch: dict[str, torch.Tensor], rows: list[int], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask `(len(rows), longest)` of some rollouts, prompt and completion from the left on."""
    rows = torch.tensor(rows, device=batch["completion_ids"].device)
    ids, mask = (
        torch.cat([batch[f"prompt_{name}"][rows], batch[f"completion_{name}"][rows]], dim=1) for name in ("ids", "mask")
    )
    # Prompts are padded on the left and completions on the right, so a rollout is one piece between them.
    start = batch["prompt_mask"].shape[1] - batch["prompt_mask"][rows].sum(1, keepdim=True)
    places = (start + torch.arange(longest, device=rows.device)).clamp(max=ids.shape[1] - 1)
    inside = torch.arange(longest, device=rows.device) < mask.sum(1, keepdim=True)
    return ids.gather(1, places), inside.to(mask.dtype)


def at_positions(hidden: torch.Tensor, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the rows of hidden states `(B, C, H)` at places `(N,)` of the flattened completions, `(N, H)`.

    With a model split over devices the backbone may end on another device than the head.
    """
    return hidden.to(device).flatten(0, 1)[positions.to(device)]


def forward_inputs(batch: dict[str, torch.Tensor], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return ids and attention mask of prompts and completions, `(B, P + C)` each, and the completion length C."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    input_ids = input_ids.clamp(max=vocab_size - 1)  # the padding id may be one that the teacher lacks
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return input_ids, attention_mask, batch["completion_ids"].size(1)
