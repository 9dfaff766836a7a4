"""`trl-opd probe`: do rocks matter? Forbid a token at every step, and compare the rewards."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .parsing import parse
from .probe_table import lines

HELP = """usage: trl-opd probe --model_name_or_path M --rock_set F --dataset_name D [--reward R] [options]

Forbid a token at every step of decoding and see what it does to the rewards of a task: each rock alone, all together,
and the mass-matched controls, each and together. Only completions in which a token was chosen are decoded again, from
there on. Effects are tested and corrected for their number. An interrupted probe goes on where it was.

options:                          default
  --model_name_or_path M          required     the student: a model, or the folder of a LoRA adapter
  --rock_set F                    none         rocks and controls; required unless --candidates all
  --dataset_name D                required     problems: a name on the Hub, a folder, or a file of JSON lines
  --dataset_config C              none         its configuration
  --dataset_split S               train        its split
  --reward R                      last_number  exact_match, last_number, math_verify (with the column `answer`), or a
                                               dotted path to a function with TRL's signature
  --candidates C                  rocks        rocks, or all: every type of the baseline's completions
  --top_n N                       200          rocks to probe, from the first on
  --num_prompts N                 all          problems to use, from the first on
  --max_completion_length N       512          tokens of a completion at most
  --greedy                        false        take the likeliest token instead of sampling
  --temperature T                 1.0          of sampling; likewise --top_p 1.0, --top_k 0, --min_p none
  --batch_size N                  64           rows of a batch
  --dtype DTYPE                   float32      of the student's weights
  --load_in_4bit                  false        load it in 4 bits
  --use_cpu                       false        also where there is a GPU
  --seed S                        0            of sampling and intervals
  --effect E                      0.01         effect that is asked about: told how many problems it takes
  --output FILE                   knockout.json  the result; beside it a plot, and a copy of the rock set with roles

example:
  trl-opd probe --model_name_or_path student --rock_set rock_set.json --dataset_name problems.jsonl --greedy"""

INTERRUPTED = ": finished completions are kept, and the same command goes on from there"


@dataclass
class ProbeArguments:
    """What the probe takes."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The student."})
    rock_set: str | None = field(default=None, metadata={"help": "Rocks and controls."})
    dataset_name: str | None = field(default=None, metadata={"help": "Problems."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    reward: str = field(default="last_number", metadata={"help": "Built in, or a dotted path."})
    candidates: str = field(default="rocks", metadata={"help": "rocks or all."})
    top_n: int = field(default=200, metadata={"help": "Rocks to probe, from the first on."})
    num_prompts: int | None = field(default=None, metadata={"help": "Problems to use, from the first on."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens of a completion at most."})
    greedy: bool = field(default=False, metadata={"help": "Take the likeliest token."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_k: int = field(default=0, metadata={"help": "Of sampling."})
    min_p: float | None = field(default=None, metadata={"help": "Of sampling."})
    batch_size: int = field(default=64, metadata={"help": "Rows of a batch."})
    dtype: str = field(default="float32", metadata={"help": "Of the student's weights."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load it in 4 bits."})
    use_cpu: bool = field(default=False, metadata={"help": "Also where there is a GPU."})
    seed: int = field(default=0, metadata={"help": "Of sampling and intervals."})
    effect: float = field(default=0.01, metadata={"help": "Effect that is asked about."})
    output: str = field(default="knockout.json", metadata={"help": "The result."})


def run(argv: list[str]) -> None:
    """Probe, write the result, and print the table; raises `ValueError` or `OSError` for what a user can mend."""
    from trl import TrlParser

    parser = TrlParser((ProbeArguments,), prog="trl-opd probe")
    (args,) = parse(parser, argv)
    for name in ("model_name_or_path", "dataset_name"):
        if getattr(args, name) is None:
            parser.error(f"the following arguments are required: --{name}")
    _check(args)

    from ..artefacts.atomic import complete_file, require_writable
    from ..artefacts.run_files import KNOCKOUT_FORMAT
    from ..report.plots.canvas import save_png
    from ..report.plots.evidence import plot_forest
    from ..rocks.rock_set import RockSet
    from ..studies.effects import arms_of, evaluate, with_roles
    from ..studies.probe import VERSION, Probe

    output = Path(args.output)
    require_writable(output)
    reward, rows = load_reward(args.reward), _problems(args)
    rock_set = None if args.rock_set is None else RockSet.load(args.rock_set)
    model, tokenizer = _load(args, rock_set)
    _require_fit(rows, model, tokenizer, args)
    settings = {
        name: value for name, value in asdict(args).items() if name not in ("output", "batch_size", "reward", "effect")
    }
    if rock_set is not None:  # its file may change before an interrupted probe goes on
        settings["ids"] = [rock_set.ids.tolist(), [] if rock_set.controls is None else list(rock_set.controls.ids)]
    journal = output.with_name(f".{output.name}.journal.jsonl")
    probe = Probe(model, tokenizer, rows, reward, _sampling(args), journal=journal, settings=settings)
    arms = arms_of(*_candidates(args, rock_set, probe.baseline))
    ids = {arm: forbidden for arm, (_, forbidden) in arms.items()}
    rewards = probe.rewards_of(ids)
    result = {"format": KNOCKOUT_FORMAT, "version": VERSION, "settings": asdict(args)}
    result |= evaluate(arms, rewards, _figures(rock_set, probe), seed=args.seed)
    result |= {"exact_reuse": _sampling(args).reuses, "decoded_tokens": probe.decoded}
    result["naive_tokens"] = probe.naive_tokens(ids)
    exact = args.dtype == "float32" and not args.load_in_4bit
    result["unstable_share"] = None if exact else probe.unstable_share()
    for arm in result["arms"]:
        arm["texts"] = [tokenizer.decode([id]) for id in arm["ids"]]
    with complete_file(output) as part:
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    save_png(plot_forest(result), output.with_suffix(".png"))
    roles = output.with_name(f"{output.stem}_roles.json")
    if rock_set is not None:
        with_roles(rock_set, result).save(roles)
    probe.close()
    print("\n".join([*lines(result), f"The result is in {output}" + (f", the roles in {roles}" if rock_set else "")]))


def load_reward(name: str) -> Callable:
    """Return a built-in reward, or the function of a dotted path such as `my_package.rewards.exact`.

    Raises:
        `ValueError`: if there is no such function.
    """
    from ..studies.rewards import BUILT_IN

    if name in BUILT_IN:
        if name == "math_verify" and importlib.util.find_spec("math_verify") is None:
            raise ValueError("The reward math_verify needs a package: `pip install math-verify`.")
        return BUILT_IN[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(f"There is no reward {name!r}: take {', '.join(BUILT_IN)}, or a dotted path to a function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward {name} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"The reward {name} is no function.")
    return found


def _problems(args: ProbeArguments) -> list[dict]:
    from types import SimpleNamespace

    from ..rollouts.prompts import require_prompts
    from ..studies.rewards import BUILT_IN
    from .prompts import readable, take_prompts

    script = SimpleNamespace(
        dataset_name=args.dataset_name,
        dataset_config=args.dataset_config,
        dataset_train_split=args.dataset_split,
        dataset_test_split=None,
        dataset_streaming=False,
    )
    with readable(args.dataset_name):
        found = take_prompts(
            script, SimpleNamespace(datasets=None), SimpleNamespace(eval_strategy="no"), args.num_prompts
        )
        require_prompts(found, "dataset of problems")
        rows = list(found)
    for name in ("prompt", *(["answer"] if args.reward in BUILT_IN else [])):
        if name not in rows[0]:
            raise ValueError(f"The problems have no column {name!r} (they have {', '.join(rows[0])}).")
    return rows


def _load(args: ProbeArguments, rock_set):
    """Return the student in eval mode, and its tokenizer, which the rock set must fit."""
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig

    from .._trl import create_model_from_path
    from ..loss.lm_head import output_rows
    from ..models.quantised import make_readable
    from ..models.student import load_student

    on_gpu = torch.cuda.is_available() and not args.use_cpu
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if args.load_in_4bit else None
    kwargs = {"dtype": args.dtype, "device_map": {"": 0} if on_gpu else None, "trust_remote_code": False}
    student, name = load_student(args.model_name_or_path, kwargs, quantization)
    if isinstance(student, str):
        student = create_model_from_path(
            student, **kwargs, **({} if quantization is None else {"quantization_config": quantization})
        )
    make_readable(student)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, so no completion could end.")
    if rock_set is not None:
        rock_set.check(tokenizer, output_rows(student))
    return student.eval(), tokenizer


def _require_fit(rows: list[dict], model, tokenizer, args: ProbeArguments) -> None:
    """Raise `ValueError` for a prompt without tokens, or one whose completion would not fit into the context."""
    from ..models.shape import context_length
    from ..rollouts.prompts import require_fit, tokenize_prompts
    from ..studies.probe import tokenize

    prompts = [row["prompt"] for row in rows]
    ids = tokenize_prompts(lambda found: [tokenize(prompt, tokenizer) for prompt in found], prompts)
    require_fit(prompts, ids, args.max_completion_length, context_length(model), None)


def _sampling(args: ProbeArguments):
    from ..studies.knockout import Sampling

    names = ("greedy", "temperature", "top_p", "top_k", "min_p", "seed", "batch_size")
    return Sampling(max_new_tokens=args.max_completion_length, **{name: getattr(args, name) for name in names})


def _candidates(args: ProbeArguments, rock_set, baseline: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """Return rocks, controls and all single candidates; only what the baseline chose can have an effect."""
    chosen = {id for ids in baseline for id in ids}
    rocks = [] if rock_set is None else [rock.id for rock in rock_set.rocks[: args.top_n]]
    controls = [] if rock_set is None or rock_set.controls is None else list(rock_set.controls.ids)
    singles = sorted(chosen) if args.candidates == "all" else [*rocks, *controls]
    if not chosen & set(singles):
        raise ValueError("No candidate stands in any completion of the baseline, so forbidding one changes nothing.")
    return rocks, controls, singles


def _figures(rock_set, probe) -> dict[str, dict[int, float]]:
    """Return what is known of tokens: entropy and log count in the baseline, and the rocks' mean divergence."""
    counts = Counter(id for ids in probe.baseline for id in ids)
    rocks = [] if rock_set is None else rock_set.rocks
    return {
        "entropy": probe.entropies(),
        "log_count": {id: math.log(count) for id, count in counts.items()},
        "mean_kl": {rock.id: rock.mean_kl for rock in rocks},
    }


def _check(args: ProbeArguments) -> None:
    """Raise `ValueError` for values that cannot be, before anything is loaded."""
    if args.candidates not in ("rocks", "all"):
        raise ValueError(f"--candidates must be rocks or all, got {args.candidates!r}.")
    if args.candidates == "rocks" and args.rock_set is None:
        raise ValueError("--candidates rocks needs --rock_set; without one use --candidates all.")
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {args.dtype!r}.")
    for name, least in (("top_n", 1), ("max_completion_length", 1), ("batch_size", 1), ("top_k", 0), ("seed", 0)):
        if type(getattr(args, name)) is not int or getattr(args, name) < least:
            raise ValueError(f"--{name} must be a whole number of at least {least}, got {getattr(args, name)!r}.")
    if args.num_prompts is not None and (type(args.num_prompts) is not int or args.num_prompts < 1):
        raise ValueError(f"--num_prompts counts problems, at least 1, got {args.num_prompts!r}.")
    if type(args.temperature) not in (int, float) or not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature must be above 0 (or --greedy), got {args.temperature!r}.")
    if type(args.top_p) not in (int, float) or not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p must lie in (0, 1], got {args.top_p!r}.")
    if type(args.effect) not in (int, float) or not 0 < args.effect <= 1:
        raise ValueError(f"--effect must lie in (0, 1], got {args.effect!r}.")
    if args.min_p is not None and not 0 <= args.min_p <= 1:
        raise ValueError(f"--min_p must lie in [0, 1], got {args.min_p!r}.")
