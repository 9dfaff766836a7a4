"""Texts in a report have no hidden characters, leave their neighbours in place, and are cut when long."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_opd.report.text import BLANK, HIDDEN, MOST_MARKS, named, visible


@given(st.text(max_size=300) | st.text(alphabet="a \u0301\u0489\u202e\u200b\n\t\ud800\ufe0f\u3164\\u", max_size=60))
def test_visible_text_has_no_hidden_character_and_no_tower_of_marks(text):
    shown = visible(text, 100)
    assert not {unicodedata.category(sign) for sign in shown} & HIDDEN
    assert not {ord(sign) for sign in shown} & BLANK
    marks = "".join("m" if unicodedata.category(sign)[0] == "M" else "." for sign in shown)
    assert "m" * (MOST_MARKS + 1) not in marks
    assert marks[:1] != "m"
    assert len(shown) <= 11 * 100 + 40
    assert visible(shown, 10**6) == shown, "visible characters stay"
    shown.encode("utf-8")
    assert visible(text, 100, newline="↵\n").replace("↵\n", "↵") == shown


@given(st.text(alphabet=[chr(code) for code in range(32, 127)], max_size=100))
def test_plain_ascii_is_shown_as_it_is(text):
    assert visible(text, 100) == text
    assert named(text, 100).replace("␣", " ") == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a↵b⇥c"),
        ("\x00\r\x85", "\\x00\\r\\x85"),
        ("a\u202eb\u200f", "a\\u202eb\\u200f"),
        ("\ud800", "\\ud800"),
        ("\U000e0041\ufe0f\u3164", "\\U000e0041\\ufe0f\\u3164"),
        ("e\u0301", "e\u0301"),
        ("\u0301", "\u25cc\u0301"),
        ("\n\u0301", "↵\u25cc\u0301"),
        ("e" + "\u0301" * 9 + "f", "e\u0301\u0301\u0301\u0301…f"),
        ("שלום 日本 é �", "שלום 日本 é �"),
        (" \xa0 ", " \xa0 "),
        ("\\u202e", "\\u202e"),
    ],
)
def test_hidden_characters_are_escaped(text, shown):
    assert visible(text) == shown


def test_long_text_is_cut_and_states_its_length():
    assert visible("x" * 100_000, 5) == "xxxxx… (100 000 characters)"
    assert visible("x" * 5, 5) == "xxxxx"


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" the", "␣the"), ("a b ", "a b␣"), ("  ", "␣␣"), ("\xa0x", "\\xa0x"), ("", ""), ("\n", "↵")],
)
def test_spaces_at_the_ends_of_a_name_are_shown(text, shown):
    assert named(text) == shown
