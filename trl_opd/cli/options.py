"""The options of a command, and the table of options in its `--help`, without importing torch."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from collections.abc import Collection, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

WIDTH = 120  # columns of a help page


class Option(NamedTuple):
    """An option as the help shows it.

    Args:
        name (`str`): Name of the field, without the dashes.
        default (`Any`): Default of the field.
        help (`str`): The field's documentation.
        metavar (`str`): Placeholder for the value of the flag, such as "FILE"; empty for a flag without a value.
    """

    name: str
    default: Any
    help: str
    metavar: str = ""


def options_of(arguments: type) -> list[Option]:
    """Return the options of a command: the fields of its dataclass, which document themselves in their metadata."""
    return [
        Option(field.name, field.default, field.metadata["help"], field.metadata.get("metavar", ""))
        for field in dataclasses.fields(arguments)
    ]


def options_of_config() -> list[Option]:
    """Return the options that `OPDConfig` adds to TRL's, read from its source: importing it would load torch."""
    source = files("trl_opd").joinpath("opd_config.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    options = []
    for node in classes["OPDConfig"].body:
        # A field is `name: type = field(default=..., metadata={"help": ...})`, with literals only.
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
            options.append(Option(node.target.id, given["default"], given["metadata"]["help"]))
    return options


def format_options(title: str, options: Sequence[Option], *, required: Collection[str] = ()) -> str:
    """Return a table of options with flag, default and help, where the help is wrapped to `WIDTH` columns.

    Args:
        title (`str`): Heading of the column of flags.
        options (`Sequence[Option]`): The rows.
        required (`Collection[str]`): Names of the options that must be given.
    """
    flags = [f"  --{option.name} {option.metavar}".rstrip() for option in options]
    defaults = ["required" if option.name in required else show_default(option) for option in options]
    flag_width = max(map(len, [title, *flags])) + 2
    default_width = max(map(len, ["default", *defaults])) + 2

    lines = [f"{title:<{flag_width}}default"]
    for option, flag, default in zip(options, flags, defaults, strict=True):
        start = f"{flag:<{flag_width}}{default:<{default_width}}"
        indent = " " * len(start)
        text = textwrap.fill(option.help, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
        lines.append(text)
    return "\n".join(lines)


def show_default(option: Option) -> str:
    """Return the default of an option as it would be written on the command line."""
    if option.default is None:
        return "none"
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return str(option.default)
