"""Padded rollouts as TRL makes them, without a model: one batch of given prompts and lengths, or micro-batches."""

import torch
from hypothesis import strategies as st

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6)


def pad(rollouts: list[tuple], prompt_width: int, completion_width: int) -> dict[str, torch.Tensor]:
    """Return a batch of (prompt ids, completion ids): prompts are padded on the left, completions on the right."""
    size = len(rollouts)
    batch = {}
    for part, width in (("prompt", prompt_width), ("completion", completion_width)):
        for name in ("ids", "mask"):
            batch[f"{part}_{name}"] = torch.zeros(size, width, dtype=torch.long)
    for row, (prompt, completion) in enumerate(rollouts):
        batch["prompt_ids"][row, prompt_width - len(prompt) :] = prompt
        batch["prompt_mask"][row, prompt_width - len(prompt) :] = 1
        batch["completion_ids"][row, : len(completion)] = completion
        batch["completion_mask"][row, : len(completion)] = 1
    return batch


def make_inputs(prompts=((5, 6, 7), (8, 9), (10, 11, 12, 13)), lengths=(4, 7, 1), seed=0, vocab=300, tools=False):
    """Return padded rollouts as TRL's `_generate_and_score_completions` does."""
    generator = torch.Generator().manual_seed(seed)
    completions = [torch.randint(3, vocab, (length,), generator=generator) for length in lengths]
    rollouts = list(zip(map(torch.tensor, prompts), completions, strict=True))
    batch = pad(rollouts, max(map(len, prompts)), max(lengths))
    if tools:
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][1, 2:4] = 0
    batch["num_items_in_batch"] = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum()
    return batch


def split(lengths, steps, *, width=(12, 15), tools=True) -> list[dict[str, torch.Tensor]]:
    """Return micro-batches of rollouts of these lengths, padded to one width; tokens name rollout and place."""
    rollouts = []
    for number, (prompt, completion) in enumerate(lengths * steps):
        ids = 1000 * number + torch.arange(1, prompt + 1)
        rollouts.append((ids, 1000 * number + 500 + torch.arange(completion)))
    batches = []
    for step in range(steps):
        batch = pad(rollouts[step * len(lengths) : (step + 1) * len(lengths)], *width)
        places = torch.arange(width[1])
        batch["weights"] = batch["completion_mask"] * (places % 3).float()
        if tools:
            batch["tool_mask"] = (places != 1).long().repeat(len(lengths), 1)
        batches.append(batch | {"num_items_in_batch": torch.tensor(77)})
    return batches
