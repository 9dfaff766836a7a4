"""What a run's folder gets for others to see: its student, the card of it, and the report."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..artefacts.atomic import complete_file, complete_files
from ..artefacts.hub import hub_errors, redact
from .checkpoints import is_checkpoint, write_errors
from .merging import remove_adapter, replace_by_merged

CARD, REPORT = "README.md", "report.html"


def save_student(trainer, folder: str | os.PathLike | None, save: Callable[[str], None]) -> None:
    """Save the student to a folder that changes only when every file is written; merged where `merge_adapter` says so.

    A checkpoint keeps the adapter, and says of itself when it is whole.

    Args:
        trainer (`OPDTrainer`): The trainer.
        folder (`str` or `os.PathLike`, *optional*): Where the student is to lie; `args.output_dir` when omitted.
        save (`Callable[[str], None]`): Saves it to a folder, as the Trainer does.

    Raises:
        `OSError`: if a file cannot be written.
    """
    folder, merge = Path(folder or trainer.args.output_dir), trainer.args.merge_adapter
    if not trainer.args.should_save or is_checkpoint(folder):
        save(str(folder))
        return
    with write_errors(folder, folder):
        with complete_files(folder) as part:
            if (folder / CARD).is_file():  # PEFT adds to it
                shutil.copy(folder / CARD, part)
            save(str(part))
            if merge:
                replace_by_merged(trainer.accelerator.unwrap_model(trainer.model), part)
        if merge:  # last: until they are gone the folder loads as the adapter
            remove_adapter(folder)


def write_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    tags: str | Sequence[str] | None = None,
) -> None:
    """Write the card of the student in a folder, `README.md`, from what its run left there.

    Args:
        folder (`str` or `os.PathLike`): The run's output folder.
        name (`str`, *optional*): Name of the student; the folder's when omitted.
        repo_id (`str`, *optional*): Where it lies on the Hub.
        tags (`str` or `Sequence[str]`, *optional*): Tags beside those that every student of this package has.
    """
    # Matplotlib and Jinja2 are for those who look at a run, not for those who train.
    from ..report.card import render_card

    tags = [tags] if isinstance(tags, str) else list(tags or ())
    try:
        card = render_card(Path(folder), name=name, repo_id=repo_id, tags=tags)
        with complete_file(Path(folder) / CARD) as part:
            part.write_text(card.content, encoding="utf-8")
    except (ValueError, OSError) as error:
        # Cards are written with checkpoints, and no run ends for one.
        warnings.warn(f"The card of {folder} cannot be written: {error}", stacklevel=3)


def write_card_of(trainer, name: str | None, dataset_name: str | None, tags: str | Sequence[str] | None) -> None:
    """Write the record of a trainer's run as it stands, and the card that is made of it, on the first process."""
    if not trainer.is_world_process_zero():
        return
    try:
        trainer.run_record.write(dataset_name)
    except OSError as error:
        warnings.warn(f"The record of the run cannot be written: {error}", stacklevel=3)
    write_card(trainer.args.output_dir, name=name, repo_id=trainer.hub_model_id, tags=tags)


def add_report(folder: str | os.PathLike) -> None:
    """Write the report of a run into its folder; what stands in its way is a warning, and the student goes without."""
    from ..report.build import write_report

    try:
        write_report(Path(folder), Path(folder) / REPORT)
    except (ValueError, OSError) as error:
        warnings.warn(f"The report of {folder} cannot be written: {error}", stacklevel=3)


def warn_of_failed_pushes(in_progress) -> None:
    """Warn of pushes of checkpoints that failed: transformers runs them beside the training and never looks at them.

    Args:
        in_progress (`transformers.utils.PushInProgress`, *optional*): The pushes, all of which have ended.
    """
    for job in getattr(in_progress, "jobs", ()):
        what = "push a checkpoint to the Hub while training"
        try:
            with hub_errors(what):
                job.result()
        except OSError as error:
            warnings.warn(f"{error} `trainer.push_to_hub()` pushes again.", stacklevel=3)
        except Exception as error:  # whatever it was, the training has not failed
            reason = f"{type(error).__name__}: {redact(str(error))}"
            warnings.warn(f"Could not {what}: {reason} `trainer.push_to_hub()` pushes again.", stacklevel=3)
