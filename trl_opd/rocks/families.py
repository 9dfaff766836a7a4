"""Families of tokens by their text, for any tokenizer: the first rule of a table that matches decides."""

from __future__ import annotations

import re
import unicodedata

# Words that open or turn a thought, in lower case; the rock-token paper calls them discourse markers.
_DISCOURSE_TEXT = """
actually additionally again alright also alternatively anyway because besides but consequently conversely finally
first firstly furthermore hence however indeed instead lastly let let's likewise maybe meanwhile moreover namely
nevertheless next nonetheless now okay ok otherwise overall perhaps previously second secondly similarly since so
specifically still subsequently then therefore third thirdly though thus ultimately wait we well whereas yet hmm oh
right sure yes no
"""
DISCOURSE = frozenset(_DISCOURSE_TEXT.split())
_FUNCTION_TEXT = """
a an the this that these those and or nor not if than as at by for from in into of off on onto out over per to under
up upon with within without about above across after against along among around before behind below beneath beside
between beyond down during except inside like near outside through throughout toward towards until via i you he she it
they me him her us them my your his its our their mine yours hers ours theirs myself yourself himself herself itself
ourselves themselves who whom whose which what when where why how there here am is are was were be been being do does
did doing done have has had having will would shall should can could may might must ought need each every either
neither both all any some none few many much more most less least several such same other another one ones only own
just too very
"""
FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())
# White space counts as Markdown, because line breaks and indentation are part of its syntax.
_MARKDOWN = re.compile(r"\s*|(?:[*~`#]+|_+|-|•|\||[-=]{3,}|\|[-:|\s]+\||\[[ xX]\])[,.:;]?")
# A LaTeX command. Some tokenizers split off the backslash; the command then has no space before it.
_COMMAND = re.compile(r"\s*\\[a-zA-Z]+|(?:frac|sqrt|boxed|cdot|text|left|right|times|pm|circ|theta|pi|mathrm|mathbf)")


def family_of(text: str | None) -> str | None:
    """Return the family of a token, one of `FAMILIES`; `None` if the text is not known.

    Args:
        text (`str`, *optional*): Text of the token, as its tokenizer decodes it.
    """
    if text is None:
        return None
    return next(family for family, fits in RULES if fits(text, text.strip()))


def _is_digit(text: str, core: str) -> bool:
    return bool(core) and all(unicodedata.category(sign) in ("Nd", "No", "Nl") for sign in core)


def _is_math(text: str, core: str) -> bool:
    if _COMMAND.fullmatch(text):
        return True
    categories = [unicodedata.category(sign) for sign in core]
    # The text has punctuation and symbols only, and at least one belongs to mathematics (+ = < → ∑) or to LaTeX.
    if any(category[0] not in "PS" for category in categories):
        return False
    return "Sm" in categories or not set(core).isdisjoint("$\\^{}")


def _is_punctuation(text: str, core: str) -> bool:
    return bool(core) and all(unicodedata.category(sign)[0] in "PS" for sign in core)


# The rules in order. The text is what the tokenizer decodes; its core is the text without the white space around it.
RULES = (
    ("other", lambda text, core: not text or "\ufffd" in text),  # an empty text, or a part of a character
    ("markdown", lambda text, core: bool(_MARKDOWN.fullmatch(core))),
    ("math", _is_math),
    ("digit", _is_digit),
    ("punctuation", _is_punctuation),
    ("discourse", lambda text, core: core.casefold() in DISCOURSE),
    ("function_word", lambda text, core: core.casefold() in FUNCTION_WORDS),
    ("other", lambda text, core: True),
)
FAMILIES = tuple(family for family, _ in RULES[1:])
