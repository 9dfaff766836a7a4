"""`trl-opd demo`: run the rock experiment on tiny models that come with the package."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from .options import format_options, options_of
from .parsing import parse

INTERRUPTED = ": finished arms are kept, run the same command again to resume"


@dataclass
class DemoArguments:
    """Arguments of `trl-opd demo`."""

    output_dir: str = field(
        default="opd_demo",
        metadata={"metavar": "DIR", "help": "Folder for the students, rock_set.json, summary.json and plots."},
    )
    seed: int = field(
        default=0,
        metadata={"metavar": "S", "help": "Seed for prompts, rollouts and controls."},
    )
    steps: int = field(
        default=240,
        metadata={"metavar": "N", "help": "Optimizer steps per arm."},
    )
    arms: str = field(
        default="uniform,rock,control",
        metadata={
            "metavar": "LIST",
            "help": "Arms to run, separated by commas: uniform, rock, control, random. uniform always runs.",
        },
    )


HELP = f"""usage: trl-opd demo [--output_dir DIR] [--seed S] [--steps N] [--arms LIST] [--config FILE.yaml]

Distil a tiny teacher into a tiny student that solves word problems, find the tokens that never converge, freeze them,
and compare that with freezing an equal share of other tokens. Needs no network and no accelerator, and takes about
three minutes on two cores.

{format_options("options:", options_of(DemoArguments))}

Finished arms are kept: to resume an interrupted demo, run the same command again."""


def run(argv: list[str]) -> None:
    """Run the demo and print its table; raises `ValueError` or `OSError` for a user's error."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL sends telemetry on construction otherwise
    from trl import TrlParser

    from ..artefacts.run_files import REPORT_FILE
    from ..demo.run import ARMS, run_demo

    parser = TrlParser((DemoArguments,), prog="trl-opd demo")
    (args,) = parse(parser, argv)
    arms = [arm.strip() for arm in args.arms.split(",") if arm.strip()]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"There is no arm {unknown[0]!r}: --arms takes {', '.join(ARMS)}, separated by commas.")
    if args.steps < 1:
        raise ValueError(f"--steps counts optimizer steps, at least 1, got {args.steps}.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must lie in 0..{2**32 - 1}, got {args.seed}.")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file: name a folder.")
    summary, notes = run_demo(output_dir, seed=args.seed, steps=args.steps, arms=arms)
    lines = format_summary(summary)
    lines += notes
    lines.append(f"Students, rock_set.json, summary.json and plots are in {output_dir}")
    lines.append(f"Open {output_dir / REPORT_FILE} in a browser: the report")
    print("\n".join(lines))


def format_summary(summary: dict) -> list[str]:
    """Return the table of a summary, a line each."""
    from ..statistics import interval_text

    lines = [
        "",
        f"{summary['task']}: {summary['eval_problems']} held-out problems, greedy",
        f"teacher {summary['teacher']['accuracy']:.3f}, student at the start {summary['start']['accuracy']:.3f}",
        "",
        f"{'arm':<9}{'accuracy  [95 % interval]':<28}{'difference to uniform':<28}{'frozen':>8}{'seconds':>9}",
    ]
    for arm, result in summary["arms"].items():
        accuracy = f"{result['accuracy']:.3f}  {interval_text(result['accuracy_ci95'], '.3f')}"
        difference = ""
        if arm in summary["differences"]:
            found = summary["differences"][arm]
            difference = f"{found['estimate']:+.3f}  {interval_text(found['ci95'], '+.3f')}"
        share = f"{result['frozen_token_share']:.1%}"
        seconds = f"{result['seconds']:.0f}"
        lines.append(f"{arm:<9}{accuracy:<28}{difference:<28}{share:>8}{seconds:>9}")
    lines += [
        "Intervals: accuracy Wilson, difference paired bootstrap over problems; both of one training seed.",
        f"{summary['seconds']:.0f} s in all.",
        "",
    ]

    rocks = summary["rocks"]
    if not rocks["tokens"]:
        return [*lines, "No rocks were found: no token type kept a divergence above 0."]
    return [
        *lines,
        f"rocks found: {' '.join(rocks['tokens'])}",
        f"{rocks['planted_precision']:.0%} of them are planted, {rocks['planted_recall']:.0%} of the planted are found "
        "(as many are asked for as are planted, so the two are equal when the list is full);",
        f"they are {rocks['token_share']:.1%} of the tokens and {rocks['kl_share']:.1%} of the divergence, in the "
        "rollouts that chose them; no interval.",
    ]
