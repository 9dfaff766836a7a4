"""What a run's folder gets for others to see: its student, the card of it, and the report."""

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
    """Save the student to a folder that changes only when every file is written.

    Args:
        folder (`str` or `os.PathLike`): Where the student is to lie.
        save (`Callable[[str], None]`): Saves it to a folder, as the Trainer does.
        merge (`peft.PeftModel`, *optional*): The student, when it is to be saved as a whole model instead of as its
            adapter.

    Raises:
        `OSError`: if a file cannot be written.
        `ValueError`: if the merged model would compute something else than the student; its adapter is saved then.
    """
    folder = Path(folder)
    with write_errors(folder, folder):
        with complete_files(folder) as part:
            if (folder / CARD_FILE).is_file():  # PEFT adds to it
                shutil.copy(folder / CARD_FILE, part)
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
        with complete_file(Path(folder) / CARD_FILE) as part:
            part.write_text(card.content, encoding="utf-8")
    except (ValueError, OSError) as error:
        # Cards are written with checkpoints, and no run ends for one.
        warnings.warn(f"The card of {folder} cannot be written: {error}", stacklevel=3)


def add_report(folder: str | os.PathLike, *, show_progress: bool = True) -> None:
    """Write the report of a run into its folder; if that fails, warn and leave the folder without one."""
    from ..report.build import write_report

    try:
        write_report(Path(folder), Path(folder) / REPORT_FILE, show_progress=show_progress)
    except (ValueError, OSError) as error:
        warnings.warn(f"The report of {folder} cannot be written: {error}", stacklevel=3)


def warn_of_failed_pushes(in_progress) -> None:
    """Warn of pushes of checkpoints that failed, because transformers runs them in a thread and ignores their errors.

    Args:
        in_progress (`transformers.utils.PushInProgress`, *optional*): The pushes, all of which have ended.
    """
    for job in getattr(in_progress, "jobs", ()):
        what = "push a checkpoint to the Hub while training"
        try:
            with hub_errors(what):
                job.result()
        except HubError as error:
            warnings.warn(f"{error} `trainer.push_to_hub()` pushes again.", stacklevel=3)
        except Exception as error:  # whatever it was, the training has not failed
            reason = f"{type(error).__name__}: {redact(str(error))}"
            warnings.warn(f"Could not {what}: {reason} `trainer.push_to_hub()` pushes again.", stacklevel=3)
