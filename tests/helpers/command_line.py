"""Flags of `trl-opd`, and the message of a command that fails."""

from pathlib import Path

from trl_opd.cli import main


def flags(world: Path, output: Path, **changes) -> list[str]:
    """Return the flags of a short run; `True` gives a flag without a value, and `None` leaves it out."""
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
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def error_of(argv: list[str], capsys) -> str:
    """Run a command that fails because of a user's mistake, and return its message: one line, without a traceback."""
    capsys.readouterr()
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1].rpartition("\r")[2].strip()  # behind a progress bar
    start = f"trl-opd {argv[0]}: error: "
    assert last.startswith(start)
    return last.removeprefix(start)
