"""The argument parser of the commands that load a student and a teacher, and a trainer that only reads the student."""

from __future__ import annotations


def make_trainer(dataset, args, model_args, *, needs_base: bool = False):
    """Return a trainer whose student is not trained, with the student's init kwargs and quantisation config.

    With `needs_base`, a student that is an adapter has to leave, switched off, the student before its distillation.
    Sets `args.num_generations` to 1, and `args.model_init_kwargs` to `None` if the student is already loaded.
    """
    from transformers import AutoTokenizer
    from trl import get_quantization_config

    from ..models.student import load_student
    from ..opd_trainer import OPDTrainer

    args.num_generations = 1  # the callers repeat the prompts in their batches
    quantization = get_quantization_config(model_args)
    kwargs = dict(args.model_init_kwargs)
    student, tokenizer = load_student(model_args.model_name_or_path, kwargs, quantization, needs_base=needs_base)

    processor = None
    trainer_quantization = quantization
    if not isinstance(student, str):
        # The trainer rejects loading options for a model that is already loaded.
        args.model_init_kwargs = None
        trainer_quantization = None
        processor = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=args.trust_remote_code)

    trainer = OPDTrainer(
        model=student,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        quantization_config=trainer_quantization,
    )
    return trainer, kwargs, quantization


def make_parser(command: str = "train", *own: type):
    """Return a parser of TRL's script, model and dataset arguments, `OPDConfig`, and a command's own arguments.

    Args:
        command (`str`): Name of the command, for its usage line.
        own (`type`): Dataclasses of the command's own arguments.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..opd_config import OPDConfig

    class Parser(TrlParser):
        """TRL's parser, which also accepts `--resume_from_checkpoint` without a value."""

        def add_argument(self, *flags, **settings):
            if "--resume_from_checkpoint" in flags:
                settings.update(nargs="?", const="true")
            return super().add_argument(*flags, **settings)

    kinds = (ScriptArguments, *own, OPDConfig, ModelConfig, DatasetMixtureConfig)
    parser = Parser(kinds, prog=f"trl-opd {command}")
    parser.usage = f"trl-opd {command} [--config FILE.yaml] [options]; `trl-opd {command} --help` lists them"
    return parser


def set_init_kwargs(training_args, model_args) -> None:
    """Copy the flags of `ModelConfig` into the init kwargs of both models. Explicit init kwargs win, as in TRL.

    Quantisation is not copied: the student's is an argument of the trainer, the teacher's has options in `OPDConfig`.
    """
    common = {
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    student = {"revision": model_args.model_revision, **common}
    teacher = {"revision": training_args.teacher_model_revision, **common}
    training_args.model_init_kwargs = student | (training_args.model_init_kwargs or {})
    training_args.teacher_model_init_kwargs = teacher | (training_args.teacher_model_init_kwargs or {})
