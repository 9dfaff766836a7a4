"""Loads the reward that `--reward` names: a built-in one, or a function of the user."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable


def load_reward(name: str) -> Callable:
    """Return a built-in reward, or the function at a dotted path such as `my_package.rewards.exact`.

    The path may also start at the working directory.

    Raises:
        `ValueError`: if there is no such function.
    """
    from ..studies.rewards import BUILT_IN

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
        raise ValueError(f"--reward {name} is not a function: name one with the signature of TRL's rewards.")
    return reward
