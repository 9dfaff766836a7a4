"""`trl-opd detect`: find rocks and matched controls in stored rollouts, and evaluate the rocks on held-out prompts."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..artefacts.run_files import ROCK_SET_FILE
from .options import format_options, options_of
from .parsing import is_text, parse

if TYPE_CHECKING:
    from ..rocks.cutoff import Sweep
    from ..rocks.from_occurrences import Detection
    from ..rocks.rock_set import Controls, Rock

# A wider window hardly changes a similarity: a token weighs 1 / distance, so the farthest one weighs 1 / 64.
MOST_WINDOW = 64
UNNAMED = "The tokens have no names, because no tokenizer was found: pass --tokenizer PATH to add names and families."


@dataclass
class DetectArguments:
    """Arguments of `trl-opd detect` in addition to the file of occurrences."""

    output: str = field(
        default=ROCK_SET_FILE,
        metadata={
            "metavar": "FILE",
            "help": "Where to write the rock set. --top_k auto also writes a plot of the sweep next to it.",
        },
    )
    top_k: str | None = field(
        default=None,
        metadata={
            "metavar": "K",
            "help": "Maximum number of rocks (100 when omitted), or auto for the largest number at which the list is "
            "stable.",
        },
    )
    score: str = field(
        default="context",
        metadata={
            "metavar": "S",
            "help": "How to rank types: context (R_ctx) or aggregate (R, summed divergence, no context).",
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "metavar": "PATH",
            "help": "Tokenizer that names the tokens. When omitted, the one that the occurrences file names is "
            "used if it is on this machine.",
        },
    )
    tau_pre: str = field(
        default="q0.7",
        metadata={
            "metavar": "X",
            "help": "Minimum divergence under the reference student, in nats, or qP for the quantile P.",
        },
    )
    tau_post: str = field(
        default="q0.8",
        metadata={"metavar": "X", "help": "Minimum divergence under the student, in nats, or qP for the quantile P."},
    )
    window: int = field(
        default=2,
        metadata={"metavar": "W", "help": "Number of tokens compared on each side of an occurrence."},
    )
    gamma: float = field(
        default=0.5,
        metadata={"metavar": "G", "help": "Minimum similarity for two contexts to match, above 0 and at most 1."},
    )
    eta: float = field(
        default=0.05,
        metadata={
            "metavar": "E",
            "help": "Minimum share of a type's occurrences with a matching context, from 0 to 1.",
        },
    )
    max_occurrences: int = field(
        default=8192,
        metadata={
            "metavar": "N",
            "help": "Maximum number of occurrences compared per type; types with more are sampled.",
        },
    )
    joint: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Occurrences of a second student. Each type then gets the smaller of its two scores.",
        },
    )
    seed: int = field(
        default=0,
        metadata={"metavar": "S", "help": "Seed for the choice of controls, sampling and bootstrap intervals."},
    )


HELP = f"""usage: trl-opd detect OCCURRENCES.parquet [--output rock_set.json] [options] [--config FILE.yaml]

Find the token types whose divergence stays high in recurring contexts, and control types that occur equally often.
Half of the prompts select the rocks; the other half evaluate them. docs/detection.md explains every stage.

{format_options("options:", options_of(DetectArguments))}

example:
  trl-opd detect rollouts/occurrences.parquet --top_k auto --tokenizer student"""


def run(argv: list[str]) -> None:
    """Detect rocks, write the rock set, and print the tables.

    Raises:
        `ValueError` or `OSError`: if an argument or a file is invalid.
    """
    from trl import TrlParser

    parser = TrlParser((DetectArguments,), prog="trl-opd detect")
    parser.add_argument("occurrences", help="the file occurrences.parquet of trl-opd collect")
    args, given = parse(parser, argv)
    top_k = read_top_k(args.top_k)
    check_arguments(args)

    from ..artefacts.atomic import require_writable
    from ..artefacts.occurrences import Occurrences
    from ..rocks.from_occurrences import detect_from_occurrences
    from ..rocks.recurrence import ContextSettings
    from .tokenizer import find_tokenizer

    output = Path(args.output)
    require_writable(output)
    # The file comes first, so that a broken one is reported before a tokenizer is loaded.
    file = Occurrences(given.occurrences)
    tokenizer = find_tokenizer(args.tokenizer, file.metadata.get("tokenizer"))
    settings = ContextSettings(
        tau_pre=read_threshold(args.tau_pre, "tau_pre"),
        tau_post=read_threshold(args.tau_post, "tau_post"),
        window=args.window,
        gamma=args.gamma,
        eta=args.eta,
        max_occurrences=args.max_occurrences,
        seed=args.seed,
    )

    detection = detect_from_occurrences(
        given.occurrences, joint=args.joint, score=args.score, top_k=top_k, settings=settings, tokenizer=tokenizer
    )
    detection.rock_set.save(output)
    if detection.sweep is not None:
        from ..report.plots.canvas import save_png
        from ..report.plots.rocks import plot_sweep

        save_png(plot_sweep(detection.sweep), output.with_name(f"{output.stem}_sweep.png"))

    lines = format_detection(detection)
    if tokenizer is None:
        lines.append(UNNAMED)
    lines += detection.notes
    lines.append(f"The rock set is in {output}")
    print("\n".join(lines))


def read_top_k(given: str | int | None) -> int | str | None:
    """Return the value of `--top_k`: a whole number above 0, "auto", or `None` when omitted.

    Raises:
        `ValueError`: for any other value.
    """
    if given is None or given == "auto":
        return given
    try:
        count = int(str(given))
    except ValueError:
        count = 0
    if count < 1 or isinstance(given, (bool, float)):
        raise ValueError(f"--top_k takes a whole number above 0, or auto, got {given!r}.")
    return count


def read_threshold(given: str | float, name: str) -> float | str:
    """Return a threshold: a number of nats, or a quantile as text such as "q0.8".

    Raises:
        `ValueError`: if the text is neither.
    """
    quantile = isinstance(given, str) and given.startswith("q")
    try:
        value = float(given[1:] if quantile else given)
    except (TypeError, ValueError):
        value = math.nan
    out_of_range = not 0 <= value < math.inf or (quantile and value > 1)
    if isinstance(given, bool) or out_of_range:
        raise ValueError(f"--{name} takes nats, at least 0, or a quantile such as q0.8, got {given!r}.")
    return given if quantile else value


def check_arguments(args: DetectArguments) -> None:
    """Raise `ValueError` for invalid values, before any file is read."""
    if args.score not in ("context", "aggregate"):
        raise ValueError(f"--score must be context or aggregate, got {args.score!r}.")
    for name, least, most in (("window", 1, MOST_WINDOW), ("max_occurrences", 2, 2**31), ("seed", 0, 2**63 - 1)):
        value = getattr(args, name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"--{name} must be a whole number from {least} to {most}, got {value!r}.")
    for name in ("gamma", "eta"):
        value = getattr(args, name)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ValueError(f"--{name} must lie between 0 and 1, got {value!r}.")
    if args.gamma == 0:
        raise ValueError("--gamma must be above 0, got 0: with 0 every two contexts would match.")
    for name in ("output", "tokenizer", "joint"):
        value = getattr(args, name)
        if value is not None and not is_text(value):
            raise ValueError(f"--{name} takes a path, got {value!r}.")


def format_detection(detection: Detection) -> list[str]:
    """Return the printed lines of a detection: sweep, rocks, stages, held-out shares and controls."""
    rock_set = detection.rock_set
    lines = []
    if detection.sweep is not None:
        lines += _format_sweep(detection.sweep)
        lines.append("")

    lines += _format_rocks(rock_set.rocks)
    lines += ["KL in nats per token, measured on the half of the prompts that selected the rocks; no interval.", ""]
    lines += [f"{count:>8}  {stage}" for stage, count in detection.stages]
    lines += ["", _format_shares(rock_set.heldout), _format_controls(rock_set.controls)]
    return lines


def _format_rocks(rocks: Sequence[Rock]) -> list[str]:
    tokens = [show_token(rock.text) for rock in rocks]
    widths = [_display_width(token) for token in tokens]
    width = max(widths, default=0)
    width = max(width, 8)

    has_family = any(rock.family for rock in rocks)
    family = f"{'family':<13}  " if has_family else ""
    lines = [
        f"{'rank':>4}  {'token':<{width}}  {'id':>7}  {family}{'count':>8}  {'mean KL':>8}  {'before':>8}  {'CCR':>5}  "
        f"{'score':>10}"
    ]
    for place, rock in enumerate(rocks):
        # Format widths count characters, but some characters take two columns or none.
        padding = " " * (width - widths[place])
        family = f"{rock.family or '':<13}  " if has_family else ""
        before = _format_number(rock.mean_kl_pre, ".4f")
        ccr = _format_number(rock.ccr, ".2f")
        lines.append(
            f"{place + 1:>4}  {tokens[place]}{padding}  {rock.id:>7}  {family}{rock.count:>8}  {rock.mean_kl:>8.4f}  "
            f"{before:>8}  {ccr:>5}  {rock.score:>10.4g}"
        )
    return lines


def _format_sweep(sweep: Sweep) -> list[str]:
    heads = "".join(f"  overlap, n = {size:<4}" for size in sweep.stability)
    lines = [f"{'K':>5}  {'coverage':>8}{heads}"]
    for place, cutoff in enumerate(sweep.cutoffs):
        overlaps = "".join(f"  {values[place]:>16.2f}" for values in sweep.stability.values())
        lines.append(f"{cutoff:>5}  {sweep.coverage[place]:>8.1%}{overlaps}")
    lines.append(
        f"K = {sweep.top_k}: up to this K, the lists of two disjoint samples of {max(sweep.stability)} rollouts "
        "overlap by at least 0.7 (Jaccard, mean of ten draws, no interval); coverage is the share of the divergence."
    )
    return lines


def _format_shares(heldout: dict | None) -> str:
    if heldout is None:
        return "There is no held-out half, so no shares are reported for prompts that did not select the rocks."
    token_share = _format_share(heldout["token_share"], heldout["token_share_ci95"])
    kl_share = _format_share(heldout["kl_share"], heldout["kl_share_ci95"])
    return (
        f"On the {heldout['prompts']} held-out prompts the rocks are {token_share} of the tokens and {kl_share} of the "
        "divergence (95 % intervals, bootstrap over prompts)."
    )


def _format_share(share: float, interval: list[float] | None) -> str:
    from ..statistics import interval_text

    return f"{share:.1%} {interval_text(interval, '.1%')}"


def _format_controls(controls: Controls) -> str:
    matched = "matched" if controls.matched else "not matched"
    return f"Controls: {len(controls.ids)} other types with {controls.mass_ratio:.2f} of the rocks' tokens ({matched})."


def show_token(text: str | None) -> str:
    """Return the text of a token in quotes, or "?" if its text is not known.

    Characters outside ASCII are escaped if any character is unprintable.
    """
    if text is None:
        return "?"
    if text.isprintable():
        return repr(text)
    return ascii(text)


def _display_width(text: str) -> int:
    """Return the width of a text on a terminal, in columns."""
    width = 0
    for character in text:
        if not unicodedata.combining(character):
            width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return width


def _format_number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
