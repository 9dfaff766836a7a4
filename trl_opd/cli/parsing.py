"""Flags and a YAML file -> dataclasses, by TRL's parser."""

from __future__ import annotations

import dataclasses
import os
from datetime import date
from typing import Any, get_args, get_origin, get_type_hints

# A recipe is a page. Anchors let a page stand for more values than a memory holds, so they are counted unfolded.
MOST_BYTES, MOST_VALUES = 2**16, 2**14
# Options that take a text, or nothing behind them.
FLAGS_OF_TEXT = ("resume_from_checkpoint", "fsdp")
# Options that take texts behind commas, or a list of them.
LISTS_IN_TEXT = ("arms",)


def parse(parser, argv: list[str]):
    """Return the parsed dataclasses; a broken YAML file is a `ValueError` that names it."""
    # TRL's parser knows the two words only.
    argv = [word for part in argv for word in (part.split("=", 1) if part.startswith("--config=") else [part])]
    if argv[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    unread = []
    if "--config" in argv:
        place = argv.index("--config")
        _, path = argv[place : place + 2]
        del argv[place : place + 2]
        content = _read_config(path, parser)
        os.environ.update({name: str(value) for name, value in content.pop("env", {}).items()})  # as TRL does
        unread = parser.set_defaults_with_config(**content)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    unknown = [*unread, *unknown]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed


def _read_config(path: str, parser) -> dict[str, Any]:
    """Return the options of a YAML file, each of a kind that it takes: TRL's parser reads whatever stands there."""
    import yaml

    with open(path, "rb") as file:
        if len(text := file.read(MOST_BYTES + 1)) > MOST_BYTES:
            raise ValueError(f"{path} is no recipe: it has more than {MOST_BYTES} bytes.")
    try:
        # First as nodes, in which an anchor's values are not yet copied.
        if _unfolded(yaml.compose(text, Loader=yaml.SafeLoader), {}) > MOST_VALUES:
            raise ValueError(f"with its anchors unfolded it has more than {MOST_VALUES} values")
        content = yaml.safe_load(text)
    except Exception as error:  # of a value that is not of its tag PyYAML raises whatever it meets
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a mapping of options to values.")
    if wrong := [name for name in content if not isinstance(name, str) or name == "self"]:
        raise ValueError(f"{path}: {wrong[0]!r:.60} is no name of an option.")
    if not isinstance(names := content.get("env", {}), dict) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: env must be a mapping of names to values.")
    for kind in parser.dataclass_types:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in content:
                content[field.name] = _value(content[field.name], hints[field.name], field, path)
    return content


def _unfolded(node, known: dict[int, int]) -> int:
    """Return how many values a node of YAML has when every alias is a copy."""
    import yaml

    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # of a node in itself
        parts = [] if node is None or isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


def _value(value: Any, hint: Any, field: dataclasses.Field, path: str) -> Any:
    """Return a value as the option takes it: a text, which is then read as that of a flag, or of a kind it names."""
    kinds = {get_origin(kind) or kind for kind in (*get_args(hint), hint)}
    if isinstance(value, str) or type(value) in kinds or (value is None and field.default is None):
        return value
    if type(value) in (int, float) and kinds & {float, str}:
        return value if float in kinds else str(value)
    if field.name in FLAGS_OF_TEXT and isinstance(value, (bool, list)):
        return value
    if isinstance(value, float) and int in kinds and value.is_integer():
        return int(value)
    if isinstance(value, date) and str in kinds:
        return value.isoformat()
    if isinstance(value, list) and field.name in LISTS_IN_TEXT:
        return ",".join(map(str, value))
    wanted = sorted(kind.__name__ for kind in kinds & {bool, int, float, str, list, dict})
    why = " (YAML reads yes, no, on and off as truths: put them in quotes)" if isinstance(value, bool) else ""
    raise ValueError(f"{path}: {field.name} is {value!r:.60}, and must be {' or '.join(wanted) or 'str'}{why}.")
