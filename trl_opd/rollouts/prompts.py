"""Checks of the prompts, which raise an error with the row of a bad prompt before anything is generated from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError

Tokens = TypeVar("Tokens")


def require_prompts(dataset: Dataset | IterableDataset | dict | None, name: str) -> None:
    """Raise `ValueError` unless every row of a dataset has a prompt: a text or a list of messages that is not empty.

    Of a stream, only the column names are checked here; its rows are checked when they are read.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            require_prompts(part, f"{name}[{key!r}]")
        return
    if (columns := getattr(dataset, "column_names", None)) is None:
        return
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} is empty: it has no rows.")
    if "prompt" not in columns:
        raise ValueError(
            f"The {name} has no column 'prompt' (it has {', '.join(columns)}): rename the column that holds "
            "the prompts with `dataset.rename_column(NAME, 'prompt')`."
        )
    if not isinstance(dataset, Dataset):
        return

    first_is_text = None
    for row, prompt in enumerate(dataset["prompt"]):
        require_prompt(prompt, f"row {row} of the {name}")
        is_text = isinstance(prompt, str)
        if first_is_text is None:
            first_is_text = is_text
        if is_text != first_is_text:
            raise ValueError(
                f"The {name} mixes texts and lists of messages: row {row} has another type than row 0. Make all "
                "prompts texts, or all of them lists of messages."
            )


def has_chats(dataset: Dataset | IterableDataset | None) -> bool:
    """Return whether a dataset is known to hold conversations; False for a stream, which is not read here."""
    return isinstance(dataset, Dataset) and len(dataset) > 0 and isinstance(dataset[0]["prompt"], list)


def require_prompt(prompt, where: str) -> None:
    """Raise `ValueError` unless a prompt is a text or a list of messages with texts, and not empty."""
    if isinstance(prompt, str):
        _require_text(prompt, where)
        if not prompt.strip():
            reason = ": it is white space only" if prompt else ""
            raise ValueError(f"The prompt in {where} is empty{reason}.")
        return

    if not isinstance(prompt, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in prompt
    ):
        raise ValueError(
            f"The prompt in {where} is neither a text nor a list of messages with a role: {str(prompt)[:80]!r}."
        )
    if not prompt:
        raise ValueError(f"The prompt in {where} is empty: it has no message.")
    for message in prompt:
        _require_content(message, where)


def _require_content(message: dict, where: str) -> None:
    content = message.get("content")
    role = message["role"]
    # A message that calls tools may have the content None.
    if "content" in message and content is None and message.get("tool_calls"):
        return
    if isinstance(content, str):
        _require_text(content, where)
        return
    if not isinstance(content, list):
        raise ValueError(f"The prompt in {where} has a message of role {role!r} without content.")

    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"The prompt in {where} has a message of role {role!r} with a part that is no text, and only text "
                f"models are distilled: {str(part)[:80]!r}."
            )
        _require_text(part["text"], where)


def _require_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The prompt in {where} holds half of a surrogate pair at character {error.start}, which no tokenizer "
            "can encode: repair or drop the row."
        ) from error


def tokenize_prompts(tokenize: Callable[[Sequence], Tokens], prompts: Sequence) -> Tokens:
    """Return the result of `tokenize` for prompts that are all texts or all lists of messages.

    Raises:
        `ValueError`: if texts and lists are mixed, or the chat template is missing or cannot render a prompt.
    """
    if len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise ValueError(
            "The dataset mixes texts and lists of messages: make all prompts texts, or all of them lists of messages."
        )
    try:
        return tokenize(prompts)
    except (TemplateError, TypeError) as error:
        # A template raises TypeError when a value has a type that it does not expect.
        if isinstance(prompts[0], str):
            raise
        raise ValueError(
            f"The tokenizer's chat template cannot render a prompt of the dataset: {error}. Fix the messages, or give "
            "the tokenizer another chat template."
        ) from error
    except ValueError as error:
        if "chat_template is not set" not in str(error):
            raise
        raise ValueError(
            "The prompts are lists of messages and the tokenizer has no chat template: set `tokenizer.chat_template`, "
            "use the tokenizer of the instruct model, or give the prompts as texts."
        ) from error


def require_fit(
    prompts: Sequence, prompt_ids: Sequence[Sequence[int]], budget: int, context: int, dataset: Iterable | None
) -> None:
    """Raise `ValueError` with the row of a prompt that has no tokens, or no room for its completion in the context.

    Args:
        prompts (`Sequence`): Prompts of a batch, as they are in the dataset.
        prompt_ids (`Sequence[Sequence[int]]`): Token ids of the prompts.
        budget (`int`): Maximum number of tokens of a completion (at least 1).
        context (`int`): Length of the context that both models support.
        dataset (`Iterable`, *optional*): Dataset in which the row is looked up; a stream cannot be searched.
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
    """Raise `ValueError` if a prompt holds a token id outside the range that student and teacher share."""
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
