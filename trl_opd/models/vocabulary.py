"""Whether two tokenizers number their tokens alike and two models end their turns alike; a tokenizer's fingerprint."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def require_reachable(tokenizer: PreTrainedTokenizerBase, ends: Collection[int], rows: int) -> None:
    """Raise `ValueError` when the padding, or every end of a rollout, is an id that a student of `rows` ids lacks."""
    advice = "resize the student's embeddings (`model.resize_token_embeddings(len(tokenizer))`), or name another token"
    if min(ends) >= rows:
        raise ValueError(
            f"Every end of a rollout ({_tokens(tokenizer, ends)}) is outside the {rows} ids of the student, so no "
            f"rollout could end: {advice} as `tokenizer.eos_token`."
        )
    if tokenizer.pad_token_id >= rows:
        raise ValueError(
            f"The padding token {_tokens(tokenizer, [tokenizer.pad_token_id])} is outside the {rows} ids of the "
            f"student, which cannot embed it: {advice} as `tokenizer.pad_token`."
        )


def find_turn_end(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None) -> int | None:
    """Return the id of the special token that the chat template puts after an assistant's turn, `None` without one."""
    mark = "qvzx"  # in no template, as "turn" is in Gemma's
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **(template_kwargs or {}))
    except Exception:  # no template, or one that raises: prompts that need it are answered when they are rendered
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    return next((id for id in after if id in special), None)


def warn_of_other_ends(
    tokenizer: PreTrainedTokenizerBase,
    student_ends: Collection[int],
    teacher_ends: Collection[int],
    closing: int | None,
) -> None:
    """Warn when the student is taught to end where its rollouts go on.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): Names the ids.
        student_ends (`Collection[int]`): Ids that end a rollout.
        teacher_ends (`Collection[int]`): Ids that end what the teacher generates; empty where that is not known.
        closing (`int`, *optional*): Id that the chat template puts after an assistant's turn.
    """
    parted = bool(teacher_ends) and not set(student_ends) & set(teacher_ends)
    if not parted and (closing is None or closing in student_ends):
        return
    said = f" and the chat template closes a turn with {_tokens(tokenizer, [closing])}" if closing is not None else ""
    warnings.warn(
        f"Student and teacher may end their turns differently: rollouts end at {_tokens(tokenizer, student_ends)}, the "
        f"teacher ends at {_tokens(tokenizer, teacher_ends) or 'an unknown token'}{said}. A student that learns an end "
        "at which its rollouts go on writes up to max_completion_length (length explosion): name every end of a turn "
        "in `generation_config.eos_token_id` of the student, or as its tokenizer's `eos_token`.",
        stacklevel=2,
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> str:
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return ", ".join(f"{name!r} (id {id})" for id, name in zip(ids, names, strict=True))


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
