"""Atomic writing: a file appears under its name only when it is complete."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# Names of temporary files and folders begin with an underscore, because transformers does not push such files. It
# pushes checkpoints in a thread: a file that it has listed and that is then renamed would make the push fail.
PART_FOLDER = "_saving-"


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` at the end, or deleted after an error.

    Raises:
        `OSError`: if the file cannot be written; the message names `path` if the disk is full.
    """
    path = Path(path)
    _remove_leftovers(path)
    part = path.with_name(f"_{path.name}.{os.getpid()}.part")
    try:
        with room_errors(path):
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a JSON file that appears under its name only when it is complete.

    Raises:
        `ValueError`: if a number is not finite.
        `OSError`: if the file cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with complete_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def room_errors(path: Path) -> Iterator[None]:
    """Put the name of the file into the error of a full disk; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(f"{path} cannot be written: {os.strerror(error.errno)}.") from error


@contextmanager
def complete_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder to write to; its files move to `folder` at the end, or are deleted after an error."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{PART_FOLDER}*"):  # a killed process left these behind
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PART_FOLDER, dir=folder) as name:
        yield Path(name)
        for path in sorted(Path(name).rglob("*")):
            if not path.is_file():
                continue
            target = folder / path.relative_to(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


def require_writable(path: str | os.PathLike) -> None:
    """Raise `ValueError` unless a file can be written at a path; call it before a long computation, not after."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to; create it first.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"The folder {path.parent} cannot be written to; choose another or change its permissions.")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed processes left behind when they wrote this file."""
    for part in path.parent.glob(f"_{glob.escape(path.name)}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdecimal() and not _is_running(int(pid)):
            part.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # on Windows, `os.kill` would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return True
