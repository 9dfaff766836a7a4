"""Tests of trl_opd.vocabulary: the fingerprint is the one that FORMATS defines, and tokenizers agree or are refused."""

import hashlib
import re
import warnings

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.models.vocabulary import require_same_vocabulary


def tokenizer_of(vocab: dict[str, int], name: str = "") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab)))
    tokenizer.name_or_path = name
    assert tokenizer.get_vocab() == vocab
    return tokenizer


class SurrogateTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python whose vocabulary holds half of a surrogate pair, which the Rust ones cannot."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "\ud83d": 1}

    @property
    def vocab_size(self) -> int:
        return 2

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab()[token]


def test_fingerprint_is_the_sha256_of_the_lines_sorted_by_their_bytes():
    # The order by hand. The line of "a\x01" stands before that of "a", though the token stands behind it: lines are
    # sorted, not tokens. And x in full width before the emoji, which UTF-16 would sort the other way.
    lines = ["10\t5\n", "9\t6\n", "a\x01\t4\n", "a\t2\n", "b\t0\n", "é\t1\n", "ｘ\t7\n", "😀\t3\n"]
    expected = hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()
    vocab = {"b": 0, "é": 1, "a": 2, "😀": 3, "a\x01": 4, "10": 5, "9": 6, "ｘ": 7}
    assert fingerprint(tokenizer_of(vocab)) == f"sha256:{expected}"


def test_fingerprint_covers_added_tokens():
    tokenizer = tokenizer_of({"a": 0, "b": 1})
    tokenizer.add_tokens(["<new>"])
    assert fingerprint(tokenizer) == "sha256:" + hashlib.sha256(b"<new>\t2\na\t0\nb\t1\n").hexdigest()


def test_fingerprint_takes_a_vocabulary_with_lone_surrogates():
    expected = hashlib.sha256(b"a\t0\n\xed\xa0\xbd\t1\n").hexdigest()
    assert fingerprint(SurrogateTokenizer()) == f"sha256:{expected}"


def test_fingerprint_does_not_depend_on_insertion_order():
    vocab = {f"token {id}": id for id in range(50)}
    backwards = dict(reversed(vocab.items()))
    assert fingerprint(tokenizer_of(vocab)) == fingerprint(tokenizer_of(backwards))


@pytest.mark.parametrize(
    "other", [{"a": 0, "b": 2, "c": 1}, {"a": 0, "b": 1, "c": 3}, {"a": 0, "b": 1}, {"a": 0, "b": 1, "C": 2}]
)
def test_fingerprint_differs_when_an_id_moves_or_a_token_changes(other):
    assert fingerprint(tokenizer_of({"a": 0, "b": 1, "c": 2})) != fingerprint(tokenizer_of(other))


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
def test_tokens_on_one_side_only_are_a_warning_with_their_numbers(student, teacher, only_student, only_teacher):
    expected = f"{only_student} tokens exist only for the student and {only_teacher} only for the teacher"
    with pytest.warns(UserWarning, match=expected) as caught:
        require_same_vocabulary(tokenizer_of(student, "a/student"), tokenizer_of(teacher, "a/teacher"))
    assert len(caught) == 1
    assert "a/student" in str(caught[0].message)
    assert "a/teacher" in str(caught[0].message)


@pytest.mark.parametrize(
    ("student", "teacher", "tokens", "example"),
    [
        pytest.param(
            {"a": 0, "b": 1, "c": 2},
            {"a": 0, "b": 1, "c": 3},
            1,
            "'c' is id 2 for the student and 3 for the teacher",
            id="moved",
        ),
        pytest.param(
            {"a": 0, "b": 1, "c": 2},
            {"a": 0, "b": 2, "c": 1},
            2,
            "'b' is id 1 for the student and 2 for the teacher",
            id="swapped",
        ),
        pytest.param(
            {"a": 0, "b": 1}, {"a": 0, "c": 1}, 1, "id 1 is 'b' for the student and 'c' for the teacher", id="renamed"
        ),
        pytest.param(
            {"a": 0, "b": 1}, {"b": 0, "c": 1}, 2, "'b' is id 1 for the student and 0 for the teacher", id="shifted"
        ),
    ],
)
def test_tokens_that_are_numbered_differently_are_refused_with_an_example(student, teacher, tokens, example):
    with pytest.raises(ValueError, match=re.escape(example)) as caught:
        require_same_vocabulary(tokenizer_of(student, "a/student"), tokenizer_of(teacher, "a/teacher"))
    message = str(caught.value)
    assert f"({tokens} tokens;" in message
    assert "a/student" in message
    assert "a/teacher" in message
    assert "\n" not in message


def test_a_tokenizer_without_a_name_is_called_by_its_class():
    with pytest.raises(ValueError, match=r"student \(\w*Tokenizer\w*\)"):
        require_same_vocabulary(tokenizer_of({"a": 0}), tokenizer_of({"a": 1}))
