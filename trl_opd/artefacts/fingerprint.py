"""The fingerprint of a tokenizer, which a file stores to identify the tokenizer that its token ids belong to."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `sha256:...` over the lines `token<TAB>id<NEWLINE>` of the vocabulary, sorted by their UTF-8 bytes."""
    vocabulary = tokenizer.get_vocab()
    # The vocabularies of a few byte-level models hold lone surrogates, which UTF-8 cannot encode without this option.
    lines = sorted(f"{token}\t{id}\n".encode("utf-8", "surrogatepass") for token, id in vocabulary.items())
    return "sha256:" + hashlib.sha256(b"".join(lines)).hexdigest()


def load_tokenizer(name: object, known: object):
    """Return the tokenizer with a name if it is on this machine and has the fingerprint `known`, otherwise `None`.

    Args:
        name (`str`): A folder, or the name of a Hub repository that is in the local cache.
        known (`str`): Expected fingerprint.
    """
    if not isinstance(name, str) or not name.strip():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises errors of many classes for a broken tokenizer file
        return None
    return tokenizer if fingerprint(tokenizer) == known else None
