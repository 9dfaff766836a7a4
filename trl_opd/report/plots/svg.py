"""Turns Matplotlib's SVG files into elements of a page: no prolog, no style sheet, few ids and short numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
# Matplotlib's style sheet has one rule, for `*`: within a page it would apply to the whole page.
_DROPPED = {_SVG + "metadata", _SVG + "style"}
_NUMBERS = {"d", "x", "y", "width", "height", "transform"}
_OF_EACH_MARKER = ("href", "x", "y")
# Attributes that can refer to an id. The fill is a reference only in the form `url(#id)`: "#0072b2" is a colour.
_URL = re.compile(r"(url\(#)(.+)(\))")
_REFERENCES = {"href": re.compile(r"(#)(.+)()"), "clip-path": _URL, "fill": _URL}


def inline_svg(content: bytes, prefix: str, *, neutral: str) -> str:
    """Return an SVG file as an `<svg>` element that fills the width of its page, up to its own width.

    Args:
        content (`bytes`): A file of Matplotlib.
        prefix (`str`):
            Start of each id, which keeps the ids of a page's elements apart: a letter, then letters, digits, "-" and
            "_".
        neutral (`str`): Colour, `"#rrggbb"` in lower case, that is replaced by the text colour of the page.

    Raises:
        `ValueError`: if the prefix is empty or has other characters.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", prefix):
        raise ValueError(
            f"The prefix {prefix!r} cannot start the ids of a page, which must stay valid in HTML and in references: "
            "use a letter, then letters, digits, - and _ only."
        )
    root = ElementTree.fromstring(content)
    _, _, width, height = root.get("viewBox").split()
    for element in list(root.iter()):
        for child in list(element):
            if child.tag in _DROPPED:
                element.remove(child)
        element.tag = element.tag.removeprefix(_SVG)
        element.tail = None
        if element.tag != "text":
            element.text = None
        element.attrib = _attributes(element.attrib, neutral)

    for group in root.iter("g"):
        _share_look(group)
    _rename_ids(root, prefix)
    pixels = float(width) * 4 / 3  # 72 points are 96 pixels of a page
    root.attrib = {
        "xmlns": _SVG.strip("{}"),
        "viewBox": f"0 0 {_rounded(width)} {_rounded(height)}",
        "width": "100%",
        "style": f"max-width: {pixels:.0f}px; height: auto",
        "font-family": "system-ui, sans-serif",
        "fill": "currentColor",  # Matplotlib writes no fill for black, which is SVG's default
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(given: dict[str, str], neutral: str) -> dict[str, str]:
    """Return the attributes of an element, its style as attributes too, because the policy of a page may ban styles."""
    found = {}
    for name, value in given.items():
        if name != "style":
            found[name.removeprefix(_XLINK)] = value
            continue
        for part in value.split(";"):
            if part.strip():
                key, setting = part.split(": ", 1)
                found[key.strip()] = setting.strip()

    # Before version 3.11, Matplotlib writes size and family of a font as one setting.
    font = found.pop("font", None)
    if font:
        found["font-size"] = re.search(r"[\d.]+px", font)[0]
    found.pop("font-family", None)  # the root element has the family of all texts

    for name, value in found.items():
        if value.lower() == neutral:
            found[name] = "currentColor"
        elif name in _NUMBERS:
            found[name] = _rounded(" ".join(value.split()))
    if found.get("transform", "").startswith("rotate(-0 "):
        del found["transform"]
    return found


def _rounded(text: str) -> str:
    """Return a text with all its decimal numbers rounded to a hundredth of a point."""
    return re.sub(r"-?\d+\.\d+", _rounded_number, text)


def _rounded_number(match: re.Match) -> str:
    number = round(float(match[0]), 2)
    text = f"{number + 0.0:.2f}"  # adding zero turns -0.0 to 0.0
    return text.rstrip("0").rstrip(".")


def _share_look(group: ElementTree.Element) -> None:
    """Move the look of markers to their group if all of its elements are markers with the same look."""
    looks = []
    for marker in group:
        if marker.tag != "use":
            return
        looks.append({key: value for key, value in marker.items() if key not in _OF_EACH_MARKER})

    if looks and all(look == looks[0] for look in looks):
        group.attrib |= looks[0]
        for marker in group:
            marker.attrib = {name: marker.get(name) for name in _OF_EACH_MARKER}


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Number the ids that are referred to, in the order of their references, and remove all other ids."""
    names: dict[str, str] = {}
    for element in root.iter():
        for attribute, value in element.items():
            form = _REFERENCES.get(attribute)
            if form is None:
                continue
            match = form.fullmatch(value)
            if match:
                before, id, after = match.groups()
                name = names.setdefault(id, f"{prefix}-{len(names)}")
                element.set(attribute, f"{before}{name}{after}")

    for element in root.iter():
        id = element.attrib.pop("id", None)
        if id in names:
            element.set("id", names[id])
