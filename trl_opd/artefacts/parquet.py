"""Parquet files that a user passes in: opened with limits on their size, read in batches, checked column by column.

pyarrow detects damage, and its errors become one `ValueError` that names the file. A file that somebody crafted on
purpose can state false sizes in its footer, or make pyarrow end the process; we accept that, because users open their
own files here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Key of the metadata that this package writes to its files, as JSON.
METADATA_KEY = "trl_opd"
# Number of rows that a reader has in memory at once.
BATCH_ROWS = 32_768
# Largest file that is opened: about a billion measured tokens of 16 bytes each.
MAX_FILE_BYTES = 16 * 2**30
# Largest size in memory, in bytes and in multiples of the size on disk; the larger of the two counts. Measured values
# shrink to a fraction when compressed, whereas a kilobyte of equal values can take a gigabyte of memory.
MOST_UNFOLDED = 2**28
MOST_TIMES = 64


def open_parquet(path: str | os.PathLike, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file that a user passes in, and read only its footer.

    Args:
        path (`str` or `os.PathLike`): The file.
        options: Further arguments of `pyarrow.parquet.ParquetFile`.

    Raises:
        `ValueError`: if pyarrow cannot read the footer, if the file is larger than `MAX_FILE_BYTES`, or if its footer
            states far more values than a file of that size should hold.
        `OSError`: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are read. Split it into smaller files.")

    try:
        # By default Arrow would keep the whole compressed file in memory, in addition to the decoded part.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**16, **options)
        file.schema_arrow.names  # noqa: B018  Arrow decodes its own copy of the schema on this access
        unfolded = _unfolded_bytes(file.metadata)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a complete Parquet file: {error}") from error

    if unfolded > max(MOST_UNFOLDED, MOST_TIMES * size):
        raise ValueError(
            f"{path} has {size} bytes on disk and would take {unfolded} in memory. Measured values never compress "
            "that well, so it is not read; write the file again from its source."
        )
    return file


def with_metadata(schema: pa.Schema, metadata: Mapping[str, Any], *, version: int) -> pa.Schema:
    """Return a schema with the metadata that its file has about itself, and with the version of its format."""
    content = {"version": version} | dict(metadata)
    return schema.with_metadata({METADATA_KEY: json.dumps(content, allow_nan=False)})


def read_metadata(path: Path, schema: pa.Schema, *, version: int) -> dict[str, Any]:
    """Return the metadata that a file has about itself; empty if another program wrote it.

    Args:
        path (`Path`): The file, for errors.
        schema (`pyarrow.Schema`): Its schema.
        version (`int`): The newest version of its format that we can read.

    Raises:
        `ValueError`: if the metadata is not a JSON object, or has a newer version.
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
        raise ValueError(
            f"{path} has version {found!r:.40}, and this trl_opd reads up to version {version}: upgrade trl_opd."
        )
    return content


def column_type(path: Path, schema: pa.Schema, name: str) -> pa.DataType:
    """Return the type of the column with a name.

    Raises:
        `ValueError`: if there is no such column, or more than one.
    """
    count = schema.names.count(name)
    if count == 1:
        return schema.field(name).type
    found = "there are several" if count else f"it has {', '.join(schema.names) or 'none':.200}"
    raise ValueError(f"{path}: there must be one column {name!r}, {found}.")


def require_whole_type(path: Path, name: str, found: pa.DataType) -> None:
    """Raise `ValueError` unless the type of a column is an integer type."""
    if not pa.types.is_integer(found):
        raise ValueError(f"{path}: column {name!r} holds {found}, not whole numbers.")


def require_float_type(path: Path, name: str, found: pa.DataType) -> None:
    """Raise `ValueError` unless the type of a column is a floating-point type."""
    if not pa.types.is_floating(found):
        raise ValueError(f"{path}: column {name!r} holds {found}, not floating-point numbers.")


def read_table(path: Path, file: pq.ParquetFile, names: Sequence[str]) -> pa.Table:
    """Return all rows of some columns of a file.

    Raises:
        `ValueError`: if the file is cut or damaged.
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
    """Yield some columns of a file in batches of rows, from all of its row groups or only from those given.

    Raises:
        `ValueError`: if the file is cut or damaged.
    """
    try:
        yield from file.iter_batches(BATCH_ROWS, row_groups=row_groups, columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is cut or damaged: {error}") from error


def first_null(column: pa.Array | pa.ChunkedArray) -> int | None:
    """Return the index of the first null in a column, or `None` if there is no null."""
    if not column.null_count:
        return None
    is_known = column.is_valid().to_numpy(zero_copy_only=False)
    return int(np.argmin(is_known))


def whole_numbers(
    path: Path, name: str, column: pa.Array | pa.ChunkedArray, *, limit: int, first_row: int = 0, per_row: int = 1
) -> np.ndarray:
    """Return the values of a column of whole numbers, int32, shape `(n,)`.

    Args:
        path (`Path`): The file, for errors.
        name (`str`): The column, for errors.
        column (`pyarrow.Array` or `pyarrow.ChunkedArray`): Consecutive values of the column.
        limit (`int`): Values must lie in 0..limit - 1; at most 2**31, so that they fit into int32.
        first_row (`int`, *optional*, defaults to `0`): Row in the file of the first value.
        per_row (`int`, *optional*, defaults to `1`): Number of values per row, for a column of lists.

    Raises:
        `ValueError`: naming the row (counted from 0) of a null or of a value outside of 0..limit - 1.
    """
    place = first_null(column)
    if place is not None:
        raise ValueError(f"{path}: row {first_row + place // per_row} has no {name}.")
    values = column.to_numpy(zero_copy_only=False)
    wrong = (values < 0) | (values >= limit)
    if wrong.any():
        place = int(np.argmax(wrong))
        row = first_row + place // per_row
        raise ValueError(f"{path}: row {row} has {name} {values[place]}, outside of 0..{limit - 1}.")
    return values.astype(np.int32, copy=False)


def _unfolded_bytes(metadata: pq.FileMetaData) -> int:
    """Return the bytes that a file takes in memory according to its footer, but at least 4 for each value.

    Only the metadata of row groups is used, because pyarrow ends the process at damaged metadata of a column.
    """
    stated = 0
    for index in range(metadata.num_row_groups):
        stated += metadata.row_group(index).total_byte_size
    return max(stated, 4 * metadata.num_rows * metadata.num_columns)
