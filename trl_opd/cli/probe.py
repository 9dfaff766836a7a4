"""`trl-opd probe`: ban a token at every decoding step, and compare the rewards with those of normal decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..artefacts.run_files import KNOCKOUT_FILE
from .options import format_options, options_of
from .parsing import parse, require_options, require_whole_number

if TYPE_CHECKING:
    from ..rocks.rock_set import RockSet
    from ..studies.knockout import Sampling
    from ..studies.probe import Probe

REQUIRED = ("model_name_or_path", "dataset_name")
INTERRUPTED = ": finished completions are kept, run the same command again to resume"


@dataclass
class ProbeArguments:
    """Arguments of `trl-opd probe`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"metavar": "M", "help": "The student: a model name or folder, or the folder of a LoRA adapter."},
    )
    rock_set: str | None = field(
        default=None,
        metadata={
            "metavar": "F",
            "help": "Rock set file with rocks and controls. Required unless you pass --candidates all.",
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"metavar": "D", "help": "Problems to solve: a dataset on the Hub, a folder, or a JSON Lines file."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"metavar": "C", "help": "Configuration name of the dataset."},
    )
    dataset_split: str = field(
        default="train",
        metadata={"metavar": "S", "help": "Split of the dataset to use."},
    )
    reward: str = field(
        default="last_number",
        metadata={
            "metavar": "R",
            "help": "Built-in reward: exact_match, last_number or math_verify (these need a column `answer`), or the "
            "dotted path of a function with TRL's reward signature.",
        },
    )
    candidates: str = field(
        default="rocks",
        metadata={
            "metavar": "C",
            "help": "Types to ban: rocks (with controls), or all types in the baseline completions.",
        },
    )
    top_n: int = field(
        default=200,
        metadata={"metavar": "N", "help": "Maximum number of rocks to probe, in the order of the rock set."},
    )
    num_prompts: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "Use only the first N problems; all of them when omitted."},
    )
    max_completion_length: int = field(
        default=512,
        metadata={"metavar": "N", "help": "Maximum number of tokens in a completion."},
    )
    greedy: bool = field(
        default=False,
        metadata={"help": "Decode greedily instead of sampling."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"metavar": "T", "help": "Sampling temperature."},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "metavar": "P",
            "help": "Nucleus sampling: keep the likeliest tokens up to this total probability; 1.0 keeps all.",
        },
    )
    top_k: int = field(
        default=0,
        metadata={"metavar": "K", "help": "Sample from only the K likeliest tokens; 0 keeps all."},
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "metavar": "P",
            "help": "Drop tokens less likely than this fraction of the likeliest token; none keeps all.",
        },
    )
    batch_size: int = field(
        default=64,
        metadata={"metavar": "N", "help": "Number of completions decoded together."},
    )
    dtype: str = field(
        default="float32",
        metadata={"metavar": "DTYPE", "help": "Data type of the student's weights: float32, bfloat16 or float16."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the student in 4-bit precision (NF4)."},
    )
    use_cpu: bool = field(
        default=False,
        metadata={"help": "Decode on the CPU even if a GPU is available."},
    )
    seed: int = field(
        default=0,
        metadata={"metavar": "S", "help": "Seed for sampling and bootstrap intervals."},
    )
    effect: float = field(
        default=0.01,
        metadata={
            "metavar": "E",
            "help": "Size of the effect you want to detect. If there are too few problems for it, the output says how "
            "many are needed.",
        },
    )
    output: str = field(
        default=KNOCKOUT_FILE,
        metadata={
            "metavar": "FILE",
            "help": "Where to write the result. A plot and a copy of the rock set with roles are written next to it.",
        },
    )


HELP = f"""\
usage: trl-opd probe --model_name_or_path M --rock_set F --dataset_name D [--reward R] [options]

Ban tokens at every decoding step and measure how the rewards of a task change: each rock alone, all rocks together,
each mass-matched control alone, and all controls together. A completion is decoded again only if it used a banned
token, and only from that token on. The effects are tested for significance and corrected for multiple comparisons. To
resume an interrupted probe, run the same command again.

{format_options("options:", options_of(ProbeArguments), required=REQUIRED)}

example:
  trl-opd probe --model_name_or_path student --rock_set rock_set.json --dataset_name problems.jsonl --greedy"""


def run(argv: list[str]) -> None:
    """Run the probe, write the result, and print its table.

    Raises:
        `ValueError` or `OSError`: if an argument or a file is invalid.
    """
    from trl import TrlParser

    parser = TrlParser((ProbeArguments,), prog="trl-opd probe")
    (args,) = parse(parser, argv)
    require_options(parser, args, REQUIRED)
    check_arguments(args)

    from ..artefacts.atomic import require_writable
    from ..rocks.rock_set import RockSet
    from ..studies.probe import run_probe
    from .probe_table import format_result
    from .rewards import load_reward

    output = Path(args.output)
    require_writable(output)
    reward = load_reward(args.reward)
    problems = load_problems(args)
    rock_set = None
    if args.rock_set is not None:
        rock_set = RockSet.load(args.rock_set)

    probe = make_probe(args, problems, reward, rock_set)
    result = run_probe(
        probe,
        rock_set,
        candidates=args.candidates,
        top_n=args.top_n,
        seed=args.seed,
        is_exact=args.dtype == "float32" and not args.load_in_4bit,
        settings=asdict(args),
    )
    written = write_result(result, rock_set, output)
    probe.close()
    print("\n".join(format_result(result)))
    print(written)


def make_probe(args: ProbeArguments, problems: list[dict], reward: Callable, rock_set: RockSet | None) -> Probe:
    """Load the student and return a probe of it, whose journal is next to the output.

    Raises:
        `ValueError` or `OSError`: if the student cannot be loaded, does not fit the rock set, or has no room for a
            prompt.
    """
    from ..studies.probe import Probe, journal_settings, require_prompts_fit

    model, tokenizer = load_student_and_tokenizer(args, rock_set)
    require_prompts_fit(problems, model, tokenizer, args.max_completion_length)
    output = Path(args.output)
    return Probe(
        model,
        tokenizer,
        problems,
        reward,
        make_sampling(args),
        journal=output.with_name(f".{output.name}.journal.jsonl"),
        settings=journal_settings(asdict(args), rock_set),
    )


def write_result(result: dict, rock_set: RockSet | None, output: Path) -> str:
    """Write the result, its plot, and the rock set with roles if there is one; return a line that names the files."""
    from ..artefacts.atomic import write_json
    from ..report.plots.canvas import save_png
    from ..report.plots.evidence import plot_forest
    from ..studies.effects import add_roles

    write_json(output, result)
    figure = plot_forest(result)
    save_png(figure, output.with_suffix(".png"))
    if rock_set is None:
        return f"The result is in {output}"
    roles = output.with_name(f"{output.stem}_roles.json")
    add_roles(rock_set, result).save(roles)
    return f"The result is in {output}, the roles in {roles}"


def check_arguments(args: ProbeArguments) -> None:
    """Raise `ValueError` if an argument is invalid, before anything is loaded."""
    if args.candidates not in ("rocks", "all"):
        raise ValueError(f"--candidates must be rocks or all, got {args.candidates!r}.")
    if args.candidates == "rocks" and args.rock_set is None:
        raise ValueError("--candidates rocks needs a rock set: pass --rock_set FILE, or use --candidates all.")
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {args.dtype!r}.")
    for name in ("top_n", "max_completion_length", "batch_size"):
        require_whole_number(name, getattr(args, name))
    for name in ("top_k", "seed"):
        require_whole_number(name, getattr(args, name), least=0)
    if args.num_prompts is not None:
        require_whole_number("num_prompts", args.num_prompts)
    if type(args.temperature) not in (int, float) or not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature must be above 0, got {args.temperature!r}: for greedy decoding pass --greedy.")
    for name in ("top_p", "effect"):
        value = getattr(args, name)
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise ValueError(f"--{name} must lie in (0, 1], got {value!r}.")
    if args.min_p is not None and not 0 <= args.min_p <= 1:
        raise ValueError(f"--min_p must lie in [0, 1], got {args.min_p!r}.")


def load_problems(args: ProbeArguments) -> list[dict]:
    """Return the problems as rows of the dataset.

    Every row has a `prompt`. For a built-in reward it also has an `answer`.

    Raises:
        `ValueError` or `OSError`: if the dataset cannot be read or lacks a column.
    """
    from ..rollouts.prompts import require_prompts
    from ..studies.rewards import BUILT_IN
    from .prompts import PromptSource, dataset_errors, take_prompts

    source = PromptSource(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    with dataset_errors(args.dataset_name):
        dataset = take_prompts(source, args.num_prompts)
        require_prompts(dataset, "dataset of problems")
        rows = list(dataset)
    columns = ["prompt"]
    if args.reward in BUILT_IN:
        columns.append("answer")
    for name in columns:
        if name not in rows[0]:
            raise ValueError(f"The problems have no column {name!r} (they have {', '.join(rows[0])}).")
    return rows


def load_student_and_tokenizer(args: ProbeArguments, rock_set: RockSet | None):
    """Return the student in eval mode, and its tokenizer.

    Raises:
        `ValueError`: if the tokenizer has no eos_token, or the rock set belongs to another tokenizer.
    """
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig

    from ..models.student import load_student_model
    from ..studies.probe import require_rock_set_fits

    device_map = None
    if torch.cuda.is_available() and not args.use_cpu:
        device_map = {"": 0}
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    kwargs = {"dtype": args.dtype, "device_map": device_map, "trust_remote_code": False}
    student, tokenizer_name = load_student_model(args.model_name_or_path, kwargs, quantization)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer_name} has no eos_token, so no completion could end: use one that has it."
        )
    if rock_set is not None:
        require_rock_set_fits(rock_set, student, tokenizer)
    return student, tokenizer


def make_sampling(args: ProbeArguments) -> Sampling:
    """Return the settings with which completions are decoded."""
    from ..studies.knockout import Sampling

    return Sampling(
        max_new_tokens=args.max_completion_length,
        greedy=args.greedy,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        batch_size=args.batch_size,
    )
