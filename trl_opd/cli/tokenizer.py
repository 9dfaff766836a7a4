"""Finds the tokenizer that names the tokens of a file: the one of `--tokenizer`, or the one recorded in the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts.fingerprint import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_tokenizer(path: str | None, section: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer at a path, or without a path the one that a file names, if it is on this machine.

    Returns `None` if the file names none, or one that is not on this machine.

    Args:
        path (`str`, *optional*): A folder, or a name on the Hub.
        section (`dict`, *optional*): The tokenizer's section in the metadata of a file: its name and fingerprint.

    Raises:
        `ValueError` or `OSError`: if there is no tokenizer at the path.
    """
    if path is None:
        if not isinstance(section, dict):
            return None
        return load_tokenizer(section.get("name"), section.get("fingerprint"))
    if path.startswith((".", "/", "~")) and not Path(path).exists():
        raise FileNotFoundError(f"There is no tokenizer in {path}: no such folder.")

    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer file may raise anything
        raise ValueError(f"--tokenizer {path} holds no tokenizer: {error}") from error
