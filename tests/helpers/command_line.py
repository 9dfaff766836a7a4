"""Flags of `trl-opd`."""

from pathlib import Path


def flags(world: Path, output: Path, **changes) -> list[str]:
    """Return the flags of a short run; `True` gives a flag without a value, `None` leaves the flag out."""
    settings = {
        "model_name_or_path": world / "student",
        "teacher_model_name_or_path": world / "teacher",
        "dataset_name": world / "chats.jsonl",
        "output_dir": output,
        "use_cpu": True,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
        **changes,
    }
    given = [(name, value) for name, value in settings.items() if value is not None]
    return [part for name, value in given for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
