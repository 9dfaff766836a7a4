"""Matplotlib's SVG files as elements of a page: without prolog and styles, with few ids and short numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_DROPPED = ("metadata", "style")  # the one rule of its style is for `*`: it would be one for the whole page
_NUMBERS = {"d", "x", "y", "width", "height", "transform"}
_OF_EACH_MARKER = ("href", "x", "y")
# A colour looks like a reference: "#0072b2".
_REFERENCES = {"href": re.compile(r"(#)(.+)()")} | dict.fromkeys(("clip-path", "fill"), re.compile(r"(url\(#)(.+)(\))"))


def inline_svg(content: bytes, prefix: str, *, neutral: str) -> str:
    """Return an SVG file as an `<svg>` element that is as wide as it may.

    Args:
        content (`bytes`): A file of Matplotlib.
        prefix (`str`): Begins each id, so no two elements of a page share one: letters, digits, "-" and "_".
        neutral (`str`): The colour, `"#rrggbb"` in lower case, that becomes that of the page's text.

    Raises:
        `ValueError`: if the prefix is none.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", prefix):
        raise ValueError(f"A prefix of ids starts with a letter and has letters, digits, - and _ only, got {prefix!r}.")
    root = ElementTree.fromstring(content)
    width, height = root.get("viewBox").split()[2:]
    for element in list(root.iter()):
        element.tag = element.tag.removeprefix(_SVG)
        for child in [child for child in element if child.tag.removeprefix(_SVG) in _DROPPED]:
            element.remove(child)
        element.tail = None
        if element.tag != "text":
            element.text = None
        element.attrib = _attributes(element.attrib, neutral)
    for group in root.iter("g"):
        _say_once(group)
    _rename_ids(root, prefix)
    root.attrib = {
        "xmlns": _SVG.strip("{}"),
        "viewBox": f"0 0 {_rounded(width)} {_rounded(height)}",
        "width": "100%",
        "style": f"max-width: {float(width) * 4 / 3:.0f}px; height: auto",  # 96 pixels of a page are 72 points
        "font-family": "system-ui, sans-serif",
        "fill": "currentColor",  # Matplotlib leaves out what is SVG's default: black
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(given: dict[str, str], neutral: str) -> dict[str, str]:
    """Return the attributes of an element, those of its style among them: a page's policy may forbid styles."""
    found = {}
    for name, value in given.items():
        if name == "style":
            found |= dict(part.strip().split(": ", 1) for part in value.split(";") if part.strip())
        else:
            found[name.removeprefix(_XLINK)] = value
    if font := found.pop("font", None):  # before Matplotlib 3.11
        found["font-size"] = re.search(r"[\d.]+px", font)[0]
    found.pop("font-family", None)  # the root has one for all
    found |= {name: "currentColor" for name, value in found.items() if value.lower() == neutral}
    found |= {name: _rounded(" ".join(value.split())) for name, value in found.items() if name in _NUMBERS}
    if found.get("transform", "").startswith("rotate(-0 "):
        del found["transform"]
    return found


def _rounded(text: str) -> str:
    """Return a text with its numbers to a hundredth of a point."""

    def number(match: re.Match) -> str:
        return f"{round(float(match[0]), 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # adding zero turns -0.0 to 0.0

    return re.sub(r"-?\d+\.\d+", number, text)


def _say_once(group: ElementTree.Element) -> None:
    """Move the look of markers that are all alike to their group."""
    looks = [{key: value for key, value in use.items() if key not in _OF_EACH_MARKER} for use in group]
    if looks and all(use.tag == "use" for use in group) and all(look == looks[0] for look in looks):
        group.attrib |= looks[0]
        for use in group:
            use.attrib = {name: use.get(name) for name in _OF_EACH_MARKER}


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Number the ids that something refers to, and remove the others."""
    names: dict[str, str] = {}
    for element in root.iter():
        for name, value in element.items():
            form = _REFERENCES.get(name)
            if form and (match := form.fullmatch(value)):
                new = names.setdefault(match[2], f"{prefix}-{len(names)}")
                element.set(name, f"{match[1]}{new}{match[3]}")
    for element in root.iter():
        if (old := element.attrib.pop("id", None)) in names:
            element.set("id", names[old])
