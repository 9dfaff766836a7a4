"""`trl-opd report`: one HTML file that people look at, from whatever a run wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .options import format_options, options_of
from .parsing import parse


@dataclass
class ReportArguments:
    """Arguments of `trl-opd report` beside the folder."""

    output: str | None = field(
        default=None,
        metadata={"metavar": "FILE.html", "help": "The page; DIR/report.html when omitted."},
    )


HELP = f"""usage: trl-opd report DIR [--output FILE.html] [--config FILE.yaml]

Make one HTML file of what is in a folder: what was run, what changed over its steps, the rocks among all token types,
completions with every token tinted by its divergence, and the evidence. A part without data is left out. The file
needs nothing beside it and requests nothing from anywhere. DIR is the output folder of `trl-opd train`, `demo` or
`collect`; rock_set.json, knockout.json and gradients.parquet are taken from there, too.

{format_options("options of report:", options_of(ReportArguments))}

example:
  trl-opd report student"""


def run(argv: list[str]) -> None:
    """Write the page and print its path; raises `ValueError` or `OSError` for a user's error."""
    from trl import TrlParser

    parser = TrlParser((ReportArguments,), prog="trl-opd report")
    parser.add_argument("folder", help="output folder of a run")
    args, given = parse(parser, argv)
    if args.output is not None and (not isinstance(args.output, str) or not args.output.strip()):
        raise ValueError(f"--output takes a path, got {args.output!r}.")

    from ..artefacts.run_files import REPORT_FILE
    from ..report.build import write_report

    output = Path(given.folder) / REPORT_FILE if args.output is None else Path(args.output)
    parts = write_report(given.folder, output)
    print(f"{', '.join(parts)}: the report is in {output} ({output.stat().st_size / 2**20:.1f} MB)")
