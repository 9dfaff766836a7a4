"""Parse flags and a YAML file into dataclasses with TRL's parser, after checking the file."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from datetime import date
from typing import Any, get_args, get_origin, get_type_hints

# Upper limit for the size of a recipe, which is about a page of text.
MOST_BYTES = 2**16
# Upper limit for the values of a recipe. Aliases count as copies, because a short file with anchors can expand to more
# values than fit into memory.
MOST_VALUES = 2**14
# Text options that may also be given without a value.
FLAGS_OF_TEXT = ("resume_from_checkpoint", "fsdp")
# Options that take a list in YAML, or texts separated by commas.
LISTS_IN_TEXT = ("arms",)


def parse(parser, argv: list[str]):
    """Return the parsed dataclasses, in the order of the parser's.

    Raises:
        `ValueError` or `OSError`: if the file of `--config` is invalid or does not exist.
    """
    words = []
    for word in argv:
        # TRL's parser does not know `--config=FILE`.
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    if words[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")

    unknown_options = []
    if "--config" in words:
        place = words.index("--config")
        content = read_config(words[place + 1], parser.dataclass_types)
        del words[place : place + 2]
        for name, value in content.pop("env", {}).items():
            os.environ[name] = str(value)  # as TRL's parser does
        unknown_options = parser.set_defaults_with_config(**content)
    *parsed, unknown_words = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown_options or unknown_words:
        parser.error(f"unrecognized arguments: {' '.join([*unknown_options, *unknown_words])}")
    return parsed


def require_options(parser, args: Any, names: Sequence[str]) -> None:
    """End the command with a usage error if an option that has no default is missing."""
    for name in names:
        if getattr(args, name) is None:
            parser.error(f"the following arguments are required: --{name}")


def require_whole_number(name: str, value: Any, *, least: int = 1) -> None:
    """Raise `ValueError` if the value of an option is not a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"--{name} must be a whole number of at least {least}, got {value!r}.")


def is_text(value: Any) -> bool:
    """Return whether a value is a text with more than white space."""
    return isinstance(value, str) and value.strip() != ""


def read_config(path: str, kinds: list[type]) -> dict[str, Any]:
    """Return the options of a YAML file, each converted to a type of its option, because TRL's parser checks no types.

    Args:
        path (`str`): The file.
        kinds (`list[type]`): Dataclasses that declare the options.

    Raises:
        `ValueError`: if the file is not YAML, or is too large, or holds a value that its option does not take.
        `OSError`: if there is no such file.
    """
    content = _load_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a mapping of options to values, such as `seed: 0`.")
    for name in content:
        if not isinstance(name, str) or name == "self":
            raise ValueError(f"{path}: {name!r:.60} is not the name of an option.")
    environment = content.get("env", {})
    if not isinstance(environment, dict) or not all(isinstance(name, str) for name in environment):
        raise ValueError(f"{path}: env must be a mapping of names to values.")
    for kind in kinds:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in content:
                content[field.name] = convert_value(content[field.name], hints[field.name], field, path)
    return content


def _load_yaml(path: str) -> Any:
    import yaml

    with open(path, "rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path} is too large for a file of options: it has more than {MOST_BYTES} bytes.")
    try:
        # The nodes hold every anchor once, so counting them cannot exhaust the memory.
        if _count_values(yaml.compose(text, Loader=yaml.SafeLoader), {}) > MOST_VALUES:
            raise ValueError(f"with its anchors expanded it has more than {MOST_VALUES} values")
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML raises any error for a value that does not match its tag
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not YAML: {reason}") from error


def _count_values(node, known: dict[int, int]) -> int:
    """Count the values of a YAML node as if every alias were a copy; `known` maps node ids to finished counts."""
    import yaml

    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_VALUES + 1  # until it is counted, so a node that contains itself is too large
    parts = []
    if isinstance(node, yaml.MappingNode):
        parts = itertools.chain.from_iterable(node.value)
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    count = 1
    for part in parts:
        count += _count_values(part, known)
    known[id(node)] = count
    return count


def convert_value(value: Any, hint: Any, field: dataclasses.Field, path: str) -> Any:
    """Return a value from a file as text, which is parsed like a flag's, or as one of the types of its option."""
    types = {get_origin(kind) or kind for kind in (*get_args(hint), hint)}
    if isinstance(value, str) or type(value) in types or (value is None and field.default is None):
        return value
    if type(value) in (int, float) and types & {float, str}:
        return value if float in types else str(value)
    if field.name in FLAGS_OF_TEXT and isinstance(value, (bool, list)):
        return value
    if isinstance(value, float) and int in types and value.is_integer():
        return int(value)
    if isinstance(value, date) and str in types:
        return value.isoformat()
    if isinstance(value, list) and field.name in LISTS_IN_TEXT:
        return ",".join(str(part) for part in value)
    names = [kind.__name__ for kind in types & {bool, int, float, str, list, dict}]
    wanted = " or ".join(sorted(names)) or "str"
    if isinstance(value, bool):
        wanted += " (YAML reads yes, no, on and off as booleans: put them in quotes)"
    raise ValueError(f"{path}: {field.name} is {value!r:.60}, and must be {wanted}.")
