"""Reading JSON files that a user passes in: checks of the format, of the version, and of single values.

The error of a value names the field, the value found and what was expected. The error of a file also names the file.
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
        what (`str`): What the file should be, for errors: "a rock set".
        format (`str`, *optional*): Required value of its key `format`; `None` for a file without this key.
        version (`int`): Required value of its key `version`.
        max_bytes (`int`): A larger file is not read, because it could fill the memory.
        made_by (`str`, *optional*): Command that writes files of this format, for errors.

    Raises:
        `ValueError`: if the file is too large, is not JSON, or has another format or version. The message names the
            file and the reason.
        `OSError`: if there is no such file.
    """
    with name_file_in_errors(path, what):
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"it has {size} bytes, at most {max_bytes} are read")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=refuse_constant, parse_float=finite)

        is_object = isinstance(content, dict)
        if format is not None and (not is_object or content.get("format") != format):
            hint = "" if made_by is None else f"; `{made_by}` writes one"
            raise ValueError(f'its "format" is not "{format}"{hint}')
        if not is_object:
            raise ValueError("it is not an object")

        found = content.get("version")
        if found is True or found != version:
            raise ValueError(f"it has version {short(found)}, this trl_opd reads version {version}: upgrade trl_opd")
        return content


@contextmanager
def name_file_in_errors(path: Path, what: str) -> Iterator[None]:
    """Prefix the message of a `ValueError` raised inside with the file and with what it should be."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not {what}: {reason}.") from error


def section(content: dict, name: str, kinds: Mapping[str, Check], null: bool = False) -> dict[str, Any]:
    """Return the object at the key `name` of parsed JSON, after checking its fields.

    Args:
        content (`dict`): The parsed JSON.
        name (`str`): The key.
        kinds (`Mapping[str, Check]`): Field -> the check that its value must pass.
        null (`bool`, *optional*, defaults to `False`):
            Whether these fields may be absent or null; an absent one is returned as `None`.

    Raises:
        `ValueError`: if there is no such object, or a field is missing or fails its check.
    """
    found = content.get(name)
    _require_type(found, dict, name, "an object")
    require(found, kinds, name, null)
    return dict.fromkeys(kinds) | found


def require(content: dict, kinds: Mapping[str, Check], where: str, null: bool = False) -> None:
    """Raise `ValueError` unless `content` has each field of `kinds` and its value passes the check.

    With `null` a field may also be absent or null. `where` names the object in errors.
    """
    for key, check in kinds.items():
        if null and content.get(key) is None:
            continue
        if key not in content:
            raise ValueError(f'"{where}.{key}" is missing')
        check(content[key], f"{where}.{key}")


def entries(content: dict, key: str, where: str = "") -> list:
    """Return the list at a key of parsed JSON; raise `ValueError` if there is none."""
    found = content.get(key)
    _require_type(found, list, where + key, "a list")
    return found


def whole(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least 0 that fits into 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{where} is {short(value)}, not a whole number of at least 0")


def number(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 1e300:  # NaN also fails this comparison
        raise ValueError(f"{where} is {short(value)}, not a finite number")


def text(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a string."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {short(value)}, not a string")


def truth(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {short(value)}, not true or false")


def refuse_constant(name: str) -> float:
    """Raise `ValueError` for NaN and infinities: Python reads them, though JSON has none (`parse_constant`)."""
    raise ValueError(f"it holds {name}; every number must be finite")


def finite(literal: str) -> float:
    """Return the value of a JSON number; raise `ValueError` if it is too large for a float (`parse_float`)."""
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"it holds {short(literal)}; every number must be finite")
    return value


def short(value: Any, limit: int = 60) -> str:
    """Return the value as an error message shows it, cut at `limit` characters."""
    # Python refuses to print an integer of more than 4300 digits.
    if isinstance(value, int) and abs(value) >= 10**limit:
        return "a number of too many digits"
    shown = repr(value)
    if len(shown) > limit:
        shown = shown[: limit - 3] + "..."
    return shown


def _require_type(value: Any, expected: type, where: str, description: str) -> None:
    if value is None:
        raise ValueError(f'"{where}" is missing')
    if not isinstance(value, expected):
        raise ValueError(f'"{where}" is not {description}')
