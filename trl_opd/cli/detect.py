"""`trl-opd detect`: occurrences -> rocks, with controls and the figures of prompts that did not choose them."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from .parsing import parse

HELP = """usage: trl-opd detect OCCURRENCES.parquet [--output rock_set.json] [options] [--config FILE.yaml]

Find the token types whose divergence stays high in recurring surroundings, and controls that occur as often. One half
of the prompts selects, the other half judges. docs/detection.md explains every stage.

options:                  default
  --output FILE           rock_set.json  the rock set; with --top_k auto a plot of the sweep stands beside it
  --top_k K               100            largest number of rocks, or auto: the largest stable one
  --score S               context        context (R_ctx) or aggregate (R, the divergence of a type alone)
  --tokenizer PATH        none           names the tokens; else the occurrences' own, where it is on this machine
  --tau_pre X             q0.7           least divergence under the reference student: nats, or qP for quantile P
  --tau_post X            q0.8           the same under the student
  --window W              2              tokens on each side that are compared
  --gamma G               0.5            least similarity of two surroundings, above 0, at most 1
  --eta E                 0.05           least share of similar occurrences of the type, from 0 to 1
  --max_occurrences N     8192           occurrences of a type that are compared; of more, a sample
  --joint FILE            none           occurrences of a second student: the smaller of the two scores counts
  --seed S                0              of controls, samples and intervals

example:
  trl-opd detect rollouts/occurrences.parquet --top_k auto --tokenizer student"""


# Wider surroundings hardly differ: the farthest of these tokens counts 1 / 64 of the nearest.
MOST_WINDOW = 64


@dataclass
class DetectArguments:
    """What detection takes."""

    output: str = field(default="rock_set.json", metadata={"help": "The rock set."})
    top_k: str | None = field(default=None, metadata={"help": "Largest number of rocks, or auto."})
    score: str = field(default="context", metadata={"help": "context or aggregate."})
    tokenizer: str | None = field(default=None, metadata={"help": "Names the tokens."})
    tau_pre: str = field(default="q0.7", metadata={"help": "Least divergence under the reference student."})
    tau_post: str = field(default="q0.8", metadata={"help": "Least divergence under the student."})
    window: int = field(default=2, metadata={"help": "Tokens on each side that are compared."})
    gamma: float = field(default=0.5, metadata={"help": "Least similarity of two surroundings."})
    eta: float = field(default=0.05, metadata={"help": "Least share of similar occurrences."})
    max_occurrences: int = field(default=8192, metadata={"help": "Occurrences of a type that are compared."})
    joint: str | None = field(default=None, metadata={"help": "Occurrences of a second student."})
    seed: int = field(default=0, metadata={"help": "Of controls, samples and intervals."})


def run(argv: list[str]) -> None:
    """Detect, write the rock set, and print the table; raises `ValueError` or `OSError` for what a user can mend."""
    from trl import TrlParser

    parser = TrlParser((DetectArguments,), prog="trl-opd detect")
    parser.add_argument("occurrences", help="occurrences.parquet")
    args, given = parse(parser, argv)
    top_k = _top_k(args.top_k)
    _check(args)

    from ..artefacts.atomic import require_writable
    from ..artefacts.occurrences import Occurrences
    from ..rocks.from_occurrences import select_rocks
    from ..rocks.recurrence import ContextSettings

    output = Path(args.output)
    require_writable(output)
    file = Occurrences(given.occurrences)  # a file that is none is told before a tokenizer is looked for
    tokenizer, note = find_tokenizer(args.tokenizer, file.metadata.get("tokenizer"))
    settings = ContextSettings(
        tau_pre=_threshold(args.tau_pre, "tau_pre"),
        tau_post=_threshold(args.tau_post, "tau_post"),
        window=args.window,
        gamma=args.gamma,
        eta=args.eta,
        max_occurrences=args.max_occurrences,
        seed=args.seed,
    )
    found = select_rocks(
        given.occurrences, joint=args.joint, score=args.score, top_k=top_k, settings=settings, tokenizer=tokenizer
    )
    found.rock_set.save(output)
    if found.sweep is not None:
        from ..report.plots.canvas import save_png
        from ..report.plots.rocks import plot_sweep

        save_png(plot_sweep(found.sweep), sweep_path(output))
    print("\n".join([*lines(found), *note, *found.notes, f"The rock set is in {output}"]))


def sweep_path(output: Path) -> Path:
    """Return where the plot of the sweep goes."""
    return output.with_name(f"{output.stem}_sweep.png")


def find_tokenizer(path: str | None, section) -> tuple[object | None, list[str]]:
    """Return the tokenizer at a path, else the one that a file names where it is on this machine, and a note.

    Raises:
        `ValueError` or `OSError`: if there is none at the path.
    """
    name = path or (section.get("name") if isinstance(section, dict) else None)
    unnamed = ["The tokens have no names: --tokenizer PATH gives them theirs, and their families."]
    if not isinstance(name, str) or not name.strip():
        if path is not None:
            raise ValueError(f"--tokenizer takes a folder or a name on the Hub, got {path!r}.")
        return None, unnamed
    if path is not None and path.startswith((".", "/", "~")) and not Path(path).exists():
        raise FileNotFoundError(f"There is no tokenizer in {path}: no such folder.")
    if path is None:
        from ..artefacts.fingerprint import load_tokenizer

        found = load_tokenizer(name, section.get("fingerprint"))
        return found, unnamed if found is None else []
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False), []
    except Exception as error:  # of a broken file a tokenizer raises whatever it meets
        raise ValueError(f"--tokenizer {path} holds no tokenizer: {error}") from error


def lines(found) -> list[str]:
    """Return the tables of a selection, a line each: sweep, rocks, stages, shares and controls."""
    rock_set = found.rock_set
    text = [] if found.sweep is None else [*_sweep_lines(found.sweep), ""]
    shown = [_shown(rock) for rock in rock_set.rocks]
    width = max(8, *map(_width, shown))
    has_family = any(rock.family for rock in rock_set.rocks)
    head = f"{'rank':>4}  {'token':<{width}}  {'id':>7}  " + (f"{'family':<13}  " if has_family else "")
    text.append(head + f"{'count':>8}  {'mean KL':>8}  {'before':>8}  {'CCR':>5}  {'score':>10}")
    for rank, (rock, token) in enumerate(zip(rock_set.rocks, shown, strict=True), 1):
        row = f"{rank:>4}  {token}{' ' * (width - _width(token))}  {rock.id:>7}  "
        row += f"{rock.family or '':<13}  " if has_family else ""
        row += f"{rock.count:>8}  {rock.mean_kl:>8.4f}  {_number(rock.mean_kl_pre, '.4f'):>8}  "
        text.append(row + f"{_number(rock.ccr, '.2f'):>5}  {rock.score:>10.4g}")
    text += ["Nats per token, in the half of the prompts that selected; no interval.", ""]
    text += [f"{count:>8}  {what}" for what, count in found.stages]
    return [*text, "", *_share_lines(rock_set), _control_line(rock_set.controls)]


def _sweep_lines(sweep) -> list[str]:
    text = [f"{'K':>5}  {'coverage':>8}" + "".join(f"  overlap, n = {size:<4}" for size in sweep.stability)]
    for place, cutoff in enumerate(sweep.cutoffs):
        overlaps = "".join(f"  {values[place]:>16.2f}" for values in sweep.stability.values())
        text.append(f"{cutoff:>5}  {sweep.coverage[place]:>8.1%}{overlaps}")
    return [
        *text,
        f"K = {sweep.top_k}: up to there lists of {max(sweep.stability)} rollouts and of as many others overlap by 0.7 "
        "(Jaccard, mean of ten draws, no interval); coverage is the share of the divergence.",
    ]


def _share_lines(rock_set) -> list[str]:
    held = rock_set.heldout
    if held is None:
        return ["There is no other half: no share is told from prompts that did not choose the rocks."]
    return [
        f"On the other {held['prompts']} prompts they are {_share(held, 'token_share')} of the tokens and "
        f"{_share(held, 'kl_share')} of the divergence (bootstrap over prompts, 95 %)."
    ]


def _share(held: dict, name: str) -> str:
    interval = held[f"{name}_ci95"]
    return f"{held[name]:.1%} " + ("(no interval)" if interval is None else f"[{interval[0]:.1%}, {interval[1]:.1%}]")


def _control_line(controls) -> str:
    matched = "matched" if controls.matched else "not matched"
    return f"Controls: {len(controls.ids)} other types with {controls.mass_ratio:.2f} of the rocks' tokens ({matched})."


def _shown(rock) -> str:
    """Return a token as a table shows it: in quotes, with everything escaped that could be taken for something else."""
    return "?" if rock.text is None else ascii(rock.text) if not rock.text.isprintable() else repr(rock.text)


def _width(text: str) -> int:
    """Return the columns that a text takes on a terminal."""
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _top_k(given) -> int | str | None:
    if given is None or given == "auto":
        return given
    try:
        count = int(str(given))
    except ValueError:
        count = 0
    if count < 1 or isinstance(given, (bool, float)):
        raise ValueError(f"--top_k takes a whole number above 0, or auto, got {given!r}.")
    return count


def _threshold(given, name: str) -> float | str:
    quantile = isinstance(given, str) and given.startswith("q")
    try:
        value = float(given[1:] if quantile else given)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(given, bool) or not 0 <= value < math.inf or (quantile and value > 1):
        raise ValueError(f"--{name} takes nats, at least 0, or a quantile such as q0.8, got {given!r}.")
    return given if quantile else value


def _check(args: DetectArguments) -> None:
    """Raise `ValueError` for values that cannot be, before any file is read."""
    if args.score not in ("context", "aggregate"):
        raise ValueError(f"--score must be context or aggregate, got {args.score!r}.")
    for name, least, most in (("window", 1, MOST_WINDOW), ("max_occurrences", 2, 2**31), ("seed", 0, 2**63 - 1)):
        value = getattr(args, name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"--{name} must be a whole number of at least {least}, at most {most}, got {value!r}.")
    for name in ("gamma", "eta"):
        value = getattr(args, name)
        if type(value) not in (int, float) or not 0 <= value <= 1 or (name == "gamma" and value == 0):
            raise ValueError(
                f"--{name} must lie between 0 and 1{' and be above 0' * (name == 'gamma')}, got {value!r}."
            )
    for name in ("output", "tokenizer", "joint"):
        value = getattr(args, name)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"--{name} takes a path, got {value!r}.")
