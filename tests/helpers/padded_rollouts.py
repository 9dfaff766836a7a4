"""Padded rollouts as TRL makes them, without a model: one batch of given prompts and lengths, or micro-batches."""

import torch
from hypothesis import strategies as st

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6)


def make_inputs(prompts=((5, 6, 7), (8, 9), (10, 11, 12, 13)), lengths=(4, 7, 1), seed=0, vocab=300, tools=False):
    """Return padded rollouts as TRL's `_generate_and_score_completions` does, without a model."""
    generator = torch.Generator().manual_seed(seed)
    width, longest = max(map(len, prompts)), max(lengths)
    batch = {key: torch.zeros(len(prompts), width, dtype=torch.long) for key in ("prompt_ids", "prompt_mask")}
    batch |= {
        key: torch.zeros(len(prompts), longest, dtype=torch.long) for key in ("completion_ids", "completion_mask")
    }
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        batch["prompt_ids"][row, width - len(prompt) :] = torch.tensor(prompt)
        batch["prompt_mask"][row, width - len(prompt) :] = 1
        batch["completion_ids"][row, :length] = torch.randint(3, vocab, (length,), generator=generator)
        batch["completion_mask"][row, :length] = 1
    if tools:
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][1, 2:4] = 0
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    batch["num_items_in_batch"] = mask.sum()
    return batch


def split(lengths, steps, *, width=(12, 15), tools=True) -> list[dict[str, torch.Tensor]]:
    """Return micro-batches of rollouts of these lengths, padded to one width; tokens name rollout and place."""
    rows = []
    for number, (prompt, completion) in enumerate(lengths * steps):
        row = {name: torch.zeros(width[0], dtype=torch.long) for name in ("prompt_ids", "prompt_mask")}
        row |= {name: torch.zeros(width[1], dtype=torch.long) for name in ("completion_ids", "completion_mask")}
        row["prompt_ids"][width[0] - prompt :] = 1000 * number + torch.arange(1, prompt + 1)
        row["prompt_mask"][width[0] - prompt :] = 1
        row["completion_ids"][:completion] = 1000 * number + 500 + torch.arange(completion)
        row["completion_mask"][:completion] = 1
        row["weights"] = row["completion_mask"] * (torch.arange(width[1]) % 3).float()
        if tools:
            row["tool_mask"] = (torch.arange(width[1]) != 1).long()
        rows.append(row)
    size = len(lengths)
    return [
        {key: torch.stack([row[key] for row in rows[i * size : (i + 1) * size]]) for key in rows[0]}
        | {"num_items_in_batch": torch.tensor(77)}
        for i in range(steps)
    ]
