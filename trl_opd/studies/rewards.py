"""Built-in reward functions with TRL's signature, and calling a reward function with errors that name the problem."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_match(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion that equals its answer, ignoring white space around both, else 0."""
    return _compare(completions, answer, lambda text, expected: text.strip() == expected.strip())


def last_number(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion whose last number equals the last number of its answer, else 0."""
    return _compare(completions, answer, _has_equal_number)


def math_verify(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion that the package `math-verify` finds equal to its answer, else 0."""
    from math_verify import parse, verify

    return _compare(completions, answer, lambda text, expected: verify(parse(expected), parse(text)))


BUILT_IN = {"exact_match": exact_match, "last_number": last_number, "math_verify": math_verify}


def _compare(completions: Sequence, answers: Sequence[str], is_right: Callable[[str, str], bool]) -> list[float]:
    rewards = []
    for completion, expected in zip(completions, answers, strict=True):
        rewards.append(float(is_right(text_of(completion), str(expected))))
    return rewards


def _has_equal_number(text: str, expected: str) -> bool:
    # A text without a number gives NaN, which is close to nothing.
    return math.isclose(_last_number(text), _last_number(expected), rel_tol=1e-9)


def _last_number(text: str) -> float:
    numbers = _NUMBER.findall(text)
    if not numbers:
        return math.nan
    return float(numbers[-1].replace(",", ""))


def text_of(completion: str | list[dict]) -> str:
    """Return the text of a completion in either form that TRL passes to rewards: a text or a list of messages."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"])


def reward_completions(
    reward: Callable, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], problems: Sequence[int]
) -> list[float]:
    """Return the rewards of completions, one for each.

    Args:
        reward (`Callable`):
            Reward function with TRL's signature: it takes `prompts`, `completions` and every other column by name.
        rows (`Sequence[Mapping]`): Row of the dataset for each completion.
        texts (`Sequence[str]`): The completions.
        problems (`Sequence[int]`): Index of the problem of each completion, for error messages.

    Raises:
        `ValueError`: if the function raises an error, or does not return one finite number for each completion.
    """
    if not texts:
        return []
    try:
        values = list(_call(reward, rows, texts))
    except Exception as error:  # the function may be the user's, and raise anything
        _name_problem(reward, rows, texts, problems)
        raise ValueError(
            f"The reward function raised {type(error).__name__}: {error}. It raises nothing for each problem alone, so "
            "check how it handles a batch."
        ) from error

    if len(values) != len(texts):
        raise ValueError(
            f"The reward function returned {len(values)} numbers for {len(texts)} completions: it must return one "
            "number for each."
        )
    rewards = []
    for value, problem in zip(values, problems, strict=True):
        number = float(value) if hasattr(value, "__float__") else math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"The reward function returned {value!r} for problem {problem}, not a finite number: let it return 0 "
                "where it finds no answer."
            )
        rewards.append(number)
    return rewards


def _call(reward: Callable, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]):
    columns = {}
    for name in rows[0]:
        columns[name] = [row[name] for row in rows]
    prompts = columns.pop("prompt")
    completions = list(texts)
    if isinstance(prompts[0], list):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    return reward(prompts=prompts, completions=completions, **columns)


def _name_problem(
    reward: Callable, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], problems: Sequence[int]
) -> None:
    """Raise `ValueError` with the first problem for which the reward function raises an error when called alone."""
    for row, text, problem in zip(rows, texts, problems, strict=True):
        try:
            _call(reward, [row], [text])
        except Exception as error:  # the function may be the user's, and raise anything
            raise ValueError(
                f"The reward function raised {type(error).__name__} for problem {problem}: {error}. Fix the function, "
                "or remove the problem from the dataset."
            ) from error
