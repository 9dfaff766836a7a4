"""Checks that two tokenizers give tokens the same ids, and that two models end their turns with the same tokens."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if a shared token has different ids in two tokenizers, or one id means different tokens.

    Tokens that only one tokenizer has (added tokens, a larger release) are allowed; a warning gives their number.

    Args:
        student (`transformers.PreTrainedTokenizerBase`): The tokenizer of the rollouts.
        teacher (`transformers.PreTrainedTokenizerBase`): The teacher's tokenizer.

    Raises:
        `ValueError`: if the two number their tokens differently.
    """
    ours = student.get_vocab()
    theirs = teacher.get_vocab()
    moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    by_id = {id: token for token, id in ours.items()}
    renamed = [token for token, id in theirs.items() if by_id.get(id, token) != token]
    if moved or renamed:
        token = min(moved or renamed)
        if moved:
            example = f"{token!r} is id {ours[token]} for the student and {theirs[token]} for the teacher"
        else:
            id = theirs[token]
            example = f"id {id} is {by_id[id]!r} for the student and {token!r} for the teacher"
        raise ValueError(
            f"The tokenizers of student ({_name(student)}) and teacher ({_name(teacher)}) number their tokens "
            f"differently ({max(len(moved), len(renamed))} tokens; for example {example}), so their distributions "
            "cannot be compared token by token. Use a teacher with the student's tokenizer, or TRL's GOLD trainer for "
            "different tokenizers."
        )

    only_student = len(ours.keys() - theirs.keys())
    only_teacher = len(theirs.keys() - ours.keys())
    if only_student or only_teacher:
        warnings.warn(
            f"The tokenizers of student ({_name(student)}) and teacher ({_name(teacher)}) agree on every shared token, "
            f"but {only_student} tokens exist only for the student and {only_teacher} only for the teacher.",
            stacklevel=2,
        )


def require_reachable(tokenizer: PreTrainedTokenizerBase, ends: Collection[int], rows: int) -> None:
    """Raise `ValueError` if the padding token, or every end of a rollout, is outside the student's `rows` ids."""
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
    # The mark must occur in no template; a word such as "turn" does in Gemma's.
    mark = "qvzx"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **(template_kwargs or {}))
    except Exception:  # there is no template, or it raises; rendering a prompt that needs it reports the error later
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
    """Warn if the student may learn an end token that does not stop its rollouts.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): Tokenizer that gives the tokens of the ids.
        student_ends (`Collection[int]`): Ids that end a rollout.
        teacher_ends (`Collection[int]`): Ids at which the teacher ends its generations; empty if not known.
        closing (`int`, *optional*): Id that the chat template puts after an assistant's turn.
    """
    disjoint = bool(teacher_ends) and set(student_ends).isdisjoint(teacher_ends)
    if not disjoint and (closing is None or closing in student_ends):
        return

    template = ""
    if closing is not None:
        template = f" and the chat template closes a turn with {_tokens(tokenizer, [closing])}"
    warnings.warn(
        f"Student and teacher may end their turns differently: rollouts end at {_tokens(tokenizer, student_ends)}, the "
        f"teacher ends at {_tokens(tokenizer, teacher_ends) or 'an unknown token'}{template}. A student that learns "
        "an end token that does not stop its rollouts writes up to max_completion_length (length explosion): name "
        "every end of a turn in `generation_config.eos_token_id` of the student, or as its tokenizer's `eos_token`.",
        stacklevel=2,
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> str:
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return ", ".join(f"{name!r} (id {id})" for id, name in zip(ids, names, strict=True))


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
