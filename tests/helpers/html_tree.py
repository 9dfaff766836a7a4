"""Reads a page or an SVG as a tree of elements, the way that the tests look at HTML."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br"}


class Element:
    """An element of a page with what is inside it.

    Args:
        tag (`str`): Name of the element in lower case, "" for the whole page.
        attributes (`dict[str, str | None]`): Its attributes.
    """

    def __init__(self, tag: str, attributes: dict[str, str | None]):
        self.tag = tag
        self.attributes = attributes
        self.children: list[Element | str] = []

    def __iter__(self) -> Iterator[Element]:
        """Yield every element inside this one, in document order."""
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    def all(self, *tags: str) -> list[Element]:
        """Return the elements inside this one that have one of the tags, in document order."""
        return [element for element in self if element.tag in tags]

    @property
    def text(self) -> str:
        """All text inside this element."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Html(HTMLParser):
    """A page or an SVG as a tree.

    Args:
        page (`str`): Its text.
    """

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.faults: list[str] = []  # comments, and tags that are closed without being open or never closed
        self._open = [self.root]
        self.feed(page)
        self.close()
        self.faults += [element.tag for element in self._open[1:]]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        if self._open[-1].tag == tag:
            self._open.pop()
        else:
            self.faults.append(tag)

    def handle_data(self, data):
        self._open[-1].children.append(data)

    def handle_comment(self, data):
        self.faults.append(data)
