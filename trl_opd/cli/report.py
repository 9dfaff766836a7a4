"""`trl-opd report`: write a single-file HTML report of what a run wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .options import format_options, options_of
from .parsing import is_text, parse


@dataclass
class ReportArguments:
    """Arguments of `trl-opd report` in addition to the folder."""

    output: str | None = field(
        default=None,
        metadata={"metavar": "FILE.html", "help": "Where to write the report; DIR/report.html when omitted."},
    )


HELP = f"""usage: trl-opd report DIR [--output FILE.html] [--config FILE.yaml]

Write one HTML file about the contents of a folder: the settings of the run, its metrics over time, the rocks among all
token types, completions with every token shaded by its divergence, and the evidence. Parts without data are left out.
The file is self-contained and makes no network requests. DIR is the output folder of `trl-opd train`, `demo` or
`collect`. rock_set.json, knockout.json and gradients.parquet are included if DIR holds them.

{format_options("options of report:", options_of(ReportArguments))}

example:
  trl-opd report student"""


def run(argv: list[str]) -> None:
    """Write the page and print its path; raises `ValueError` or `OSError` for a user's error."""
    from trl import TrlParser

    parser = TrlParser((ReportArguments,), prog="trl-opd report")
    parser.add_argument("folder", help="output folder of a run")
    args, given = parse(parser, argv)
    if args.output is not None and not is_text(args.output):
        raise ValueError(f"--output takes a path, got {args.output!r}.")

    from ..artefacts.run_files import REPORT_FILE
    from ..report.build import write_report

    output = Path(given.folder, REPORT_FILE)
    if args.output is not None:
        output = Path(args.output)
    parts = write_report(given.folder, output)
    size = output.stat().st_size / 2**20
    print(f"{', '.join(parts)}: the report is in {output} ({size:.1f} MB)")
