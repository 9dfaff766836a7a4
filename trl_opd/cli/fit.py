"""`trl-opd fit`: predict from two model configurations, without their weights, whether a run fits on a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .options import format_options, options_of
from .parsing import is_text, parse, require_options, require_whole_number

REQUIRED = ("model_name_or_path", "teacher_model_name_or_path", "gpu")
# Data type -> bytes per weight.
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Options that must be a whole number of at least 1.
COUNTS = (
    "lora_r",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "prompt_length",
    "max_completion_length",
)


@dataclass
class FitArguments:
    """Arguments of `trl-opd fit`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"metavar": "S", "help": "The student: a folder or a model on the Hub."},
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"metavar": "T", "help": "The teacher: a folder or a model on the Hub."},
    )
    gpu: str | None = field(
        default=None,
        metadata={"metavar": "SIZE", "help": "Memory of the GPU, for example 24GB."},
    )
    reserve: float = field(
        default=0.75,
        metadata={"metavar": "GIB", "help": "GiB of GPU memory to set aside for CUDA itself and for fragmentation."},
    )
    teacher_quantization: str | None = field(
        default=None,
        metadata={"metavar": "Q", "help": "Quantisation of the teacher: 4bit or 8bit."},
    )
    teacher_placement: str = field(
        default="resident",
        metadata={
            "metavar": "P",
            "help": "resident keeps the teacher on the GPU; parked moves it off the GPU while it is not used.",
        },
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train the student with LoRA."},
    )
    lora_r: int = field(
        default=16,
        metadata={"metavar": "R", "help": "Rank of the LoRA adapters."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the base model of the LoRA student in 4-bit precision (QLoRA)."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "metavar": "DTYPE",
            "help": "Data type of the student's weights: bfloat16, float16 or float32. When omitted, bfloat16 for "
            "LoRA and float32 for full training.",
        },
    )
    per_device_train_batch_size: int = field(
        default=8,
        metadata={"metavar": "N", "help": "Rollouts per forward pass."},
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={"metavar": "N", "help": "Forward passes per optimizer step."},
    )
    prompt_length: int = field(
        default=512,
        metadata={"metavar": "N", "help": "Number of tokens in the longest prompt."},
    )
    max_completion_length: int = field(
        default=512,
        metadata={"metavar": "N", "help": "Number of tokens in the longest completion."},
    )
    json: bool = field(
        default=False,
        metadata={"help": "Print one JSON object instead of the table."},
    )


HELP = f"""\
usage: trl-opd fit --model_name_or_path S --teacher_model_name_or_path T --gpu 24GB [...] [--config FILE.yaml]

Predict how much memory a run needs on one GPU in each phase, using only the configurations of the two models, and
suggest changes if it does not fit. The estimate assumes CUDA, bfloat16 and gradient checkpointing.

{format_options("options:", options_of(FitArguments), required=REQUIRED)}"""


def run(argv: list[str]) -> None:
    """Print the memory plan.

    Raises:
        `ValueError` or `OSError`: if an argument or a file is invalid.
    """
    from trl import TrlParser

    from ..models.memory_plan import GIB, Setup, parse_gigabytes, peak, phases, suggest_savings
    from ..models.shape import read_shape

    parser = TrlParser((FitArguments,), prog="trl-opd fit")
    (args,) = parse(parser, argv)
    require_options(parser, args, REQUIRED)
    check_arguments(args)

    available = parse_gigabytes(args.gpu) - int(args.reserve * GIB)
    if available <= 0:
        raise ValueError(
            f"--reserve {args.reserve} leaves nothing of --gpu {args.gpu}: reserve less, or name a larger GPU."
        )
    dtype = args.dtype
    if dtype is None:
        dtype = "bfloat16" if args.use_peft else "float32"
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

    needed = peak(setup)
    fits = needed <= available
    changes = []
    if not fits:
        changes = [{"change": name, "peak": size} for name, size in suggest_savings(setup, available)]
    plan = {"phases": phases(setup), "peak": needed, "available": available, "fits": fits, "changes": changes}

    if args.json:
        print(json.dumps({"arguments": asdict(args)} | plan, indent=2))
    else:
        print("\n".join(format_plan(plan)))


def check_arguments(args: FitArguments) -> None:
    """Raise `ValueError` if an argument is invalid, before any configuration is read."""
    from ..opd_config import TEACHER_PLACEMENTS, TEACHER_QUANTIZATIONS

    choices = {
        "teacher_quantization": TEACHER_QUANTIZATIONS,
        "teacher_placement": TEACHER_PLACEMENTS,
        "dtype": DTYPES,
    }
    for name, known in choices.items():
        value = getattr(args, name)
        is_omitted = value is None and name != "teacher_placement"
        if not is_omitted and value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}.")
    for name in COUNTS:
        require_whole_number(name, getattr(args, name))
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        value = getattr(args, name)
        if not is_text(value):
            raise ValueError(f"--{name} takes a folder or a name on the Hub, got {value!r}.")
    if type(args.reserve) not in (int, float) or not 0 <= args.reserve < float("inf"):
        raise ValueError(f"--reserve must be a number of GiB, at least 0, got {args.reserve!r}.")
    if args.teacher_placement == "parked" and args.teacher_quantization == "8bit":
        raise ValueError(
            "--teacher_placement parked cannot move a teacher with --teacher_quantization 8bit, because part of its "
            "state stays on the GPU: use 4bit, or --teacher_placement resident."
        )
    if args.load_in_4bit and not args.use_peft:
        raise ValueError(
            "--load_in_4bit needs a LoRA student, because 4-bit weights cannot be trained: add --use_peft."
        )


def format_plan(plan: dict) -> list[str]:
    """Return the printed lines of a plan: the GiB of each part in each phase, and whether the run fits."""
    phases = plan["phases"]
    lines = [f"{'GiB on the GPU':<26}" + "".join(f"{phase:>12}" for phase in phases)]
    names = {}  # keeps the order of the first mention
    for parts in phases.values():
        names |= parts
    for name in names:
        cells = "".join(_format_cell(parts.get(name)) for parts in phases.values())
        lines.append(f"{name:<26}{cells}")
    totals = "".join(_format_cell(sum(parts.values())) for parts in phases.values())
    lines.append(f"{'total':<26}{totals}")

    size = _format_gib(plan["peak"])
    available = _format_gib(plan["available"])
    if plan["fits"]:
        return [*lines, "", f"It fits: at most {size} of {available} GiB. Predicted, not measured."]
    lines += ["", f"It does not fit: it needs {size} GiB, and {available} GiB are available. Predicted, not measured."]

    changes = plan["changes"]
    sufficient = [change for change in changes if change["peak"] <= plan["available"]]
    if sufficient:
        lines.append("Changes that make it fit, smallest change first:")
        lines += [f"  {_format_gib(change['peak'])} GiB  {change['change']}" for change in sufficient]
        return lines
    least = ""
    if changes:
        last = changes[-1]
        least = f" Even {last['change']} needs {_format_gib(last['peak'])} GiB."
    lines.append(f"None of the known changes is enough.{least} Use smaller models.")
    return lines


def _format_cell(size: int | None) -> str:
    return f"{'':>12}" if size is None else f"{_format_gib(size):>12}"


def _format_gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
