"""Functions on a batch of rollouts: loss positions, truncated rollouts, padding, micro-batches with little padding.

A batch is a dictionary of tensors as TRL's trainers have it: prompts `(B, P)` are padded on the left, completions
`(B, C)` and their per-token tensors on the right.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

PROMPT_KEYS = ("prompt_ids", "prompt_mask")


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return which positions are in the loss, bool, `(B, C)`: tokens of the completions that no tool wrote."""
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    return mask.bool()


def completions_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return the token ids, without padding, of the completions that have a position in the loss."""
    has_loss = loss_mask(batch).any(1)
    rows = batch["completion_ids"][has_loss].tolist()
    lengths = batch["completion_mask"][has_loss].sum(1).tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def is_truncated(completion_ids: torch.Tensor, completion_mask: torch.Tensor, stop_ids: Sequence[int]) -> torch.Tensor:
    """Return which rollouts were cut at the length limit, bool, `(B,)`: those that do not end in a stop token.

    Args:
        completion_ids (`torch.Tensor`): Right-padded completions, int64, `(B, C)`.
        completion_mask (`torch.Tensor`): 1 on tokens, 0 on padding, `(B, C)`.
        stop_ids (`Sequence[int]`): End-of-sequence ids and the padding id, as in TRL's rule.
    """
    lengths = completion_mask.sum(dim=1, keepdim=True).clamp(min=1)
    last_places = lengths.long() - 1
    last_ids = completion_ids.gather(1, last_places).squeeze(1)
    stops = torch.tensor(list(stop_ids), device=completion_ids.device)
    return torch.isin(last_ids, stops, invert=True)


def tight_micro_batches(
    batches: list[dict[str, torch.Tensor]], multiple: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Return the same rollouts, regrouped by length into as many micro-batches of the same size.

    Rollouts are sorted by the length of prompt plus completion, the longest first, so a run that lacks memory fails in
    its first micro-batch. Each micro-batch is trimmed to its longest prompt and its longest completion.

    Args:
        batches (`list[dict[str, torch.Tensor]]`): Micro-batches whose tensors have the same widths.
        multiple (`int`, *optional*): If given, lengths are rounded up to a multiple of it.
    """
    whole = {}
    for key in batches[0]:
        parts = [batch[key] for batch in batches]
        whole[key] = _join(parts)

    # One copy to the host, because every group reads its lengths there.
    prompt_lengths = whole["prompt_mask"].sum(1)
    completion_lengths = whole["completion_mask"].sum(1)
    lengths = torch.stack([prompt_lengths, completion_lengths]).cpu()
    order = lengths.sum(0).argsort(descending=True, stable=True)

    tight = []
    for rows in order.chunk(len(batches)):
        prompt, completion = lengths[:, rows].amax(1).tolist()
        tight.append(_trim(whole, rows, prompt=prompt, completion=completion, multiple=multiple or 1))
    return tight


def take_rollouts(batch: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return some rollouts of a batch, trimmed to their longest prompt and completion.

    Args:
        batch (`dict[str, torch.Tensor]`): Rollouts to choose from.
        rows (`torch.Tensor`): Indices of the rollouts to return, int64, `(b,)`, on the host.
    """
    prompt = _longest(batch["prompt_mask"], rows)
    completion = _longest(batch["completion_mask"], rows)
    return _trim(batch, rows, prompt=prompt, completion=completion)


def _longest(mask: torch.Tensor, rows: torch.Tensor) -> int:
    lengths = mask.sum(1).cpu()
    return int(lengths[rows].amax())


def _round_up(length: int, multiple: int) -> int:
    """Return a length rounded up to a multiple, at least one multiple, because a model cannot run on no columns."""
    blocks = math.ceil(length / multiple)
    return max(1, blocks) * multiple


def _join(parts: list) -> torch.Tensor | list:
    """Return the parts of all micro-batches as one part; a scalar is the same in every micro-batch."""
    first = parts[0]
    if isinstance(first, list):
        return list(itertools.chain.from_iterable(parts))
    return torch.cat(parts) if first.ndim else first


def _trim(
    whole: dict[str, torch.Tensor], rows: torch.Tensor, *, prompt: int, completion: int, multiple: int = 1
) -> dict:
    """Return some rollouts, with at most `prompt` columns of the prompts and `completion` columns of the completions.

    Both numbers are first rounded up to a multiple.
    """
    prompt = _round_up(prompt, multiple)
    completion = _round_up(completion, multiple)

    completion_ids = whole["completion_ids"]
    width = completion_ids.shape[1]
    rows_on_device = rows.to(completion_ids.device)
    batch = {}
    for key, value in whole.items():
        if isinstance(value, list):  # one entry for each rollout
            batch[key] = [value[row] for row in rows.tolist()]
            continue

        if value.ndim:
            value = value[rows_on_device]
        if key in PROMPT_KEYS:
            value = value[:, -prompt:]
        elif value.shape[1:2] == (width,):  # completions and their per-token tensors
            value = value[:, :completion]
        batch[key] = value
    return batch


def locate_loss_positions(
    batch: dict[str, torch.Tensor], *, width: int | None = None, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Return a batch with the positions in the loss, their weights, and the inputs of a forward.

    `positions`, int64, `(N,)`, are indices in the flattened completions, in order. `position_weights`, float32, `(N,)`,
    stay on the host, so the host knows which rows to project without waiting for the device in the middle of a step.

    A forward sees every rollout from its first token on, with all padding on the right, so that its positions are
    0, 1, 2 ... for every model: `rollout_ids` and `rollout_mask`, `(B, L)`. The state that predicts the n-th position
    is at `[state_rows[n], state_columns[n]]`, int64, `(N,)` each.

    Args:
        batch (`dict[str, torch.Tensor]`): Rollouts.
        width (`int`, *optional*): L; by default the length of the longest rollout.
        multiple (`int`, *optional*): If given, L is rounded up to a multiple of it.
    """
    mask = loss_mask(batch).flatten().cpu()
    positions = mask.nonzero().squeeze(1)
    weights = torch.ones(len(positions))
    if "weights" in batch:
        weights = batch["weights"].flatten().cpu()[positions]

    prompt_lengths = batch["prompt_mask"].sum(1)
    if width is None:
        lengths = prompt_lengths + batch["completion_mask"].sum(1)
        width = int(lengths.amax())
    width = _round_up(max(width, 2), multiple or 1)  # TRL leaves out the last state, so that a forward needs two
    rollout_ids, rollout_mask = left_aligned(batch, range(len(prompt_lengths)), width)

    completion_ids = batch["completion_ids"]
    completion_width = completion_ids.shape[1]
    positions = positions.to(completion_ids.device)
    rows = positions // completion_width
    # A token is predicted at the position of the token before it.
    columns = prompt_lengths[rows] + positions % completion_width - 1
    return {
        **batch,
        "positions": positions,
        "position_weights": weights.float(),
        "rollout_ids": rollout_ids,
        "rollout_mask": rollout_mask,
        "state_rows": rows,
        "state_columns": columns,
    }


def length_groups(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return row numbers in groups of similar length, the longest first.

    A group has at most `tokens` tokens, padding included, unless a single row has more.

    Args:
        lengths (`Sequence[int]`): Length of each row, in tokens.
        tokens (`int`): Maximum number of tokens in a group.
    """
    # Python's sort is stable also in reverse, so rows of the same length keep their order.
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups = []
    group = []
    longest = 0
    for row in longest_first:
        padded = longest * (len(group) + 1)
        if not groups or padded > tokens:
            group = []
            groups.append(group)
            longest = lengths[row]
        group.append(row)
    return groups


def left_aligned(
    batch: dict[str, torch.Tensor], rows: Sequence[int], longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of some rollouts, `(len(rows), longest)` each, with all padding on the right."""
    device = batch["completion_ids"].device
    rows = torch.tensor(list(rows), device=device)
    prompt_mask = batch["prompt_mask"][rows]
    ids = torch.cat([batch["prompt_ids"][rows], batch["completion_ids"][rows]], dim=1)
    mask = torch.cat([prompt_mask, batch["completion_mask"][rows]], dim=1)

    # The tokens of a rollout are contiguous: prompts are padded on the left, completions on the right.
    start = prompt_mask.shape[1] - prompt_mask.sum(1, keepdim=True)
    columns = torch.arange(longest, device=device)
    places = start + columns
    places = places.clamp(max=ids.shape[1] - 1)
    inside = columns < mask.sum(1, keepdim=True)
    return ids.gather(1, places), inside.to(mask.dtype)


def at_loss_positions(hidden: torch.Tensor, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the hidden states that predict the tokens of a batch's loss mask, `(N, H)`, on a device.

    Args:
        hidden (`torch.Tensor`): Hidden states of all positions but the last, `(B, L - 1, H)`.
        batch (`dict[str, torch.Tensor]`): A batch of [`locate_loss_positions`].
        device (`torch.device`):
            Device of the head. When a model is split over devices, the backbone may end on a different one.
    """
    rows = batch["state_rows"].to(hidden.device)
    columns = batch["state_columns"].to(hidden.device)
    return hidden[rows, columns].to(device)


def pad_token_ids(
    rows: Sequence[Sequence[int]], pad_id: int, *, side: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of lists of token ids, padded to the longest list, int64, `(B, length)` each.

    Args:
        rows (`Sequence[Sequence[int]]`): Lists of token ids.
        pad_id (`int`): Id that fills shorter rows.
        side (`str`): Side of the padding, "left" or "right".
        device (`torch.device`): Device of the two tensors.
    """
    ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    padded_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence(ones, batch_first=True, padding_side=side)
    return padded_ids, mask


def forward_inputs(batch: dict[str, torch.Tensor], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the arguments of a forward of a batch of [`locate_loss_positions`].

    They are ids and attention mask, `(B, L)` each, and the number of states that it keeps, L - 1.
    """
    # The teacher may lack the padding id; the attention mask hides these positions.
    input_ids = batch["rollout_ids"].clamp(max=vocab_size - 1)
    return input_ids, batch["rollout_mask"], input_ids.shape[1] - 1
