"""Finds out which checkpoints are complete, and which of them a run resumes from.

A process can be killed at any moment, also while it saves. So the last file of a checkpoint is a manifest,
`opd_complete.json`, which lists every other file with its size. It is written before the checkpoint is pushed and
before an older one is deleted.
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
STATES = (".pt", ".pth")  # torch writes these as zip archives
# torch reports a failed write as a plain RuntimeError, which only these words in its message tell apart.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "unexpected pos")


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Return whether a folder is named as a checkpoint, `checkpoint-STEP`; students are saved to other folders."""
    return checkpoint_step(Path(folder)) is not None


@contextmanager
def completing(trainer: Trainer, run_dir: str | os.PathLike) -> Iterator[None]:
    """Write a manifest as the last file of the checkpoint that the trainer saves inside this block. A collective.

    transformers has no hook between writing the last file of a checkpoint and pushing it or deleting older ones. That
    last file is the trainer's state, so we replace `TrainerState.save_to_json` inside the block. This is the only
    monkeypatch of this package. It can go when transformers calls a callback before it pushes and deletes.

    Args:
        trainer (`transformers.Trainer`): The trainer that saves.
        run_dir (`str` or `os.PathLike`): The run's output folder.

    Raises:
        `OSError`: if a file cannot be written; the message names the checkpoint from which the run can resume.
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
        # A resumed run may save a step again; until it is saved, the old manifest must not call it complete.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        state.save_to_json = save_and_complete
    try:
        with write_errors(folder, run_dir):
            yield
            if not trainer.args.should_save:
                wait()
    finally:
        vars(state).pop("save_to_json", None)


def write_manifest(folder: str | os.PathLike) -> None:
    """Write the manifest of a checkpoint: the names and sizes of its other files, once these are on the disk."""
    folder = Path(folder)
    mode = "rb" if os.name == "posix" else "r+b"  # Windows syncs only files that are open for writing
    files = {}
    for path in sorted(folder.rglob("*")):
        is_manifest = path.name == MANIFEST_FILE or path.name.startswith(f"_{MANIFEST_FILE}.")
        if is_manifest or not path.is_file():
            continue
        with open(path, mode) as file:
            os.fsync(file.fileno())  # otherwise a power cut could keep the manifest and lose the files that it lists
        name = path.relative_to(folder).as_posix()
        files[name] = path.stat().st_size
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, "version": VERSION, "files": files})


def find_fault(folder: str | os.PathLike) -> str | None:
    """Return what is wrong with a checkpoint, or `None` when it is complete.

    A killed process leaves files that are cut or missing. A file that is larger than the manifest says is accepted,
    because only a user can have changed it.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return f"it has no {MANIFEST_FILE}, so its saving was not finished"
    try:
        sizes = _read_sizes(manifest)
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"its {MANIFEST_FILE} is damaged"

    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is gone"
        found = path.stat().st_size
        if found < size:
            return f"its {name} has {found} of {size} bytes"
        if path.suffix in STATES and not zipfile.is_zipfile(path):
            return f"its {name} is damaged"
    return None


def newest_complete(run_dir: str | os.PathLike) -> Path | None:
    """Return the complete checkpoint of the latest step in a run's folder, or `None`."""
    for folder in _checkpoints(run_dir):
        if find_fault(folder) is None:
            return folder
    return None


def resolve_checkpoint(resume: str | os.PathLike | bool | None, run_dir: str | os.PathLike) -> str | None:
    """Return the folder of the checkpoint to resume from, or `None` to start from the beginning.

    `True` means the newest complete one. The newest folder of the run, which transformers' `get_last_checkpoint`
    returns, is treated like `True`: if it is incomplete, a warning names the checkpoint that is used instead.

    Args:
        resume (`str` or `os.PathLike` or `bool`, *optional*):
            The argument `resume_from_checkpoint` of `Trainer.train`: a folder, or whether to resume.
        run_dir (`str` or `os.PathLike`): The run's output folder.

    Raises:
        `ValueError`: if no checkpoint is complete, or the named one is not.
        `FileNotFoundError`: if the named folder does not exist.
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
    fault = find_fault(folder)
    if fault is None:
        return _as_resume_path(folder)

    is_newest = found and folder.resolve() == found[0].resolve()
    if is_newest and newest_complete(run_dir):
        return _as_resume_path(_newest_of(found, run_dir))
    if (folder / MANIFEST_FILE).is_file() or not _is_state(folder / TRAINER_STATE_NAME):
        raise ValueError(
            f"The checkpoint {folder} is incomplete: {fault}. Resume from another one, or start over; if you changed "
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
    has_scheduler = (folder / SCHEDULER_NAME).is_file()
    # DeepSpeed and FSDP keep the optimizer's state in folders.
    has_folders = any(path.is_dir() for path in folder.iterdir())
    if not has_scheduler and not has_folders:
        warnings.warn(
            f"{folder} holds the model only (save_only_model): optimizer and learning-rate schedule start over.",
            stacklevel=4,
        )
    return str(folder)


@contextmanager
def write_errors(folder: Path, run_dir: str | os.PathLike) -> Iterator[None]:
    """Turn the errors of several classes that a failed write raises (full disk, no permission) into one `OSError`.

    Other errors pass unchanged.

    Args:
        folder (`pathlib.Path`): The folder that is written inside this block.
        run_dir (`str` or `os.PathLike`): The run's output folder, whose newest complete checkpoint the message names.

    Raises:
        `OSError`: if a file cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_failed_write(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        message = f"{folder} cannot be written: {reason:.300}."
        complete = newest_complete(run_dir)
        if complete is not None:
            message += f" {complete.name} is complete: make room, then resume from it with resume_from_checkpoint."
        raise OSError(message) from error


@contextmanager
def read_errors(what: str) -> Iterator[None]:
    """Turn the error that torch's safe loader raises for an unsafe or damaged file into a `ValueError`.

    Args:
        what (`str`): What is read inside this block, the subject of the message.

    Raises:
        `ValueError`: if the safe loader refuses a file.
    """
    try:
        yield
    except Exception as error:
        # The class is compared by its name, so that this module does not import pickle.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"{what} holds a file that torch's safe loader refuses: it is truncated, a git-lfs pointer, or would run "
            "code. Download it again, or use another one."
        ) from error


def _newest_of(found: list[Path], run_dir: str | os.PathLike) -> Path:
    """Return the newest complete checkpoint; warn if a newer one is incomplete."""
    newest = found[0]
    complete = newest_complete(run_dir)
    if complete is None:
        raise ValueError(
            f"No checkpoint in {run_dir} is complete ({newest.name}: {find_fault(newest)}). Start without "
            "resume_from_checkpoint. To use a checkpoint of another trainer, pass its folder; to use one that you "
            f"changed yourself, remove its {MANIFEST_FILE} first."
        )
    if complete != newest:
        warnings.warn(
            f"{newest} is incomplete ({find_fault(newest)}): the run resumes from {complete.name}.", stacklevel=4
        )
    return complete


def _checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """Return the checkpoints of a run, the latest step first."""
    return [folder for _, folder in reversed(find_checkpoints(Path(run_dir)))]


def _read_sizes(manifest: Path) -> dict[str, int]:
    """Return the files of a checkpoint with their sizes, as its manifest lists them."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    sizes = dict(content["files"])
    types = set(map(type, sizes.values()))
    if content["format"] != FORMAT or types != {int}:
        raise ValueError
    return sizes


def _is_failed_write(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is not None  # an error of the Hub has no errno
    if isinstance(error, RuntimeError):
        text = str(error)
        return any(words in text for words in TORCH_WRITE_ERRORS)
    return True  # a SafetensorError


def _is_state(path: Path) -> bool:
    """Return whether a file is the state that transformers' Trainer writes with a checkpoint."""
    try:
        return "global_step" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
