"""Parquet files with another footer, or other page headers, in which every length and offset fits again.

The footer and the headers are structures in Thrift's compact protocol: here a value is a list `[kind, content]`, and a
structure's content a list of `[field, value]`, so that any part can be replaced and written again.
"""

import random
import struct
from typing import Any

from tests.helpers.file_mutations import NUMBERS, mutated_bytes

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
WHOLE = (I16, I32, I64)
MAGIC = b"PAR1"


class Reader:
    """Reads values of the compact protocol from bytes, from a place on."""

    def __init__(self, data: bytes, at: int = 0):
        self.data, self.at = data, at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def zigzag(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def value(self, kind: int) -> list:
        if kind in (TRUE, FALSE, BYTE):
            return [kind, self.byte() if kind == BYTE else kind == TRUE]
        if kind in WHOLE:
            return [kind, self.zigzag()]
        if kind in (DOUBLE, BINARY):
            size = 8 if kind == DOUBLE else self.varint()
            self.at += size
            return [kind, self.data[self.at - size : self.at]]
        if kind == STRUCT:
            return [kind, self.fields()]
        if kind not in (LIST, SET):
            raise ValueError(f"a value of kind {kind}")
        head = self.byte()
        count, of = (self.varint() if head >> 4 == 15 else head >> 4), head & 15
        return [kind, [[of, self.byte() == 1] if of in (TRUE, FALSE) else self.value(of) for _ in range(count)]]

    def fields(self) -> list:
        found, number = [], 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            found.append([number, self.value(head & 15)])
        return found


def varint(value: int) -> bytes:
    value, found = value % 2**64, bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def written(value: list) -> bytes:
    """Return the bytes of a value."""
    kind, content = value
    if kind in (TRUE, FALSE):
        return b""
    if kind == BYTE:
        return bytes([content])
    if kind in WHOLE:
        return zigzag(content)
    if kind == DOUBLE:
        return content
    if kind == BINARY:
        return varint(len(content)) + content
    if kind == STRUCT:
        found, last = b"", 0
        for number, part in content:
            step = number - last
            head = bytes([step << 4 | part[0]]) if 0 < step < 16 else bytes([part[0]]) + zigzag(number)
            found, last = found + head + written(part), number
        return found + b"\0"
    of = content[0][0] if content else BYTE
    head = bytes([len(content) << 4 | of]) if len(content) < 15 else bytes([0xF0 | of]) + varint(len(content))
    return head + b"".join(bytes([1 if part[1] else 2]) if of in (TRUE, FALSE) else written(part) for part in content)


def footer_of(content: bytes) -> list:
    """Return the metadata of a Parquet file as a value."""
    size = int.from_bytes(content[-8:-4], "little")
    return Reader(content, len(content) - 8 - size).value(STRUCT)


def with_footer(content: bytes, footer: list) -> bytes:
    """Return the file with another footer, whose length stands behind it."""
    size, tail = int.from_bytes(content[-8:-4], "little"), written(footer)
    return content[: len(content) - 8 - size] + tail + len(tail).to_bytes(4, "little") + MAGIC


def field(value: list, *numbers: int) -> list | None:
    """Return the value at a path of field numbers of structures, `None` where there is none."""
    for number in numbers:
        value = next((part for found, part in value[1] if found == number), None)
        if value is None:
            return None
    return value


def _values(value: list) -> list[list]:
    found, waiting = [], [value]
    while waiting:
        node = waiting.pop()
        found.append(node)
        if node[0] == STRUCT:
            waiting += [part for _, part in node[1]]
        elif node[0] in (LIST, SET):
            waiting += node[1]
    return found


def mutate(rng: random.Random, value: list, times: int) -> None:
    """Change some values of a structure in place: numbers, texts, fields that go, come twice or get another number."""
    for _ in range(times):
        node = rng.choice(_values(value))
        if node[0] in WHOLE:
            node[1] = rng.choice([*NUMBERS, node[1] + 1, node[1] - 1, 2 * node[1], rng.randrange(16)])
        elif node[0] == BINARY:
            node[1] = rng.choice([b"", b"kl", b"prompt", b"x" * 100_000, mutated_bytes(rng, node[1])])
        elif node[0] == DOUBLE:
            node[1] = struct.pack("<d", rng.choice([0.0, 1e308, float("nan")]))
        elif node[0] == BYTE:
            node[1] = rng.randrange(256)
        elif node[0] in (TRUE, FALSE):
            node[0], node[1] = (FALSE, False) if node[0] == TRUE else (TRUE, True)
        elif node[1]:
            place = rng.randrange(len(node[1]))
            if rng.random() < 0.5:
                del node[1][place]
            elif node[0] == STRUCT and rng.random() < 0.3:
                node[1][place] = [rng.randrange(1, 14), node[1][place][1]]
            else:
                node[1].insert(rng.randrange(len(node[1]) + 1), node[1][place])


def pages_of(content: bytes, footer: list) -> list[tuple[int, int, list]]:
    """Return (start, end of the header, header) of every page."""
    found = []
    for group in field(footer, 4)[1]:
        for chunk in field(group, 1)[1]:
            about: Any = field(chunk, 3)
            starts = [part[1] for number in (11, 9) if (part := field(about, number))]
            at, end = min(starts), min(starts) + field(about, 7)[1]
            while at < end:
                reader = Reader(content, at)
                header = reader.value(STRUCT)
                found.append((at, reader.at, header))
                at = reader.at + field(header, 3)[1]
    return found


def with_page(content: bytes, page: tuple[int, int, list], body: bytes | None = None) -> bytes:
    """Return the file with another header (and body) of a page, and all places behind it moved."""
    start, end, header = page
    footer = footer_of(content)
    size = field(Reader(content, start).value(STRUCT), 3)[1]
    old = content[end : end + size]
    new = written(header) + (old if body is None else body)
    moved = len(new) - (end - start) - size
    for group in field(footer, 4)[1]:
        offsets = [field(group, 5)]
        for chunk in field(group, 1)[1]:
            about = field(chunk, 3)
            places = [field(about, number) for number in (9, 11)]
            first = min(part[1] for part in places if part)
            if first <= start < first + field(about, 7)[1]:
                field(about, 7)[1] += moved
            offsets += [*places, field(chunk, 2)]
        for part in offsets:
            if part is not None and part[1] > start:
                part[1] += moved
    return with_footer(content[:start] + new + content[end + size :], footer)


def mutated_parquet(rng: random.Random, content: bytes) -> bytes:
    """Return a Parquet file with damaged bytes, another footer, another page header or another page."""
    kind = rng.choice(["bytes", "footer", "footer", "header", "header", "body", "body"])
    if kind == "bytes":
        return mutated_bytes(rng, content)
    footer = footer_of(content)
    if kind == "footer":
        mutate(rng, footer, rng.choice([1, 1, 2, 4]))
        return with_footer(content, footer)
    start, end, header = rng.choice(pages_of(content, footer))
    if kind == "header":
        mutate(rng, header, rng.choice([1, 1, 2]))
        return with_page(content, (start, end, header))
    body = mutated_bytes(rng, content[end : end + field(header, 3)[1]])
    field(header, 3)[1] = len(body)
    if field(footer, 4)[1] and rng.random() < 0.7:  # so that a page without compression is read to its end
        field(header, 2)[1] = len(body)
    return with_page(content, (start, end, header), body)
