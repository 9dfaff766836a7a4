"""The tokenizer that names the tokens of a file: one that the user names, or the file's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts.fingerprint import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_tokenizer(path: str | None, section: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer at a path; without one that of a file, or `None` where it is not on this machine.

    Args:
        path (`str`, *optional*): A folder, or a name on the Hub.
        section (`dict`, *optional*): The tokenizer's section in the metadata of a file: its name and fingerprint.

    Raises:
        `ValueError` or `OSError`: if there is no tokenizer at the path.
    """
    if path is None:
        return load_tokenizer(section.get("name"), section.get("fingerprint")) if isinstance(section, dict) else None
    if path.startswith((".", "/", "~")) and not Path(path).exists():
        raise FileNotFoundError(f"There is no tokenizer in {path}: no such folder.")

    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer file may raise anything
        raise ValueError(f"--tokenizer {path} holds no tokenizer: {error}") from error
