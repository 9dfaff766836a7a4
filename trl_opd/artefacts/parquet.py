"""Parquet files that come from outside: opened with care, read in batches, and checked column by column.

Damage, and what unfolds far beyond its size, is an error before anything is read. For that the structures of a file are
read here: pyarrow believes the sizes in its pages and footer, and ends the process at metadata that are damaged.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Key of what a file of this package says of itself, as JSON.
METADATA_KEY = "trl_opd"
# Rows that a reader has in memory at once.
BATCH_ROWS = 32_768
# A Parquet file may unfold to this many bytes, and to so many times its size: what was measured is a few times smaller
# in a file, and a kilobyte of equal values can be a gigabyte of memory.
MOST_UNFOLDED, MOST_TIMES = 2**28, 64
# Kinds of values in Thrift's compact protocol.
I32, I64, LIST, STRUCT = 5, 6, 9, 12

Structure = dict[tuple[int, int], Any]


def open_parquet(path: str | os.PathLike, **options: Any) -> pq.ParquetFile:
    """Return a Parquet file that comes from outside; nothing of it is read yet but what it says of itself.

    Args:
        path (`str` or `os.PathLike`): The file.
        options: Of `pyarrow.parquet.ParquetFile`.

    Raises:
        `ValueError`: if it is no whole Parquet file, or would take far more memory than its size lets expect.
        `OSError`: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        # By default Arrow would hold the whole file, compressed, beside what is decoded of it.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**16, **options)
        file.schema_arrow.names  # noqa: B018  the schema that Arrow keeps beside Parquet's is read here
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from error
    try:
        unfolded = _unfolded_bytes(path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is cut or damaged: {_reason(error)}") from error
    if unfolded > max(MOST_UNFOLDED, MOST_TIMES * path.stat().st_size):
        raise ValueError(
            f"{path} would unfold from {path.stat().st_size} bytes to {unfolded}: no measurement repeats itself so "
            "often, and it is not read."
        )
    return file


def with_metadata(schema: pa.Schema, metadata: Mapping[str, Any], *, version: int) -> pa.Schema:
    """Return a schema with what its file says of itself, and with the version of its format."""
    content = {"version": version} | dict(metadata)
    return schema.with_metadata({METADATA_KEY: json.dumps(content, allow_nan=False)})


def read_metadata(path: Path, schema: pa.Schema, *, version: int) -> dict[str, Any]:
    """Return what a file says of itself; empty when another program wrote it.

    Args:
        path (`Path`): The file, for errors.
        schema (`pyarrow.Schema`): Its schema.
        version (`int`): The newest version of its format that is known.

    Raises:
        `ValueError`: if it is no JSON object, or of a newer version.
    """
    text = (schema.metadata or {}).get(METADATA_KEY.encode())
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata {METADATA_KEY!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its metadata {METADATA_KEY!r} is not an object.")
    found = content.get("version", version)
    if not isinstance(found, int) or found > version:
        raise ValueError(f"{path} has version {found!r:.40}, and this trl_opd reads up to {version}: upgrade it.")
    return content


def column_type(path: Path, schema: pa.Schema, name: str) -> pa.DataType:
    """Return the type of the one column of a name.

    Raises:
        `ValueError`: if there is none, or more than one.
    """
    count = schema.names.count(name)
    if count == 1:
        return schema.field(name).type
    found = "it stands there twice" if count else f"it has {', '.join(schema.names) or 'none':.200}"
    raise ValueError(f"{path}: there must be one column {name!r}, {found}.")


def require_whole_type(path: Path, name: str, found: pa.DataType) -> None:
    """Raise `ValueError` unless the type of a column is one of whole numbers."""
    if not pa.types.is_integer(found):
        raise ValueError(f"{path}: column {name!r} holds {found}, not whole numbers.")


def require_float_type(path: Path, name: str, found: pa.DataType) -> None:
    """Raise `ValueError` unless the type of a column is one of floating-point numbers."""
    if not pa.types.is_floating(found):
        raise ValueError(f"{path}: column {name!r} holds {found}, not floating-point numbers.")


def read_table(path: Path, file: pq.ParquetFile, names: Sequence[str]) -> pa.Table:
    """Return columns of a file as a whole.

    Raises:
        `ValueError`: if it is cut or damaged.
    """
    try:
        table = file.read(list(names), use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is cut or damaged: {error}") from error
    return table


def read_batches(
    path: Path, file: pq.ParquetFile, names: Sequence[str], *, row_groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield columns of a file in batches of rows, of some of its row groups where these are given.

    Raises:
        `ValueError`: if it is cut or damaged.
    """
    try:
        yield from file.iter_batches(BATCH_ROWS, row_groups=row_groups, columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is cut or damaged: {error}") from error


def first_null(column: pa.Array | pa.ChunkedArray) -> int | None:
    """Return the place of the first null of a column, `None` without one."""
    if not column.null_count:
        return None
    is_known = np.asarray(column.is_valid().to_numpy(zero_copy_only=False))
    return int(np.argmin(is_known))


def whole_numbers(
    path: Path, name: str, column: pa.Array | pa.ChunkedArray, *, limit: int, first_row: int = 0, per_row: int = 1
) -> np.ndarray:
    """Return the values of a column of whole numbers, int32, shape `(n,)`.

    Args:
        path (`Path`): The file, for errors.
        name (`str`): The column, for errors.
        column (`pyarrow.Array` or `pyarrow.ChunkedArray`): Some of its values, in order.
        limit (`int`): Above every value, at most 2**31; the least is 0.
        first_row (`int`, *optional*, defaults to `0`): Row of the first value in the file.
        per_row (`int`, *optional*, defaults to `1`): Values of a row, for a column of lists.

    Raises:
        `ValueError`: naming the row (counted from 0) for a null, and for a value outside of 0..limit - 1.
    """
    if (place := first_null(column)) is not None:
        raise ValueError(f"{path}: row {first_row + place // per_row} has no {name}.")
    values = np.asarray(column.to_numpy(zero_copy_only=False))
    wrong = (values < 0) | (values >= limit)
    if wrong.any():
        place = int(np.argmax(wrong))
        row = first_row + place // per_row
        raise ValueError(f"{path}: row {row} has {name} {values[place]}, outside of 0..{limit - 1}.")
    return values.astype(np.int32, copy=False)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (OSError, ValueError)) else "its structures cannot be read"


def _unfolded_bytes(path: Path) -> int:
    """Return what all pages of a file take in memory, at least 4 bytes for a value, whatever its footer says.

    Reads the footer itself: pyarrow ends the process when it is asked for the metadata of a column that are damaged.
    """
    total = rows = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        footer, _ = _structure(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
        for group in footer[4, LIST]:
            for column in group[1, LIST]:
                values, size = _pages(data, column[3, STRUCT])
                if values < group[3, I64]:
                    raise ValueError("a column has fewer values than there are rows")
                total += size
            rows += group[3, I64]
    if rows != footer[3, I64]:
        raise ValueError("its row groups do not hold as many rows as it says")
    return total


def _pages(data: mmap.mmap, column: Structure) -> tuple[int, int]:
    """Return the number of values in the pages of a column, and what they take in memory."""
    at, dictionary = column[9, I64], column.get((11, I64), 0)
    at = dictionary if 0 < dictionary < at else at
    values = total = 0
    while values < column[5, I64]:  # Arrow reads no further
        page, at = _structure(data, at)
        # A page of data, a dictionary, or a page of data in version 2; any other is skipped.
        kind = page[1, I32]
        count = page[{0: 5, 2: 7, 3: 8}[kind], STRUCT][1, I32] if kind in (0, 2, 3) else 0
        if page[2, I32] < 0 or not 0 <= page[3, I32] <= len(data) - at or count < 0:
            raise ValueError("a page has a size that cannot be")  # Arrow would make room for it first
        total += max(page[2, I32], 4 * count)
        values += count if kind != 2 else 0
        at += page[3, I32]
    return values, total


def _structure(data: mmap.mmap, at: int, depth: int = 0) -> tuple[Structure, int]:
    """Return the fields of a structure in Thrift's compact protocol by number and kind, and where it ends."""
    found: Structure = {}
    number = 0
    if depth > 16 or at < 0:
        raise ValueError("its structures cannot be read")
    while head := data[at]:
        kind, at = head & 15, at + 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _whole(data, at)
        # The value of a truth is its kind.
        found[number, kind], at = (None, at) if kind in (1, 2) else _value(data, at, kind, depth)
    return found, at + 1


def _value(data: mmap.mmap, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """Return a value, where it is a whole number, a list or a structure, and where it ends."""
    if kind in (4, I32, I64):
        return _whole(data, at)
    if kind in (1, 2, 3):
        return None, at + 1
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _varint(data, at)
        return None, at + size
    if kind == STRUCT:
        return _structure(data, at, depth + 1)
    if kind != LIST:
        raise ValueError("its structures cannot be read")
    count, of, at = data[at] >> 4, data[at] & 15, at + 1
    if count == 15:
        count, at = _varint(data, at)
    found = []
    for _ in range(count):
        value, at = _value(data, at, of, depth + 1)
        found.append(value)
    return found, at


def _whole(data: mmap.mmap, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("its structures cannot be read")
