"""Flags and a YAML file -> dataclasses, by TRL's parser."""

from __future__ import annotations


def parse(parser, argv: list[str]):
    """Return the parsed dataclasses; a broken YAML file is a `ValueError` that names it."""
    import yaml

    # TRL's parser knows the two words only.
    argv = [word for part in argv for word in (part.split("=", 1) if part.startswith("--config=") else [part])]
    if argv[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    try:
        parsed = parser.parse_args_and_config(argv, fail_with_unknown_args=False, return_remaining_strings=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{argv[argv.index('--config') + 1]} is not YAML: {error}") from error
    *parsed, unknown = parsed
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed
