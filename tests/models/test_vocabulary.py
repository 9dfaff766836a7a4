"""Tokenizers of student and teacher that number tokens differently are an error with an example."""

import re
import warnings

import pytest

from trl_opd.models.vocabulary import require_same_vocabulary

from tests.helpers.tiny import tokenizer_of


def test_identical_vocabularies_are_silent():
    vocab = {"a": 0, "b": 1, "c": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_same_vocabulary(tokenizer_of(vocab, "student"), tokenizer_of(dict(reversed(vocab.items())), "teacher"))


@pytest.mark.parametrize(
    ("student", "teacher", "only_student", "only_teacher"),
    [
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1}, 1, 0),
        ({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}, 0, 3),
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "d": 3, "e": 4}, 1, 2),
    ],
)
def test_unshared_tokens_give_a_warning_with_their_numbers(student, teacher, only_student, only_teacher):
    expected = f"{only_student} tokens exist only for the student and {only_teacher} only for the teacher"
    with pytest.warns(UserWarning, match=expected) as caught:
        require_same_vocabulary(tokenizer_of(student, "a/student"), tokenizer_of(teacher, "a/teacher"))
    assert len(caught) == 1
    assert "a/student" in str(caught[0].message)
    assert "a/teacher" in str(caught[0].message)


@pytest.mark.parametrize(
    ("student", "teacher", "tokens", "example"),
    [
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "c": 3}, 1, "'c' is id 2 for the student and 3 for the teacher"),
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1}, 2, "'b' is id 1 for the student and 2 for the teacher"),
        ({"a": 0, "b": 1}, {"a": 0, "c": 1}, 1, "id 1 is 'b' for the student and 'c' for the teacher"),
        ({"a": 0, "b": 1}, {"b": 0, "c": 1}, 2, "'b' is id 1 for the student and 0 for the teacher"),
    ],
    ids=["moved", "swapped", "renamed", "shifted"],
)
def test_different_ids_raise_an_error_with_an_example(student, teacher, tokens, example):
    with pytest.raises(ValueError, match=re.escape(example)) as caught:
        require_same_vocabulary(tokenizer_of(student, "a/student"), tokenizer_of(teacher, "a/teacher"))
    message = str(caught.value)
    assert f"({tokens} tokens;" in message
    assert "a/student" in message
    assert "a/teacher" in message
    assert "\n" not in message


def test_unnamed_tokenizer_is_reported_by_its_class():
    with pytest.raises(ValueError, match=r"student \(\w*Tokenizer\w*\)"):
        require_same_vocabulary(tokenizer_of({"a": 0}), tokenizer_of({"a": 1}))
