"""Makes text from models and users safe to show: hidden characters, and those that move their neighbours, are escaped.

The functions return plain text; the templates escape it for HTML.
"""

from __future__ import annotations

import re
import unicodedata

# Control, format (with the bidi controls and zero-width characters), surrogate, private, unassigned, line, paragraph.
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Letters, marks and a symbol that show nothing: joiner, fillers, the empty Braille cell, variation selectors.
BLANK = frozenset([0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0]).union(
    range(0x180B, 0x1810),
    range(0xFE00, 0xFE10),
    range(0xE0100, 0xE01F0),
)
# Hebrew and Tibetan put up to four marks on a letter; a taller stack would paint over the lines above.
MOST_MARKS = 4
DOTTED_CIRCLE = "\u25cc"
OUTER_SPACES = re.compile(r"^\s+|\s+\Z")


def visible(text: str, limit: int = 200, *, newline: str = "↵") -> str:
    r"""Return a text in which every character that is invisible, or reorders its neighbours, is escaped.

    Controls, bidi controls, zero-width and other hidden characters, lone surrogates and unassigned characters become
    escapes as Python writes them (`\u202e`); a line break becomes `↵` and a tab `⇥`. More than four combining marks on
    one character are cut, and a mark without a character to sit on gets a dotted circle. Spaces stay. A backslash also
    stays, so a text can imitate an escape.

    Args:
        text (`str`): Any text.
        limit (`int`, *optional*, defaults to 200): Most characters to show; a longer text is cut and its length added.
        newline (`str`, *optional*, defaults to `"↵"`): Replacement for a line break.
    """
    part = text[:limit]
    if not (part.isascii() and part.isprintable()):
        part = _escaped(part, newline)
    if len(text) <= limit:
        return part
    return f"{part}… ({len(text):,} characters)".replace(",", " ")


def named(text: str, limit: int = 200) -> str:
    """Return a text as `visible` does, with the spaces at its ends as `␣`, because " the" and "the" are two tokens."""
    return OUTER_SPACES.sub(_marked_spaces, visible(text, limit))


def _escaped(text: str, newline: str) -> str:
    replacements = {"\n": newline, "\t": "⇥"}
    shown = []
    has_base = False
    marks = 0
    for sign in text:
        category = unicodedata.category(sign)
        if category in HIDDEN or ord(sign) in BLANK:
            shown.append(replacements.get(sign) or _escape(sign))
            has_base = False
            continue
        if not category.startswith("M"):
            shown.append(sign)
            has_base = True
            marks = 0
            continue

        if not has_base:
            shown.append(DOTTED_CIRCLE)
            has_base = True
            marks = 0
        marks += 1
        if marks <= MOST_MARKS:
            shown.append(sign)
        elif marks == MOST_MARKS + 1:
            shown.append("…")
    return "".join(shown)


def _marked_spaces(spaces: re.Match) -> str:
    return _escape(spaces[0]).replace(" ", "␣")


def _escape(sign: str) -> str:
    return ascii(sign)[1:-1]
