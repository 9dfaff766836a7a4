"""The fingerprint of a tokenizer, which a file stores to identify the tokenizer that its token ids belong to."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `sha256:...` over the lines `token<TAB>id<NEWLINE>` of the vocabulary, sorted by their UTF-8 bytes."""
    # surrogatepass: byte-level vocabularies of a few models hold lone surrogates, which plain UTF-8 refuses.
    lines = sorted(f"{token}\t{id}\n".encode("utf-8", "surrogatepass") for token, id in tokenizer.get_vocab().items())
    return "sha256:" + hashlib.sha256(b"".join(lines)).hexdigest()


def load_tokenizer(name: object, known: object):
    """Return the tokenizer of a name where it is on this machine and has the fingerprint `known`, else `None`.

    Args:
        name (`str`): A folder, or a name on the Hub that is in the local cache.
        known (`str`): Fingerprint of the tokenizer that is meant.
    """
    if not isinstance(name, str) or not name.strip():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises errors of many classes for a broken tokenizer file
        return None
    return tokenizer if fingerprint(tokenizer) == known else None
