"""`trl-opd demo`: the rock experiment on tiny models that come with the package."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from .parsing import parse

HELP = """usage: trl-opd demo [--output_dir DIR] [--seed S] [--steps N] [--arms LIST] [--config FILE.yaml]

Distil a tiny teacher into a tiny student that solves word problems, find the tokens that never converge, freeze them,
and compare with freezing as many others. Needs no network and no accelerator; about three minutes on two cores.

options:            default
  --output_dir DIR  opd_demo               where students, rock_set.json, summary.json and plots go
  --seed S          0                      seed of prompts, rollouts and controls
  --steps N         240                    optimizer steps of each arm
  --arms LIST       uniform,rock,control   arms to run, of uniform, rock, control, random; uniform always runs

Finished arms are kept: an interrupted demo goes on where it was when it is started again."""

INTERRUPTED = ": finished arms are kept, and the same command goes on from there"


@dataclass
class DemoArguments:
    """What the demo takes."""

    output_dir: str = field(default="opd_demo", metadata={"help": "Where everything goes."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, rollouts and controls."})
    steps: int = field(default=240, metadata={"help": "Optimizer steps of each arm."})
    arms: str = field(default="uniform,rock,control", metadata={"help": "Arms to run, separated by commas."})


def run(argv: list[str]) -> None:
    """Run the demo and print its table; raises `ValueError` or `OSError` for what a user can mend."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL sends telemetry on construction otherwise
    from trl import TrlParser

    from ..demo.run import ARMS, run_demo
    from ..saving.student import REPORT

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
    where = f"Students, rock_set.json, summary.json and plots are in {output_dir}"
    print("\n".join([*lines(summary), *notes, where, f"Open {output_dir / REPORT} in a browser: the report"]))


def lines(summary: dict) -> list[str]:
    """Return the table of a summary, a line each."""
    rocks = summary["rocks"]
    text = [
        "",
        f"{summary['task']}: {summary['eval_problems']} held-out problems, greedy",
        f"teacher {summary['teacher']['accuracy']:.3f}, student at the start {summary['start']['accuracy']:.3f}",
        "",
        f"{'arm':<9}{'accuracy  [95 % interval]':<28}{'difference to uniform':<28}{'frozen':>8}{'seconds':>9}",
    ]
    for arm, result in summary["arms"].items():
        accuracy = f"{result['accuracy']:.3f}  {_interval(result['accuracy_ci95'])}"
        difference = summary["differences"].get(arm)
        difference = f"{difference['estimate']:+.3f}  {_interval(difference['ci95'], '+')}" if difference else ""
        share, seconds = f"{result['frozen_token_share']:.1%}", f"{result['seconds']:.0f}"
        text.append(f"{arm:<9}{accuracy:<28}{difference:<28}{share:>8}{seconds:>9}")
    text += [
        "Intervals: accuracy Wilson, difference paired bootstrap over problems; both of one training seed.",
        f"{summary['seconds']:.0f} s in all.",
        "",
    ]
    if not rocks["tokens"]:
        return [*text, "No rocks were found: no token type kept a divergence above 0."]
    return [
        *text,
        f"rocks found: {' '.join(rocks['tokens'])}",
        f"{rocks['planted_precision']:.0%} of them are planted, {rocks['planted_recall']:.0%} of the planted are found "
        "(as many are asked for as are planted, so the two are equal when the list is full);",
        f"they are {rocks['token_share']:.1%} of the tokens and {rocks['kl_share']:.1%} of the divergence, in the "
        "rollouts that chose them; no interval.",
    ]


def _interval(bounds: list[float] | None, sign: str = "") -> str:
    return "(no interval)" if bounds is None else f"[{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]"
