"""The family of a token follows from its text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_opd.rocks.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("family", "texts"),
    [
        ("math", ["$", " $", "$$", " \\(", "\\frac", "frac", "}{", "^{", " =", "+", "→", "≤", "×", ")$", " $\n\n"]),
        ("markdown", ["**", " **", "###", "\n", "\n\n", " ", "\t", "```", "---\n\n", " -", "|", "~~", "__", "**,"]),
        ("punctuation", [",", ".", ".\n\n", ":", "。", "、", "…", "?", "(", ");", '"', "«", "/", "--"]),
        ("discourse", ["So", " so", "Wait", " Let", "We", "However", "HMM"]),
        ("digit", ["0", " 7", "42", "１２", "٣", "²"]),
        ("function_word", [" the", "of", " And", "is", "Which"]),
        ("other", [" apple", "xyz", "x2", "数", "\ufffd", "", "_x", " times"]),
    ],
)
def test_family_of_a_token_follows_from_its_text(family, texts):
    assert {text: family_of(text) for text in texts} == dict.fromkeys(texts, family)
    assert family in FAMILIES


@given(text=st.text(max_size=8))
def test_every_text_has_a_family_and_an_unknown_one_has_none(text):
    assert family_of(text) in FAMILIES
    assert family_of(None) is None
