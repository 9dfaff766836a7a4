"""Reward functions with TRL's signature, built-in or the user's; each error names the problem."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_match(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where a completion equals the answer, ignoring white space around both."""
    return [float(text_of(one).strip() == str(other).strip()) for one, other in zip(completions, answer, strict=True)]


def last_number(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where the last number of a completion is the last number of the answer."""
    found = []
    for one, other in zip(completions, answer, strict=True):
        number = _last_number(text_of(one))
        expected = _last_number(str(other))
        is_equal = None not in (number, expected) and math.isclose(number, expected, rel_tol=1e-9)
        found.append(float(is_equal))
    return found


def math_verify(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where a completion's mathematics equals the answer's, by the package `math-verify`."""
    from math_verify import parse, verify

    return [
        float(verify(parse(str(other)), parse(text_of(one)))) for one, other in zip(completions, answer, strict=True)
    ]


BUILT_IN = {"exact_match": exact_match, "last_number": last_number, "math_verify": math_verify}


def text_of(completion: str | list[dict]) -> str:
    """Return the text of a completion in the form that TRL passes to rewards: a text, or a list of messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def reward_completions(
    reward: Callable, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], problems: Sequence[int]
) -> list[float]:
    """Return the reward of completions of problems.

    Args:
        reward (`Callable`): Takes `prompts`, `completions` and every other column of the dataset by name, as TRL's do.
        rows (`Sequence[Mapping]`): Rows of the dataset, one for each completion.
        texts (`Sequence[str]`): The completions.
        problems (`Sequence[int]`): Their indices, for errors.

    Raises:
        `ValueError`: if the function raises, or does not return one finite number for each completion.
    """
    if not texts:
        return []
    try:
        found = list(_call(reward, rows, texts))
    except Exception as error:
        for row, text, problem in zip(rows, texts, problems, strict=True):
            try:
                _call(reward, [row], [text])
            except Exception as own:
                raise ValueError(f"The reward raised for problem {problem}: {type(own).__name__}: {own}") from own
        raise ValueError(f"The reward raised: {type(error).__name__}: {error}") from error
    if len(found) != len(texts):
        raise ValueError(f"The reward returned {len(found)} numbers for {len(texts)} completions.")
    for value, problem in zip(found, problems, strict=True):
        number = isinstance(value, (int, float)) or hasattr(value, "__float__")
        if not number or not math.isfinite(float(value)):
            raise ValueError(f"The reward of problem {problem} is {value!r}, not a finite number.")
    return [float(value) for value in found]


def _call(reward: Callable, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]):
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row in rows]
    is_chat = isinstance(prompts[0], list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else list(texts)
    return reward(prompts=prompts, completions=completions, **columns)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
