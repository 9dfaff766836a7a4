"""`trl-opd gradients`: do rocks still teach? Gradients by token type, on rollouts that were collected."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .parsing import parse

HELP = """usage: trl-opd gradients OCCURRENCES.parquet --rock_set F --model_name_or_path M [...]

Norm and direction of the gradient of each token type with respect to the student's logits, on stored rollouts: of the
rocks, of rare types of high divergence, and of a random rest. Averaging alone makes the mean gradient of frequent types
small, so the unbiased norm and groups of equally many positions stand beside. Takes the options of `trl-opd train` for
models, and those below; prompts.parquet is read from beside the occurrences.

options of gradients:             default
  --rock_set F                    required            the rocks
  --early FILE                    none                occurrences of an earlier student: how did the divergence change?
  --matched N                     3                   positions of each type in the groups of equal number
  --rare N                        200                 rare types of high divergence at most
  --output FILE                   gradients.parquet   a row for each type; beside it a plot

  --per_device_eval_batch_size N  rollouts of a forward (8); --use_cpu --bf16 false without a GPU

example:
  trl-opd gradients rollouts/occurrences.parquet --rock_set rock_set.json --model_name_or_path student \\
      --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct --teacher_quantization 4bit"""


@dataclass
class GradientArguments:
    """What the study takes beside the models."""

    early: str | None = field(default=None, metadata={"help": "Occurrences of an earlier student."})
    matched: int = field(default=3, metadata={"help": "Positions of each type in the groups of equal number."})
    rare: int = field(default=200, metadata={"help": "Rare types of high divergence at most."})
    output: str = field(default="gradients.parquet", metadata={"help": "A row for each type."})


def run(argv: list[str]) -> None:
    """Study, write table and plot, and print the groups; raises `ValueError` or `OSError` for a user's error."""
    from .models import make_parser, set_init_kwargs

    parser = make_parser("gradients", GradientArguments)
    parser.add_argument("occurrences", help="occurrences.parquet")
    _, own, args, model_args, _, given = parse(parser, argv)
    if args.rock_set is None:
        parser.error("the following arguments are required: --rock_set")
    _check(own, args, model_args)
    set_init_kwargs(args, model_args)

    from ..artefacts.atomic import require_writable
    from ..artefacts.gradient_table import write_table
    from ..artefacts.occurrences import Occurrences
    from ..report.plots.canvas import save_png
    from ..report.plots.evidence import plot_gradients
    from ..studies.gradient_study import lines, study_gradients
    from ..studies.gradients import read_rollouts
    from .collect import PROMPTS
    from .models import make_trainer

    output, path = Path(own.output), Path(given.occurrences)
    require_writable(output)
    late = Occurrences(path)
    early = None if own.early is None else Occurrences(own.early)
    rollouts = read_rollouts(late, path.with_name(PROMPTS))
    trainer = make_trainer(_no_prompts(), args, model_args)[0]
    found = study_gradients(
        trainer.model_pair,
        trainer.rock_set,
        rollouts,
        early,
        matched=own.matched,
        rare=own.rare,
        seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
        pad_id=trainer.processing_class.pad_token_id,
    )
    write_table(found, trainer.processing_class, output)
    save_png(plot_gradients(found), output.with_suffix(".png"))
    print("\n".join([*lines(found), f"The types are in {output}, the plot in {output.with_suffix('.png')}"]))


def _no_prompts():
    """Return a dataset for the trainer's constructor: nothing is sampled from it."""
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["-"]})


def _check(own: GradientArguments, args, model_args) -> None:
    """Raise `ValueError` for values that cannot be, before anything is loaded."""
    for name, holder in (("model_name_or_path", model_args), ("teacher_model_name_or_path", args)):
        if not getattr(holder, name):
            raise ValueError(f"Student and teacher are required: set --{name}.")
    for name in ("matched", "rare"):
        if type(getattr(own, name)) is not int or getattr(own, name) < 1:
            raise ValueError(f"--{name} must be a whole number of at least 1, got {getattr(own, name)!r}.")
    if args.world_size > 1:
        raise ValueError(f"gradients runs in one process, not in {args.world_size}: start it without a launcher.")
