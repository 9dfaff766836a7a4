"""The fingerprint of a vocabulary is the one that FORMATS defines."""

import hashlib

import pytest
from transformers import PreTrainedTokenizer

from trl_opd.artefacts.fingerprint import fingerprint

from tests.helpers.tiny import tokenizer_of


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
    # We wrote the order by hand. The line of "a\x01" comes before that of "a", though as a token it comes after: lines
    # are sorted, not tokens. The full-width x comes before the emoji, which UTF-16 would sort the other way.
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
