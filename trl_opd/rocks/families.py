"""Families of tokens by their text, for any tokenizer: the first rule that matches decides."""

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


FAMILIES = ("markdown", "math", "digit", "punctuation", "discourse", "function_word", "other")


def family_of(text: str | None) -> str | None:
    """Return the family of a token, one of `FAMILIES`; `None` if the text is not known.

    Args:
        text (`str`, *optional*): Text of the token, as its tokenizer decodes it.
    """
    if text is None:
        return None
    # An empty text has no family, and U+FFFD means that the token is a part of a character.
    if text == "" or "\ufffd" in text:
        return "other"

    # No rule but that of LaTeX commands looks at the white space around a token.
    core = text.strip()
    word = core.casefold()
    categories = {unicodedata.category(sign) for sign in core}
    only_signs = all(category[0] in "PS" for category in categories)
    if _MARKDOWN.fullmatch(core):
        return "markdown"
    if _COMMAND.fullmatch(text) or (only_signs and _has_math(core, categories)):
        return "math"
    if categories <= {"Nd", "No", "Nl"}:
        return "digit"
    if only_signs:
        return "punctuation"
    if word in DISCOURSE:
        return "discourse"
    if word in FUNCTION_WORDS:
        return "function_word"
    return "other"


def _has_math(core: str, categories: set[str]) -> bool:
    """Return whether a sign belongs to mathematics (+ = < → ∑) or to LaTeX."""
    return "Sm" in categories or not set(core).isdisjoint("$\\^{}")
