"""`trl-opd fit`: will a distillation fit on a card? Answered from two configurations, before anything is downloaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .parsing import parse

HELP = """usage: trl-opd fit --model_name_or_path S --teacher_model_name_or_path T --gpu 24GB [...] [--config FILE.yaml]

Predict the memory of a run on one card, phase by phase, from the configurations of both models alone, and say what to
change when it does not fit. Estimates for CUDA, bfloat16 and gradient checkpointing.

options:                             default
  --model_name_or_path S             required  student: a folder, or a name on the Hub
  --teacher_model_name_or_path T     required  teacher
  --gpu SIZE                         required  memory of the card, such as 24GB
  --reserve GIB                      0.75      what CUDA and fragmentation take of it
  --teacher_quantization Q           none      4bit or 8bit
  --teacher_placement P              resident  parked: the teacher leaves the card while nobody needs it
  --use_peft                         false     a LoRA student
  --lora_r R                         16        rank of its adapters
  --load_in_4bit                     false     a 4-bit base for it (QLoRA)
  --dtype DTYPE                      bfloat16  of the student's weights; float32 when it is trained in full
  --per_device_train_batch_size N    8         rollouts of a forward
  --gradient_accumulation_steps N    1         forwards of an optimizer step
  --prompt_length N                  512       tokens of the longest prompt
  --max_completion_length N          512       tokens of the longest completion
  --json                             false     print one JSON object"""

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
COUNTS = (
    "lora_r",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "prompt_length",
    "max_completion_length",
)


@dataclass
class FitArguments:
    """What the planner takes."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher."})
    gpu: str | None = field(default=None, metadata={"help": "Memory of the card, such as 24GB."})
    reserve: float = field(default=0.75, metadata={"help": "GiB that CUDA and fragmentation take."})
    teacher_quantization: str | None = field(default=None, metadata={"help": "4bit or 8bit."})
    teacher_placement: str = field(default="resident", metadata={"help": "resident or parked."})
    use_peft: bool = field(default=False, metadata={"help": "A LoRA student."})
    lora_r: int = field(default=16, metadata={"help": "Rank of its adapters."})
    load_in_4bit: bool = field(default=False, metadata={"help": "A 4-bit base for it."})
    dtype: str | None = field(default=None, metadata={"help": "Of the student's weights."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rollouts of a forward."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forwards of an optimizer step."})
    prompt_length: int = field(default=512, metadata={"help": "Tokens of the longest prompt."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens of the longest completion."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object."})


def run(argv: list[str]) -> None:
    """Print the plan; raises `ValueError` or `OSError` for what a user can mend."""
    from trl import TrlParser

    from ..models.memory_plan import GIB, Setup, cheaper, parse_gigabytes, peak, phases
    from ..models.shape import read_shape

    parser = TrlParser((FitArguments,), prog="trl-opd fit")
    (args,) = parse(parser, argv)
    for name in ("model_name_or_path", "teacher_model_name_or_path", "gpu"):
        if getattr(args, name) is None:
            parser.error(f"the following arguments are required: --{name}")
    _check(args)
    available = parse_gigabytes(args.gpu) - int(args.reserve * GIB)
    if available <= 0:
        raise ValueError(f"--reserve {args.reserve} leaves nothing of --gpu {args.gpu}.")
    dtype = args.dtype or ("bfloat16" if args.use_peft else "float32")
    setup = Setup(
        student=read_shape(args.model_name_or_path),
        teacher=read_shape(args.teacher_model_name_or_path),
        teacher_quantization=args.teacher_quantization,
        teacher_placement=args.teacher_placement,
        lora_r=args.lora_r if args.use_peft else None,
        load_in_4bit=args.load_in_4bit,
        bytes_per_weight=DTYPES[dtype],
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        prompt_length=args.prompt_length,
        completion_length=args.max_completion_length,
    )
    plan = {
        "phases": phases(setup),
        "peak": peak(setup),
        "available": available,
        "fits": peak(setup) <= available,
        "changes": [],
    }
    if not plan["fits"]:
        plan["changes"] = [{"change": name, "peak": size} for name, size in cheaper(setup, available)]
    if args.json:
        print(json.dumps({"arguments": asdict(args), **plan}, indent=2))
    else:
        print("\n".join(lines(plan)))


def _check(args: FitArguments) -> None:
    """Raise `ValueError` for values that no run has, before any configuration is read."""
    from ..opd_config import TEACHER_PLACEMENTS, TEACHER_QUANTIZATIONS

    for name, choices in (
        ("teacher_quantization", (None, *TEACHER_QUANTIZATIONS)),
        ("teacher_placement", TEACHER_PLACEMENTS),
        ("dtype", (None, *DTYPES)),
    ):
        if getattr(args, name) not in choices:
            known = ", ".join(choice for choice in choices if choice)
            raise ValueError(f"--{name} must be one of {known}, got {getattr(args, name)!r}.")
    for name in COUNTS:
        if type(getattr(args, name)) is not int or getattr(args, name) < 1:
            raise ValueError(f"--{name} must be a whole number above 0, got {getattr(args, name)!r}.")
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        if not isinstance(getattr(args, name), str) or not getattr(args, name).strip():
            raise ValueError(f"--{name} takes a folder or a name on the Hub, got {getattr(args, name)!r}.")
    if type(args.reserve) not in (int, float) or not 0 <= args.reserve < float("inf"):
        raise ValueError(f"--reserve counts GiB, a number of at least 0, got {args.reserve!r}.")
    if args.teacher_placement == "parked" and args.teacher_quantization == "8bit":
        raise ValueError(
            "--teacher_placement parked cannot move a teacher in 8 bits, whose state stays on the GPU: use 4bit, or "
            "leave it resident."
        )
    if args.load_in_4bit and not args.use_peft:
        raise ValueError("--load_in_4bit is for a LoRA student, since 4-bit weights cannot be trained: add --use_peft.")


def lines(plan: dict) -> list[str]:
    """Return the table of a plan, a line each."""
    columns = plan["phases"]
    names = list(dict.fromkeys(name for parts in columns.values() for name in parts))
    text = [f"{'GiB on the card':<26}" + "".join(f"{phase:>12}" for phase in columns)]
    for name in names:
        text.append(f"{name:<26}" + "".join(_cell(parts.get(name)) for parts in columns.values()))
    text.append(f"{'together':<26}" + "".join(_cell(sum(parts.values())) for parts in columns.values()))
    size, available = _gib(plan["peak"]), _gib(plan["available"])
    if plan["fits"]:
        return [*text, "", f"It fits: at most {size} of {available} GiB. Predicted, not measured."]
    text += ["", f"It does not fit: {size} GiB, and there are {available}. Predicted, not measured."]
    fitting = [change for change in plan["changes"] if change["peak"] <= plan["available"]]
    if not fitting:
        found = plan["changes"][-1:]
        least = f" Even {found[0]['change']} needs {_gib(found[0]['peak'])} GiB." if found else ""
        return [*text, f"No change that is known here is enough.{least} Take smaller models."]
    return [*text, "What would, the least change first:", *(f"  {_gib(c['peak'])} GiB  {c['change']}" for c in fitting)]


def _cell(size: int | None) -> str:
    return f"{'':>12}" if size is None else f"{_gib(size):>12}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
