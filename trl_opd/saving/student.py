"""Saves the student of a run, its model card and its report, and warns of pushes to the Hub that failed."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import PeftModel

from ..artefacts.atomic import complete_file, complete_files
from ..artefacts.hub import HubError, hub_errors, redact
from ..artefacts.run_files import CARD_FILE, REPORT_FILE
from .checkpoints import write_errors
from .merging import remove_adapter, replace_by_merged


def save_student(folder: str | os.PathLike, save: Callable[[str], None], *, merge: PeftModel | None = None) -> None:
    """Save the student to a folder whose files change only once all new ones are written.

    Args:
        folder (`str` or `os.PathLike`): Folder to save the student to.
        save (`Callable[[str], None]`): Saves the student to the folder that it is given, as the Trainer does.
        merge (`peft.PeftModel`, *optional*): The student with its adapter, to save it as one merged model instead.

    Raises:
        `OSError`: if a file cannot be written.
        `ValueError`: if the merged model would not compute what the student computes; its adapter is saved then.
    """
    folder = Path(folder)
    card = folder / CARD_FILE
    with write_errors(folder, folder):
        with complete_files(folder) as part:
            if card.is_file():
                shutil.copy(card, part)  # PEFT adds to the card that it finds
            save(str(part))
            refusal = None
            if merge is not None:
                try:
                    replace_by_merged(merge, part)
                except ValueError as error:  # the adapter is saved first
                    refusal = error
        if refusal is not None:
            raise refusal
        # This is the last step, because a folder with an adapter's files loads as the adapter.
        if merge is not None:
            remove_adapter(folder, list(merge.peft_config))


def write_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    tags: str | Sequence[str] | None = None,
) -> None:
    """Write the model card of a run, `README.md`, from the files in its output folder; if that fails, warn.

    Args:
        folder (`str` or `os.PathLike`): The run's output folder.
        name (`str`, *optional*): Name of the student; the name of the folder by default.
        repo_id (`str`, *optional*): Name of the student's repository on the Hub.
        tags (`str` or `Sequence[str]`, *optional*): Tags to add to those that every student of this package has.
    """
    # Imported here because training needs neither Matplotlib nor Jinja2, which the report imports.
    from ..report.card import render_card

    folder = Path(folder)
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    try:
        card = render_card(folder, name=name, repo_id=repo_id, tags=tags)
        with complete_file(folder / CARD_FILE) as part:
            part.write_text(card.content, encoding="utf-8")
    except (ValueError, OSError) as error:
        # A card is written with every checkpoint, so an error here would end the training.
        warnings.warn(f"The card of {folder} cannot be written: {error}", stacklevel=3)


def add_report(folder: str | os.PathLike, *, show_progress: bool = True) -> None:
    """Write the report of a run into its folder; if that fails, warn and leave the folder without a new one."""
    from ..report.build import write_report

    folder = Path(folder)
    try:
        write_report(folder, folder / REPORT_FILE, show_progress=show_progress)
    except (ValueError, OSError) as error:
        warnings.warn(f"The report of {folder} cannot be written: {error}", stacklevel=3)


def warn_of_failed_pushes(in_progress) -> None:
    """Warn of each push of a checkpoint that failed.

    transformers pushes checkpoints in threads and ignores their errors.

    Args:
        in_progress (`transformers.utils.PushInProgress`, *optional*): The pushes, all of which have ended.
    """
    for job in getattr(in_progress, "jobs", ()):
        what = "push a checkpoint to the Hub while training"
        try:
            with hub_errors(what):
                job.result()
        except HubError as error:
            warnings.warn(f"{error} Call `trainer.push_to_hub()` to push again.", stacklevel=3)
        except Exception as error:  # of any class, because a failed push must not end the training
            reason = redact(f"{type(error).__name__}: {error}").rstrip(".")
            warnings.warn(f"Could not {what}: {reason}. Call `trainer.push_to_hub()` to push again.", stacklevel=3)
