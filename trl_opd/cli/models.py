"""Arguments of the command line -> parser, init kwargs and a trainer whose student is only read."""

from __future__ import annotations


def make_trainer(dataset, args, model_args):
    """Return a trainer whose student is only read, and what the student was loaded with."""
    from transformers import AutoTokenizer
    from trl import get_quantization_config

    from ..models.student import load_student
    from ..opd_trainer import OPDTrainer

    args.num_generations = 1  # batches repeat their prompts themselves
    quantization, kwargs = get_quantization_config(model_args), dict(args.model_init_kwargs)
    student, tokenizer = load_student(model_args.model_name_or_path, kwargs, quantization)
    is_name = isinstance(student, str)
    if not is_name:
        args.model_init_kwargs = None
    processor = None
    if not is_name:
        processor = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=args.trust_remote_code)
    trainer = OPDTrainer(
        model=student,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        quantization_config=quantization if is_name else None,
    )
    return trainer, kwargs, quantization


def make_parser(command: str = "train", *own: type):
    """Return TRL's parser of script, dataset and model arguments, with `OPDConfig` and a command's own dataclass."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..opd_config import OPDConfig

    kinds = (ScriptArguments, *own, OPDConfig, ModelConfig, DatasetMixtureConfig)
    parser = TrlParser(kinds, prog=f"trl-opd {command}")
    parser.usage = f"trl-opd {command} [--config FILE.yaml] [options]; `trl-opd {command} --help` lists them"
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"
    return parser


def set_init_kwargs(training_args, model_args) -> None:
    """Let the flags of `ModelConfig` reach both models, as far as their own init kwargs leave them open."""
    # As in TRL's script: the flags of ModelConfig reach both models, explicit init kwargs win. The student's
    # quantisation is an argument of the trainer; the teacher's only comes through its own init kwargs.
    common = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    for name, revision in (
        ("model_init_kwargs", model_args.model_revision),
        ("teacher_model_init_kwargs", training_args.teacher_model_revision),
    ):
        given = getattr(training_args, name) or {}
        kwargs = {"revision": revision, "trust_remote_code": training_args.trust_remote_code, **common, **given}
        setattr(training_args, name, kwargs)
