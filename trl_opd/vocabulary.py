"""Whether two tokenizers number their tokens alike, and a fingerprint by which an artefact names its tokenizer."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `sha256:...` over the lines `token<TAB>id<NEWLINE>` of the vocabulary, sorted by their UTF-8 bytes."""
    # surrogatepass: byte-level vocabularies of a few models hold lone surrogates, which plain UTF-8 refuses.
    lines = sorted(f"{token}\t{id}\n".encode("utf-8", "surrogatepass") for token, id in tokenizer.get_vocab().items())
    return "sha256:" + hashlib.sha256(b"".join(lines)).hexdigest()


def require_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless every token that both tokenizers have has one id and no id names two tokens.

    Tokens on one side only (added tokens, a larger release) are allowed: a warning tells their number.

    Args:
        student (`transformers.PreTrainedTokenizerBase`): The tokenizer of the rollouts.
        teacher (`transformers.PreTrainedTokenizerBase`): The teacher's.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    by_id = {id: token for token, id in ours.items()}
    renamed = [token for token, id in theirs.items() if by_id.get(id, token) != token]
    if moved or renamed:
        token = min(moved or renamed)
        if moved:
            example = f"{token!r} is id {ours[token]} for the student and {theirs[token]} for the teacher"
        else:
            example = f"id {theirs[token]} is {by_id[theirs[token]]!r} for the student and {token!r} for the teacher"
        raise ValueError(
            f"The tokenizers of student ({_name(student)}) and teacher ({_name(teacher)}) number their tokens "
            f"differently ({max(len(moved), len(renamed))} tokens; for example {example}), so their distributions "
            "cannot be compared token by token. Use a teacher with the student's tokenizer, or TRL's GOLD trainer for "
            "different tokenizers."
        )
    only_student, only_teacher = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
    if only_student or only_teacher:
        warnings.warn(
            f"The tokenizers of student ({_name(student)}) and teacher ({_name(teacher)}) agree on every shared token, "
            f"but {only_student} tokens exist only for the student and {only_teacher} only for the teacher.",
            stacklevel=2,
        )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


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
    except Exception:  # of a broken file a tokenizer raises whatever it meets
        return None
    return tokenizer if fingerprint(tokenizer) == known else None
