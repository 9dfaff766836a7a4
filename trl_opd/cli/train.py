"""`trl-opd train`: distil a teacher into a student with `OPDTrainer`, with the options of TRL's script."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from .options import format_options, options_of_config
from .parsing import parse

if TYPE_CHECKING:
    from transformers import TrainerState

HELP = f"""usage: trl-opd train [--config FILE.yaml] [options]

Distil a teacher into a student on the student's own rollouts. Takes the arguments of TRL's distillation script and
those below, as flags or in a YAML file. A dataset is the name of one on the Hub, a folder, or a JSON Lines file; every
row has a `prompt`.

usual options of TRL:
  --model_name_or_path M            the student
  --teacher_model_name_or_path T    the teacher
  --dataset_name D                  dataset of prompts
  --output_dir DIR                  folder for checkpoints and the trained model
  --use_peft --load_in_4bit         train with LoRA; load the base model in 4-bit precision (QLoRA)
  --resume_from_checkpoint [PATH]   resume from the newest checkpoint in output_dir, or from PATH

{format_options("options of trl_opd:", options_of_config())}

  --help_all                        also list every option of TRL and transformers (takes seconds, imports torch)

example:
  trl-opd train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
      --dataset_name trl-lib/tldr --use_peft --dtype bfloat16 --learning_rate 2e-4 --output_dir student"""

INTERRUPTED = ": its checkpoints are kept, pass --resume_from_checkpoint to resume from the newest complete one"
# After the last collective, a thread of gloo takes the GIL to release its tensors (torch 2.13). Python before 3.14
# ends a thread that asks for the GIL during shutdown, and C++ answers that with an abort. A short sleep lets the thread
# finish first. This can go when Python 3.14 is the oldest version that we support: it suspends such a thread instead.
GLOO_RELEASE_SECONDS = 0.5
SAMPLES = 2  # rollouts that the report shows per logging step


def run(argv: list[str]) -> None:
    """Parse, train, save; raises `ValueError` or `OSError` for a user's error."""
    from .models import make_parser

    parser = make_parser()
    if "--help_all" in argv:
        parser.print_help()
        return
    script_args, training_args, model_args, dataset_args = parse(parser, argv)
    train(script_args, training_args, model_args, dataset_args)


def train(script_args, training_args, model_args, dataset_args) -> None:
    """Distil with `OPDTrainer`, save the student, and print a summary of the run."""
    from trl import get_peft_config, get_quantization_config

    from ..opd_trainer import OPDTrainer
    from ..saving.checkpoints import read_errors
    from ..saving.student import add_report
    from ..training.rollout_samples import RolloutSamples
    from .models import set_init_kwargs
    from .prompts import dataset_errors, load_prompts, make_source

    if model_args.model_name_or_path is None:
        raise ValueError("A student is required: set --model_name_or_path.")
    if training_args.teacher_model_name_or_path is None:
        raise ValueError("A teacher is required: set --teacher_model_name_or_path.")
    set_init_kwargs(training_args, model_args)
    train_dataset, eval_dataset = load_prompts(make_source(script_args, dataset_args, training_args))

    # `true`, which is also the flag without a value, resumes from the newest checkpoint.
    resume = training_args.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    with dataset_errors(script_args.dataset_name), read_errors("The folder of student or teacher"):
        trainer = OPDTrainer(
            model=model_args.model_name_or_path,
            teacher_model=training_args.teacher_model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            callbacks=[RolloutSamples(SAMPLES)],
        )
        trainer.run_record.dataset_name = script_args.dataset_name
        with read_errors("The checkpoint to resume from"):
            trainer.train(resume_from_checkpoint=resume)

    if training_args.push_to_hub:  # also saves the student
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    else:
        trainer.save_model(training_args.output_dir)
        if trainer.accelerator.is_main_process:
            add_report(training_args.output_dir, show_progress=not training_args.disable_tqdm)
    if trainer.accelerator.is_main_process:
        print(format_run(trainer.state, training_args.output_dir))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    if trainer.accelerator.num_processes > 1:
        time.sleep(GLOO_RELEASE_SECONDS)


def format_run(state: TrainerState, output_dir: str) -> str:
    """Return the summary of a run: steps, divergence in the first and last log, paths of student and report."""
    from ..artefacts.run_files import REPORT_FILE

    means = [line["kl/mean"] for line in state.log_history if "kl/mean" in line]
    text = f"Trained {state.global_step} steps"
    if means:
        text += f", divergence {means[0]:.3f} -> {means[-1]:.3f} nats per token"
    text += f". The student is in {output_dir}"
    report = Path(output_dir, REPORT_FILE)
    if report.is_file():
        text += f"\nOpen {report} in a browser: the report"
    return text
