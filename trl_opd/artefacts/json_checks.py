"""Checks of values that come from outside: each names the field, the value found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], None]


def section(content: dict, name: str, kinds: Mapping[str, Check], null: bool = False) -> dict[str, Any]:
    """Return the object `name` of parsed JSON with the fields of `kinds`; with `null` they may be absent or null."""
    found = content.get(name)
    if not isinstance(found, dict):
        raise ValueError(f'"{name}" is missing' if found is None else f'"{name}" is not an object')
    require(found, kinds, name, null)
    return {key: found.get(key) for key in kinds} | found


def require(content: dict, kinds: Mapping[str, Check], where: str, null: bool = False) -> None:
    """Raise `ValueError` unless each field of `kinds` stands in `content` and passes its check."""
    for key, check in kinds.items():
        if null and content.get(key) is None:
            continue
        if key not in content:
            raise ValueError(f'"{where}.{key}" is missing')
        check(content[key], f"{where}.{key}")


def entries(content: dict, key: str, where: str = "") -> list:
    """Return the list `key` of parsed JSON."""
    found = content.get(key)
    if not isinstance(found, list):
        raise ValueError(f'"{where}{key}" is missing' if found is None else f'"{where}{key}" is not a list')
    return found


def whole(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least 0 that 64 bits hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{where} is {short(value)}, not a whole number of at least 0")


def number(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a finite number."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or abs(value) > 1e300 or not math.isfinite(value):
        raise ValueError(f"{where} is {short(value)}, not a finite number")


def text(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a text."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {short(value)}, not a text")


def truth(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {short(value)}, not true or false")


def refuse_constant(name: str) -> float:
    """Refuse NaN and the infinities, which JSON does not have but Python reads (`json.loads(parse_constant=...)`)."""
    raise ValueError(f"it holds {name}; every number must be finite")


def finite(literal: str) -> float:
    """Return the number of a JSON literal; refuse one that no float holds (`json.loads(parse_float=...)`)."""
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"it holds {short(literal)}; every number must be finite")
    return value


def short(value: Any, limit: int = 60) -> str:
    """Return the value as a message shows it, cut at `limit` characters."""
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**limit else "a number of too many digits"
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
