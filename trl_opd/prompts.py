"""Checks of the prompts: a row that cannot be a prompt is named before anything is generated from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from datasets import Dataset, IterableDataset


def require_prompts(dataset: Dataset | IterableDataset | dict | None, name: str) -> None:
    """Raise `ValueError` unless every row of a dataset has a prompt, a text or a list of messages, that is not empty.

    A stream is only asked for its column; its rows are checked as they come.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            require_prompts(part, f"{name}[{key!r}]")
        return
    if (columns := getattr(dataset, "column_names", None)) is None:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"The {name} has no column 'prompt' (it has {', '.join(columns) or 'none'}): rename the column that holds "
            "the prompts with `dataset.rename_column(NAME, 'prompt')`."
        )
    if isinstance(dataset, Dataset):
        first = None
        for row, prompt in enumerate(dataset["prompt"]):
            require_prompt(prompt, f"row {row} of the {name}")
            first = prompt if first is None else first
            if isinstance(prompt, str) != isinstance(first, str):
                raise ValueError(
                    f"The {name} mixes texts and lists of messages: row {row} is not of the kind of row 0. Make all "
                    "prompts of one kind."
                )


def require_prompt(prompt, where: str) -> None:
    """Raise `ValueError` unless a prompt is a text, or a list of messages, that is not empty."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"The prompt in {where} is empty.")
        return
    if not isinstance(prompt, list) or not all(isinstance(message, dict) and "role" in message for message in prompt):
        raise ValueError(
            f"The prompt in {where} is neither a text nor a list of messages with a role: {str(prompt)[:80]!r}."
        )
    if not prompt:
        raise ValueError(f"The prompt in {where} is empty: it has no message.")
    for message in prompt:
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise ValueError(f"The prompt in {where} has a message of role {message['role']!r} without content.")


def require_fit(
    prompts: Sequence, prompt_ids: Sequence[Sequence[int]], budget: int, context: int, dataset: Iterable | None
) -> None:
    """Raise `ValueError` naming the row when a prompt and its completion would not fit into the model's context.

    Args:
        prompts (`Sequence`): Prompts of a batch as the dataset has them.
        prompt_ids (`Sequence[Sequence[int]]`): Their tokens.
        budget (`int`): Tokens of a completion at most (at least 1).
        context (`int`): Positions that both models have.
        dataset (`Iterable`, *optional*): Where to look for the row, when that is possible.
    """
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not ids:
            raise ValueError(f"The prompt in {_row(prompt, dataset)} has no tokens.")
        if len(ids) + budget > context:
            raise ValueError(
                f"The prompt in {_row(prompt, dataset)} has {len(ids)} tokens and the completion up to {budget}, more "
                f"than the {context} positions of the models: shorten or drop it, or lower max_completion_length."
            )


def require_embeddable(prompt_ids: Sequence[Sequence[int]], vocab_size: int, tokenizer) -> None:
    """Raise `ValueError` when a prompt holds an id outside the range that student and teacher share."""
    largest = max((max(ids, default=0) for ids in prompt_ids), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"A prompt holds token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), which is outside the "
            f"{vocab_size} ids that student and teacher share: the other model cannot embed it."
        )


def _row(prompt, dataset: Iterable | None) -> str:
    if isinstance(dataset, Dataset):
        for row, other in enumerate(dataset["prompt"]):
            if other == prompt:
                return f"row {row} of the dataset"
    return f"a row of the dataset ({str(prompt)[:60]!r})"
