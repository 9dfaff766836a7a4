"""Finds out which checkpoints are complete, and which of them a run resumes from.

A process can be killed at any moment, also while it saves. So the last file of a checkpoint is `opd_complete.json`,
which names every other file with its size; it is there before the checkpoint is pushed, and before an older one goes.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artefacts.atomic import write_json
from ..artefacts.run_files import MANIFEST_FILE, checkpoint_step, find_checkpoints

FORMAT = "trl_opd.checkpoint"
VERSION = 1
STATES = (".pt", ".pth")  # archives that torch writes
# Words of torch's plain RuntimeError for a failed write.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "unexpected pos")


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Return whether a folder is named as a checkpoint: `push_to_hub` and the user save the model elsewhere."""
    return checkpoint_step(Path(folder)) is not None


@contextmanager
def completing(trainer: Trainer, run_dir: str | os.PathLike) -> Iterator[None]:
    """Write a manifest as the last file of the checkpoint that the trainer saves inside this block. A collective.

    transformers offers no hook between the last file of a checkpoint and its push and rotation. The state of the
    Trainer is that last file, so `TrainerState.save_to_json` is replaced inside the block: a monkeypatch, the only one
    of this package. It can go when transformers calls a callback before it pushes and rotates.

    Args:
        trainer (`transformers.Trainer`): The trainer that saves.
        run_dir (`str` or `os.PathLike`): The run's output folder.

    Raises:
        `OSError`: if a file cannot be written, naming the checkpoint from which the run can resume.
    """
    state = trainer.state
    folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    wait = trainer.accelerator.wait_for_everyone
    save_state = state.save_to_json

    def save_and_complete(path: str) -> None:
        save_state(path)
        wait()  # the other processes write their RNG states and shards
        write_manifest(folder)

    if trainer.args.should_save:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)  # of the same step, saved before the run was resumed
        state.save_to_json = save_and_complete
    try:
        with write_errors(folder, run_dir):
            yield
            if not trainer.args.should_save:
                wait()
    finally:
        vars(state).pop("save_to_json", None)


def write_manifest(folder: str | os.PathLike) -> None:
    """Write the names and sizes of a checkpoint's files into it, once they are on the disk."""
    folder = Path(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name == MANIFEST_FILE or path.name.startswith(f"_{MANIFEST_FILE}."):
            continue
        with open(path, "rb" if os.name == "posix" else "r+b") as file:
            os.fsync(file.fileno())  # otherwise a power cut could keep the manifest and lose the files that it lists
        files[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, "version": VERSION, "files": files})


def find_fault(folder: str | os.PathLike) -> str | None:
    """Return what is wrong with a checkpoint, or `None` when it is complete.

    A killed process leaves files that are cut or missing. A file that is larger than the manifest says is accepted,
    because only a user can have changed it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        return f"it has no {MANIFEST_FILE}, so its saving was not finished"
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = dict(content["files"])
        if content["format"] != FORMAT or not files or not all(type(size) is int for size in files.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"its {MANIFEST_FILE} is damaged"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is gone"
        if path.stat().st_size < size:
            return f"its {name} has {path.stat().st_size} of {size} bytes"
        if path.suffix in STATES and not zipfile.is_zipfile(path):
            return f"its {name} is damaged"
    return None


def newest_complete(run_dir: str | os.PathLike) -> Path | None:
    """Return the complete checkpoint of the latest step in a run's folder, or `None`."""
    return next((folder for folder in _checkpoints(run_dir) if find_fault(folder) is None), None)


def resolve_checkpoint(resume: str | os.PathLike | bool | None, run_dir: str | os.PathLike) -> str | None:
    """Return the folder of the checkpoint to resume from, or `None` to start from the beginning.

    `True` means the newest complete one. The newest folder of the run, which transformers' `get_last_checkpoint`
    returns, is treated like `True`: if it is incomplete, a warning names the checkpoint that is used instead.

    Args:
        resume (`str` or `os.PathLike` or `bool`, *optional*): As `Trainer.train` takes it.
        run_dir (`str` or `os.PathLike`): The run's output folder.

    Raises:
        `ValueError`: if no checkpoint is complete, or the named one is not.
        `OSError`: if there is no such folder.
    """
    if resume is None or resume is False:
        return None
    found = _checkpoints(run_dir)
    if resume is True:
        if not found:
            raise ValueError(
                f"There is no checkpoint in {run_dir} to resume from: start without resume_from_checkpoint."
            )
        return _as_resume_path(_newest_of(found, run_dir))
    folder = Path(resume)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {folder}: no such folder.")
    if (reason := find_fault(folder)) is None:
        return _as_resume_path(folder)
    if found and folder.resolve() == found[0].resolve() and newest_complete(run_dir):
        return _as_resume_path(_newest_of(found, run_dir))
    if (folder / MANIFEST_FILE).is_file() or not _is_state(folder / TRAINER_STATE_NAME):
        raise ValueError(
            f"The checkpoint {folder} is incomplete: {reason}. Resume from another one, or start over; if you changed "
            f"it yourself, remove its {MANIFEST_FILE} and name it again."
        )
    warnings.warn(
        f"The checkpoint {folder} has no {MANIFEST_FILE}, so another trainer seems to have written it, and we cannot "
        "check whether it is complete.",
        stacklevel=3,
    )
    return _as_resume_path(folder)


def _as_resume_path(folder: Path) -> str:
    """Return a checkpoint as the path to resume from; warn if it holds the model only."""
    # DeepSpeed and FSDP keep optimizers in folders.
    if not (folder / SCHEDULER_NAME).is_file() and not any(path.is_dir() for path in folder.iterdir()):
        warnings.warn(
            f"{folder} holds the model only (save_only_model): optimizer and learning-rate schedule start over.",
            stacklevel=4,
        )
    return str(folder)


@contextmanager
def write_errors(folder: Path, run_dir: str | os.PathLike) -> Iterator[None]:
    """Turn the errors of writing a folder (full disk, no permission), of several classes, into one `OSError`.

    Errors of anything else pass unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        of_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_WRITE_ERRORS)
        of_system = isinstance(error, OSError) and error.errno is not None  # errors of the Hub have no errno
        if not (of_torch or of_system or isinstance(error, SafetensorError)):
            raise
        whole = newest_complete(run_dir)
        after = (
            ""
            if whole is None
            else f" {whole.name} is complete: make room, then resume from it with resume_from_checkpoint."
        )
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(f"{folder} cannot be written: {reason:.300}.{after}") from error


@contextmanager
def read_errors(what: str) -> Iterator[None]:
    """Turn the error that torch's safe loader raises for an unsafe or damaged file into one `ValueError`."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # compared by name, so that this module does not import pickle
            raise
        raise ValueError(
            f"{what} holds a file that torch's safe loader refuses: it is cut, a pointer of git-lfs, or would run code."
        ) from error


def _newest_of(found: list[Path], run_dir: str | os.PathLike) -> Path:
    """Return the newest complete checkpoint; warn if a newer one is incomplete."""
    whole = newest_complete(run_dir)
    if whole is None:
        raise ValueError(
            f"No checkpoint in {run_dir} is complete ({found[0].name}: {find_fault(found[0])}). Start without "
            "resume_from_checkpoint. To use a checkpoint of another trainer, pass its folder; to use one that you "
            f"changed yourself, remove its {MANIFEST_FILE} first."
        )
    if whole != found[0]:
        warnings.warn(
            f"{found[0]} is incomplete ({find_fault(found[0])}): the run resumes from {whole.name}.", stacklevel=4
        )
    return whole


def _checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """Return the checkpoints of a run, the latest step first."""
    return [folder for _, folder in reversed(find_checkpoints(Path(run_dir)))]


def _is_state(path: Path) -> bool:
    try:
        return "global_step" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
