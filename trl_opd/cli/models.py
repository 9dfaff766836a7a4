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

    class Parser(TrlParser):
        """TRL's parser, in which `--resume_from_checkpoint` may also stand without a value."""

        def add_argument(self, *flags, **settings):
            if "--resume_from_checkpoint" in flags:
                settings.update(nargs="?", const="true")
            return super().add_argument(*flags, **settings)

    kinds = (ScriptArguments, *own, OPDConfig, ModelConfig, DatasetMixtureConfig)
    parser = Parser(kinds, prog=f"trl-opd {command}")
    parser.usage = f"trl-opd {command} [--config FILE.yaml] [options]; `trl-opd {command} --help` lists them"
    return parser


def set_init_kwargs(training_args, model_args) -> None:
    """Pass the flags of `ModelConfig` on to both models; explicit init kwargs win, as in TRL's script.

    The student's quantisation is an argument of the trainer, and the teacher's comes through the teacher's own options.
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
