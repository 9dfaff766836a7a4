"""`trl-opd gradients`: measure the gradient of each token type on stored rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..artefacts.run_files import GRADIENTS_FILE, PROMPTS_FILE
from .options import format_options, options_of
from .parsing import parse, require_whole_number

if TYPE_CHECKING:
    import numpy as np

    from ..artefacts.gradient_table import Study
    from ..studies.gradient_study import MannWhitney, Wilcoxon

# Columns on which rocks are tested against rare types -> their names in the printed table.
TESTED = {"norm": "norm, as published", "norm_unbiased": "unbiased norm", "norm_matched": "equal n"}


@dataclass
class GradientArguments:
    """Arguments of `trl-opd gradients` in addition to those of `trl-opd train`."""

    early: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Occurrences of an earlier student, to show how the divergence of each group changed.",
        },
    )
    matched: int = field(
        default=3,
        metadata={"metavar": "N", "help": "Positions drawn per type for the comparison at equal sample size."},
    )
    rare: int = field(
        default=200,
        metadata={"metavar": "N", "help": "Maximum number of rare types with high divergence to compare with."},
    )
    output: str = field(
        default=GRADIENTS_FILE,
        metadata={
            "metavar": "FILE",
            "help": "Where to write the result, one row per type. A plot is written next to it.",
        },
    )


HELP = f"""usage: trl-opd gradients OCCURRENCES.parquet --rock_set F --model_name_or_path M [...]

Measure the norm and direction of each token type's gradient with respect to the student's logits, on stored rollouts,
for three groups: the rocks, rare types with high divergence, and a random sample of the other types. Averaging alone
makes the mean gradient of frequent types small, so the table also shows an unbiased norm and a comparison at equal
sample size. Takes the model options of `trl-opd train` and those below. Reads prompts.parquet from the folder of the
occurrences.

usual options:
  --rock_set F                      the rock set file (required)
  --model_name_or_path M            the student: a model name or folder, or the folder of a LoRA adapter
  --teacher_model_name_or_path T    the teacher
  --per_device_eval_batch_size N    rollouts per forward pass (8)
  --use_cpu --bf16 false            run without a GPU

{format_options("options of gradients:", options_of(GradientArguments))}

example:
  trl-opd gradients rollouts/occurrences.parquet --rock_set rock_set.json --model_name_or_path student \\
      --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct --teacher_quantization 4bit"""


def run(argv: list[str]) -> None:
    """Measure the gradients, write the table and its plot, and print the groups.

    Raises:
        `ValueError` or `OSError`: if an argument or a file is invalid.
    """
    from .models import make_parser, set_init_kwargs

    parser = make_parser("gradients", GradientArguments)
    parser.add_argument("occurrences", help="the file occurrences.parquet of trl-opd collect")
    _, own, args, model_args, _, positional = parse(parser, argv)
    if args.rock_set is None:
        parser.error("the following arguments are required: --rock_set")
    check_arguments(own, args, model_args)
    set_init_kwargs(args, model_args)

    from ..artefacts.atomic import require_writable
    from ..artefacts.gradient_table import write_table
    from ..artefacts.occurrences import Occurrences
    from ..report.plots.canvas import save_png
    from ..report.plots.evidence import plot_gradients
    from ..studies.gradient_study import study_gradients
    from ..studies.gradients import read_rollouts
    from .models import make_trainer

    output = Path(own.output)
    path = Path(positional.occurrences)
    plot = output.with_suffix(".png")
    require_writable(output)
    late = Occurrences(path)
    early = None if own.early is None else Occurrences(own.early)
    rollouts = read_rollouts(late, path.with_name(PROMPTS_FILE))
    trainer, _, _ = make_trainer(_dataset_of_no_use(), args, model_args)

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
    save_png(plot_gradients(found), plot)
    print("\n".join(format_groups(found)))
    print(f"The types are in {output}, the plot in {plot}")


def check_arguments(own: GradientArguments, args, model_args) -> None:
    """Raise `ValueError` if an argument is invalid, before anything is loaded."""
    for name, holder in (("model_name_or_path", model_args), ("teacher_model_name_or_path", args)):
        if not getattr(holder, name):
            raise ValueError(f"Student and teacher are required: set --{name}.")
    for name in ("matched", "rare"):
        require_whole_number(name, getattr(own, name))
    if args.world_size > 1:
        raise ValueError(
            f"gradients cannot run in {args.world_size} processes: start it without a launcher, in one process."
        )


def _dataset_of_no_use():
    """Return a dataset of one prompt: the trainer's constructor requires one, but no rollout is sampled here."""
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["-"]})


def format_groups(found: Study) -> list[str]:
    """Return the printed lines of a study: the medians of each group, and the tests between groups."""
    from ..artefacts.gradient_table import GROUPS, MEDIANS
    from ..studies.gradient_study import compare_with_early, divergence_changes, mann_whitney

    heads = "".join(f"{head:>15}" for head in MEDIANS.values())
    lines = [f"{'medians of types':<16}{'types':>7}{heads}"]
    for group, name in GROUPS.items():
        types = (found.columns["group"] == group).sum()
        cells = "".join(f"{_format_median(found.of(group, column)):>15}" for column in MEDIANS)
        lines.append(f"{name:<16}{types:>7}{cells}")
    lines += [
        f"Norms of the mean gradient of the logits; cosines to G_balanced; equal n: {found.matched} positions each.",
        "No intervals, because positions of a rollout are not independent.",
        "Rocks against rare types (Mann-Whitney, U / n1 n2):",
    ]
    for column, name in TESTED.items():
        test = mann_whitney(found.of("rock", column), found.of("rare", column))
        lines.append(f"  {name:<20} {_format_mann_whitney(test)}")
    if found.has_early:
        lines.append("Mean KL, early to late (medians; Wilcoxon):")
        for group, name in GROUPS.items():
            lines.append(f"  {name:<20} {_format_wilcoxon(compare_with_early(found, group))}")
        test = mann_whitney(divergence_changes(found, "rock"), divergence_changes(found, "rare"))
        lines.append(f"  change, rocks against rare (Mann-Whitney): {_format_mann_whitney(test)}")
    return lines


def _format_median(values: np.ndarray) -> str:
    import numpy as np

    return f"{np.median(values):.4g}" if len(values) else "-"


def _format_mann_whitney(test: MannWhitney | None) -> str:
    if test is None:
        return "not compared: a group is empty"
    return f"{test.share:.2f} (0.5 means no difference), p = {test.p:.2g}"


def _format_wilcoxon(test: Wilcoxon | None) -> str:
    if test is None:
        return "not compared: too few types"
    return (
        f"{test.early:.3g} -> {test.late:.3g}, p = {test.p:.2g}, share of ranks that decreased {test.fallen:.2f}, "
        f"{test.types} types"
    )
