"""Reward functions with TRL's signature, built in ones and the user's own; each error names the problem."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_match(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where a completion is the answer, but for white space around it."""
    return [float(text_of(one).strip() == str(other).strip()) for one, other in zip(completions, answer, strict=True)]


def last_number(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where the last number of a completion is the last number of the answer."""
    found = []
    for one, other in zip(completions, answer, strict=True):
        numbers = _last_number(text_of(one)), _last_number(str(other))
        found.append(float(None not in numbers and math.isclose(*numbers, rel_tol=1e-9)))
    return found


def math_verify(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where a completion's mathematics equals the answer's, by the package `math-verify`."""
    from math_verify import parse, verify

    return [
        float(verify(parse(str(other)), parse(text_of(one)))) for one, other in zip(completions, answer, strict=True)
    ]


BUILT_IN = {"exact_match": exact_match, "last_number": last_number, "math_verify": math_verify}


def load_reward(name: str) -> Callable:
    """Return a built-in reward, or the function of a dotted path such as `my_package.rewards.exact`.

    Modules of the working directory can be named, too.

    Raises:
        `ValueError`: if there is no such function.
    """
    if name in BUILT_IN:
        if name == "math_verify" and importlib.util.find_spec("math_verify") is None:
            raise ValueError("The reward math_verify needs a package: `pip install math-verify`.")
        return BUILT_IN[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(f"There is no reward {name!r}: take {', '.join(BUILT_IN)}, or a dotted path to a function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward {name} cannot be imported: {error}") from error
    if not callable(reward):
        raise ValueError(f"The reward {name} is no function.")
    return reward


def text_of(completion: str | list[dict]) -> str:
    """Return the text of a completion as TRL hands it to rewards: a text, or a list of messages."""
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
        `ValueError`: if the function raises, or returns something else than a finite number for each.
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
