"""Text that others wrote, a model above all, as it can be shown: what is hidden or moves its neighbours is spelled out.

What comes back is plain text; escaping it for HTML is the template's part.
"""

from __future__ import annotations

import unicodedata

# Control, format (bidi controls and zero-width signs among them), surrogate, private, unassigned, line, paragraph.
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Letters, marks and a symbol that show nothing: joiner, fillers, variation selectors, the empty Braille cell.
BLANK_RANGES = ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
BLANK = frozenset([0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0]).union(
    *(range(first, last + 1) for first, last in BLANK_RANGES)
)
# Hebrew and Tibetan put up to four marks on a letter; a tower of more paints over the lines above.
MOST_MARKS = 4
DOTTED_CIRCLE = "\u25cc"


def visible(text: str, limit: int = 200, *, newline: str = "↵") -> str:
    r"""Return a text with everything that is invisible, or reorders what is beside it, spelled out.

    Controls, bidi controls, zero-width and other hidden signs, lone surrogates and unassigned signs become escapes as
    Python writes them (`\u202e`), a line break `↵`, a tab `⇥`. More than four combining marks on a sign are cut, and a
    mark with no sign to stand on gets a dotted circle. Spaces stay; so does a backslash, so an escape can be imitated.

    Args:
        text (`str`): Any text.
        limit (`int`, *optional*, defaults to 200): Characters of it that are shown; a longer one says its length.
        newline (`str`, *optional*, defaults to `"↵"`): What a line break becomes.
    """
    part = text[:limit]
    if not (part.isascii() and part.isprintable()):
        part = _spelled_out(part, newline)
    return part if len(text) <= limit else f"{part}… ({len(text):,} characters)".replace(",", " ")


def named(text: str, limit: int = 200) -> str:
    """Return a text as `visible` does, with the spaces at its ends shown as `␣`: " the" and "the" are two tokens."""
    shown = visible(text, limit)
    inner = shown.strip()
    if inner == shown:
        return shown
    start = len(shown) - len(shown.lstrip())
    return "".join(map(_space, shown[:start])) + inner + "".join(map(_space, shown[start + len(inner) :]))


def _spelled_out(text: str, newline: str) -> str:
    signs = []
    has_base, marks = False, 0
    for sign in text:
        category = unicodedata.category(sign)
        if category in HIDDEN or ord(sign) in BLANK:
            signs.append({"\n": newline, "\t": "⇥"}.get(sign) or ascii(sign)[1:-1])
            has_base, marks = False, 0
        elif category[0] != "M":
            signs.append(sign)
            has_base, marks = True, 0
        else:
            marks += 1
            if not has_base:
                signs.append(DOTTED_CIRCLE)
                has_base = True
            signs += [sign] if marks <= MOST_MARKS else ["…"] * (marks == MOST_MARKS + 1)
    return "".join(signs)


def _space(sign: str) -> str:
    return "␣" if sign == " " else ascii(sign)[1:-1]
