"""`trl-opd collect`: sample rollouts from a student and store the divergence of every token."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .options import format_options, options_of
from .parsing import is_text, parse, require_whole_number

if TYPE_CHECKING:
    from ..studies.collect import CollectionSummary


@dataclass
class CollectArguments:
    """Arguments of `trl-opd collect` in addition to those of `trl-opd train`."""

    num_prompts: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "Use only the first N prompts; all of them when omitted."},
    )
    greedy: bool = field(
        default=False,
        metadata={"help": "Decode greedily instead of sampling as in training."},
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "metavar": "P",
            "help": "The student before distillation: a model, or adapter_off to score a LoRA student with its adapter "
            "switched off (needs no extra memory).",
        },
    )


HELP = f"""usage: trl-opd collect --model_name_or_path M --teacher_model_name_or_path T --dataset_name D [...]

Sample completions from a student for the prompts of a dataset, in dataset order, and score every token with the
teacher. Writes DIR/occurrences.parquet, which `trl-opd detect` reads, and DIR/prompts.parquet. To resume a run that was
killed, run the same command again; it continues with the next batch. Takes the options of `trl-opd train` for models,
sampling and data, and those below.

usual options:
  --model_name_or_path M              the student: a model name or folder, or the folder of a LoRA adapter
  --teacher_model_name_or_path T      the teacher
  --dataset_name D                    prompts: a dataset on the Hub, a folder, or a JSON Lines file
  --output_dir DIR                    folder for the two files
  --max_completion_length N           maximum number of tokens in a completion
  --num_generations N                 rollouts per prompt (1)
  --per_device_eval_batch_size N      rollouts per batch (8)
  --use_cpu --bf16 false              run without a GPU

{format_options("options of collect:", options_of(CollectArguments))}

  `trl-opd train --help_all` lists every option of TRL and transformers.

example:
  trl-opd collect --model_name_or_path student --reference_model_name_or_path adapter_off \\
      --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct --teacher_quantization 4bit --dataset_name trl-lib/tldr \\
      --num_prompts 500 --output_dir rollouts"""

INTERRUPTED = ": finished batches are kept, run the same command again to resume"

# Options that change the collected rows, in addition to the models and the dataset.
SETTINGS = (
    "seed",
    "num_generations",
    "per_device_eval_batch_size",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "chat_template_kwargs",
    "use_vllm",
    "use_transformers_continuous_batching",
    "bf16",
    "fp16",
    "teacher_quantization",
    "teacher_model_revision",
    "model_init_kwargs",
    "teacher_model_init_kwargs",
)


def run(argv: list[str]) -> None:
    """Collect rollouts into the output folder and print a summary.

    Raises:
        `ValueError` or `OSError`: if an argument or a file is invalid.
    """
    from ..studies.collect import is_complete, summarise_collection
    from .models import make_parser, set_init_kwargs
    from .prompts import dataset_errors, make_source, take_prompts

    script_args, own, args, model_args, dataset_args = parse(make_parser("collect", CollectArguments), argv)
    check_arguments(own, args, model_args)
    set_init_kwargs(args, model_args)
    if own.greedy:
        args.generation_kwargs = {**(args.generation_kwargs or {}), "do_sample": False}

    settings = describe_settings(own, args, model_args, script_args, dataset_args)
    folder = Path(args.output_dir)
    if is_complete(folder, settings):
        print(f"{args.output_dir} is complete already, so there is nothing to do.")
        return

    with dataset_errors(script_args.dataset_name):
        dataset = take_prompts(make_source(script_args, dataset_args, args), own.num_prompts)
        make_collector(dataset, args, model_args, own.reference_model_name_or_path, settings).collect()
    print(format_summary(summarise_collection(folder), folder))


def make_collector(dataset, args, model_args, reference: str | None, settings: dict):
    """Load the models and return the object that collects rollouts for a dataset."""
    from ..models.model_check import check_teacher
    from ..models.student import load_reference
    from ..studies.collect import ADAPTER_OFF, Collector
    from .models import make_trainer

    num_generations = args.num_generations  # `make_trainer` sets it to 1
    trainer, kwargs, quantization = make_trainer(dataset, args, model_args, needs_base=reference == ADAPTER_OFF)
    if reference not in (None, ADAPTER_OFF):
        reference = load_reference(
            reference, kwargs, quantization, student=trainer.model, device=trainer.accelerator.device
        )
        check_teacher(
            reference,
            "reference student",
            last_hidden_state=trainer.model_pair.last_hidden_state,
            autocast=trainer.accelerator.autocast,
        )
    return Collector(
        trainer.model_pair,
        trainer.sample_rollouts,
        dataset,
        Path(args.output_dir),
        num_generations=num_generations,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        chunk_bytes=args.divergence_chunk_bytes,
        reference=reference,
        settings=settings,
    )


def format_summary(summary: CollectionSummary, folder: Path) -> str:
    """Return the summary that is printed at the end of a collection."""
    from ..artefacts.run_files import OCCURRENCES_FILE

    before = "" if summary.mean_kl_pre is None else f", {summary.mean_kl_pre:.4f} before the distillation"
    return (
        f"Collected {summary.rollouts} rollouts of {summary.prompts} prompts, {summary.tokens} tokens; mean divergence "
        f"{summary.mean_kl:.4f} nats per token{before} (no interval).\n"
        f"The rollouts are in {folder}. To find the rocks, run `trl-opd detect {folder / OCCURRENCES_FILE}`."
    )


def describe_settings(own: CollectArguments, args, model_args, script_args, dataset_args) -> dict:
    """Return the settings that determine the collected rows, as JSON values."""
    settings = {
        "model_name_or_path": model_args.model_name_or_path,
        "teacher_model_name_or_path": args.teacher_model_name_or_path,
        "reference_model_name_or_path": own.reference_model_name_or_path,
        "dataset": [str(part) for part in dataset_args.datasets or ()] or script_args.dataset_name,
        "dataset_config": script_args.dataset_config,
        "split": script_args.dataset_train_split,
        "num_prompts": own.num_prompts,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
    }
    for name in SETTINGS:
        settings[name] = getattr(args, name)
    return json.loads(json.dumps(settings, default=str))


def check_arguments(own: CollectArguments, args, model_args) -> None:
    """Raise `ValueError` if an argument is invalid, before anything is loaded."""
    for name, holder in (("model_name_or_path", model_args), ("teacher_model_name_or_path", args)):
        if not is_text(getattr(holder, name)):
            raise ValueError(f"Student and teacher are required: set --{name}.")
    if own.num_prompts is not None:
        require_whole_number("num_prompts", own.num_prompts)
    reference = own.reference_model_name_or_path
    if reference is not None and not is_text(reference):
        raise ValueError(f"--reference_model_name_or_path takes a model, or adapter_off, got {reference!r}.")
    if own.greedy and args.temperature != 1.0:
        raise ValueError(f"--greedy does not use a temperature, got --temperature {args.temperature}: leave it at 1.0.")
    if model_args.use_peft:
        raise ValueError(
            "--use_peft would create a new adapter, but collect needs a trained student: leave it out, and set "
            "--model_name_or_path to the folder of the adapter."
        )
    if args.world_size > 1:
        raise ValueError(
            f"collect cannot run in {args.world_size} processes: start it without a launcher, in one process."
        )
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file: name a folder.")
