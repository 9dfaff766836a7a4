"""JSON that comes from outside: read with its format and version checked, then value by value.

An error of a value names the field, the value found and what was expected; an error of a file names the file, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Check = Callable[[Any, str], None]


def read_json(
    path: Path, what: str, *, format: str | None, version: int, max_bytes: int, made_by: str | None = None
) -> dict[str, Any]:
    """Return the object in a JSON file of a known format and version, whose numbers are all finite.

    Args:
        path (`Path`): The file.
        what (`str`): What it should be, for errors: "a rock set".
        format (`str`, *optional*): Its `format`; `None` for a file that names none.
        version (`int`): Its `version`.
        max_bytes (`int`): A larger file is refused before it fills the memory.
        made_by (`str`, *optional*): Command that makes such a file, for errors.

    Raises:
        `ValueError`: if the file is none, with the file and the reason.
        `OSError`: if there is no such file.
    """
    with name_file_in_errors(path, what):
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"{size} bytes, at most {max_bytes} are read")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=refuse_constant, parse_float=finite)
        if format is None and not isinstance(content, dict):
            raise ValueError("it is not an object")
        if format is not None and not (isinstance(content, dict) and content.get("format") == format):
            hint = "" if made_by is None else f"; `{made_by}` makes one"
            raise ValueError(f'its "format" is not "{format}"{hint}')
        found = content.get("version")
        if found is True or found != version:
            raise ValueError(f"version {short(found)}, this trl_opd reads version {version}: upgrade it")
        return content


@contextmanager
def name_file_in_errors(path: Path, what: str) -> Iterator[None]:
    """Begin the text of a `ValueError` with the file that it is of, and what that should be."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not {what}: {reason}.") from error


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
