"""Checks prompts before anything is generated from them, and names the row of a bad one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError

Tokens = TypeVar("Tokens")


def require_prompts(dataset: Dataset | IterableDataset | dict | None, name: str) -> None:
    """Raise `ValueError` unless every row of a dataset has a prompt, either all texts or all lists of messages.

    Of a stream only the column names are checked here; its rows are checked when they are read.

    Args:
        dataset (`Dataset` or `IterableDataset` or `dict`, *optional*): The dataset, or several by name.
        name (`str`): How messages name the dataset.

    Raises:
        `ValueError`: that names the dataset and the row.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            require_prompts(part, f"{name}[{key!r}]")
        return
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    can_be_read = isinstance(dataset, Dataset)
    if not columns or (can_be_read and len(dataset) == 0):
        raise ValueError(f"The {name} is empty: it has no rows.")
    if "prompt" not in columns:
        raise ValueError(
            f"The {name} has no column 'prompt' (it has {', '.join(columns)}): rename the column that holds "
            "the prompts with `dataset.rename_column(NAME, 'prompt')`."
        )
    if not can_be_read:
        return

    prompts = dataset["prompt"]
    first_is_text = isinstance(prompts[0], str)
    for row, prompt in enumerate(prompts):
        require_prompt(prompt, f"row {row} of the {name}")
        if isinstance(prompt, str) != first_is_text:
            raise ValueError(
                f"The {name} mixes texts and lists of messages: row {row} has another type than row 0. Make all "
                "prompts texts, or all of them lists of messages."
            )


def has_chats(dataset: Dataset | IterableDataset | None) -> bool:
    """Return whether the prompts of a dataset are lists of messages; False for a stream, which is not read here."""
    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        return False
    first = dataset[0]
    return isinstance(first["prompt"], list)


def require_prompt(prompt, where: str) -> None:
    """Raise `ValueError` unless a prompt is a text or a list of messages with texts, and not empty.

    Args:
        prompt: What a row of a dataset holds as its prompt.
        where (`str`): How messages name the row.

    Raises:
        `ValueError`: that names the row and says what is wrong with it.
    """
    if isinstance(prompt, str):
        _require_text(prompt, where)
        if not prompt.strip():
            reason = ": it is white space only" if prompt else ""
            raise ValueError(f"The prompt in {where} is empty{reason}.")
        return

    if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
        raise ValueError(
            f"The prompt in {where} is neither a text nor a list of messages with a role: {str(prompt)[:80]!r}."
        )
    if not prompt:
        raise ValueError(f"The prompt in {where} is empty: it has no message.")
    for message in prompt:
        _require_content(message, where)


def _is_message(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _is_text_part(value) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str)


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
        if not _is_text_part(part):
            raise ValueError(
                f"The prompt in {where} has a message of role {role!r} with a part that is not text, and only text "
                f"models can be distilled: {str(part)[:80]!r}."
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
    """Return `tokenize(prompts)`, and turn the errors of a chat template into ones that say what to do.

    Args:
        tokenize (`Callable[[Sequence], Tokens]`): Tokenizes a list of prompts.
        prompts (`Sequence`): Prompts, either all texts or all lists of messages.

    Raises:
        `ValueError`: if texts and lists are mixed, or the chat template is missing or cannot render a prompt.
    """
    are_texts = [isinstance(prompt, str) for prompt in prompts]
    if any(are_texts) and not all(are_texts):
        raise ValueError(
            "The dataset mixes texts and lists of messages: make all prompts texts, or all of them lists of messages."
        )
    try:
        return tokenize(prompts)
    except (TemplateError, TypeError) as error:
        # A template raises TypeError when a value has a type that it does not expect. Texts need no template.
        if are_texts[0]:
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
    """Raise `ValueError` if a prompt has no tokens, or leaves too little of the context for its completion.

    Args:
        prompts (`Sequence`): Prompts of a batch, as the dataset has them.
        prompt_ids (`Sequence[Sequence[int]]`): Token ids of the prompts.
        budget (`int`): Maximum number of tokens of a completion, at least 1.
        context (`int`): Length of the context that both models support, in tokens.
        dataset (`Iterable`, *optional*): Dataset in which the message looks up the row; a stream cannot be searched.

    Raises:
        `ValueError`: that names the row.
    """
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not ids:
            raise ValueError(f"The prompt in {_row(prompt, dataset)} has no tokens.")
        if len(ids) + budget > context:
            raise ValueError(
                f"The prompt in {_row(prompt, dataset)} has {len(ids)} tokens and its completion up to {budget}, more "
                f"than the {context} positions of the models: shorten or drop it, or lower max_completion_length."
            )


def require_embeddable(prompt_ids: Sequence[Sequence[int]], vocab_size: int, tokenizer) -> None:
    """Raise `ValueError` if a prompt has a token id outside the range that student and teacher share.

    Args:
        prompt_ids (`Sequence[Sequence[int]]`): Token ids of the prompts.
        vocab_size (`int`): Number of ids that student and teacher share.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The student's tokenizer, which names the token.

    Raises:
        `ValueError`: that names the token.
    """
    largest = max(itertools.chain.from_iterable(prompt_ids), default=0)
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"A prompt has the token id {largest} ({token!r}), which is outside the {vocab_size} ids that student and "
            "teacher share, so the other model cannot embed it: drop the prompt, or remove the token from it."
        )


def _row(prompt, dataset: Iterable | None) -> str:
    if isinstance(dataset, Dataset):
        for row, other in enumerate(dataset["prompt"]):
            if other == prompt:
                return f"row {row} of the dataset"
    return f"a row of the dataset ({str(prompt)[:60]!r})"
