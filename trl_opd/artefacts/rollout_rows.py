"""Single rollouts of a Parquet file: where the rows of each are, and readers that read only those rows.

This module reads `rollout_samples.parquet` and `occurrences.parquet`, which has some of the same columns but no steps.
Both files may come from another program, so every value that is read is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .occurrences import MAX_VOCABULARY
from .parquet import (
    column_type,
    first_null,
    open_parquet,
    read_batches,
    read_metadata,
    require_float_type,
    require_whole_type,
    whole_numbers,
)
from .sampled_rollouts import LISTS, TOP, TOP_IDS, VERSION, WHOLE_NUMBERS


class Span(NamedTuple):
    """Rows of one rollout in a file.

    Args:
        step (`int`): Optimizer step that sampled it; 0 in a file without steps.
        rollout (`int`): Its index in that step, or in the file.
        first, end (`int`): Its first row, and the row after its last.
    """

    step: int
    rollout: int
    first: int
    end: int


def find_rollouts(path: Path, *, by_step: bool) -> list[Span]:
    """Return the rows of every rollout in a file, in the order of the file.

    Args:
        path (`Path`): The file.
        by_step (`bool`): Whether the file has a column `step`; its rollouts are then numbered within each step.

    Raises:
        `ValueError`: if the file is cut, is of a newer version, lacks a column, or if the rows of a rollout are not
            next to each other.
        `OSError`: if there is no such file.
    """
    file = open_parquet(path)
    read_metadata(path, file.schema_arrow, version=VERSION)
    keys = ["step", "rollout"] if by_step else ["rollout"]
    _require_columns(path, file.schema_arrow, [*keys, "position", "token_id", "kl"])

    found: list[tuple[int, ...]] = []  # (step, rollout) or (rollout,) of each rollout
    starts: list[int] = []
    rows = 0
    last = np.full((1, len(keys)), -1)
    for batch in read_batches(path, file, keys):
        columns = [_whole_numbers(path, name, batch.column(name), first_row=rows) for name in keys]
        values = np.stack(columns, axis=1)
        changed = np.flatnonzero(np.diff(values, axis=0, prepend=last).any(axis=1))
        found += map(tuple, values[changed].tolist())
        starts += (rows + changed).tolist()
        last = values[-1:]
        rows += batch.num_rows
    if len(set(found)) < len(found):
        raise ValueError(
            f"{path}: the rows of a rollout are not next to each other. Sort them by {', '.join(keys)} and position."
        )

    spans = []
    starts.append(rows)
    for key, (first, end) in zip(found, pairwise(starts), strict=True):
        step = key[0] if by_step else 0
        spans.append(Span(step=step, rollout=key[-1], first=first, end=end))
    return spans


def read_rollout(path: Path, span: Span, names: Sequence[str], *, most_tokens: int) -> dict[str, np.ndarray]:
    """Return columns of the first tokens of a rollout: `(n,)`, for columns of lists `(n, 5)`; NaN for null.

    Args:
        path (`Path`): The file.
        span (`Span`): Rows of the rollout.
        names (`Sequence[str]`): Columns to read besides `token_id` and, if the file has it, `prompt`.
        most_tokens (`int`): Largest number of tokens to read.

    Raises:
        `ValueError`: if the file is cut, lacks a column, or holds a value that is impossible.
    """
    file = open_parquet(path)
    wanted = ["token_id", *names]
    if "prompt" in file.schema_arrow.names:
        wanted.insert(0, "prompt")
    _require_columns(path, file.schema_arrow, wanted)
    end = min(span.end, span.first + most_tokens)
    table = _read_rows(path, file, wanted, span.first, end)
    found = {}
    for name in wanted:
        column = table[name]
        if name in LISTS:
            found[name] = _read_lists(path, name, column, first_row=span.first)
        else:
            found[name] = _read_numbers(path, name, column, first_row=span.first)
    return found


def _require_columns(path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    for name in names:
        found = column_type(path, schema, name)
        if name in LISTS:
            if not pa.types.is_fixed_size_list(found) or found.list_size != TOP:
                raise ValueError(f"{path}: column {name!r} must be lists of {TOP}, it is {found}.")
            found = found.value_type
        if name in WHOLE_NUMBERS:
            require_whole_type(path, name, found)
        else:
            require_float_type(path, name, found)


def _read_rows(path: Path, file: pq.ParquetFile, names: Sequence[str], first: int, end: int) -> pa.Table:
    """Return the rows `first` to `end - 1` of a file, from the row groups that hold them, read batch by batch."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    edges = list(accumulate(sizes, initial=0))
    groups = [group for group, (start, stop) in enumerate(pairwise(edges)) if start < end and first < stop]
    place = edges[groups[0]] if groups else end  # row of the file with which the next batch begins
    parts = []
    for batch in read_batches(path, file, names, row_groups=groups):
        skipped = max(first - place, 0)
        parts.append(batch.slice(skipped, end - place - skipped))
        place += batch.num_rows
        if place >= end:
            break
    if sum(part.num_rows for part in parts) != end - first:
        raise ValueError(f"{path} is damaged: its row groups do not hold as many rows as they state.")
    return pa.Table.from_batches(parts)


def _read_lists(path: Path, name: str, column: pa.ChunkedArray, *, first_row: int) -> np.ndarray:
    """Return the values of a column of lists, `(n, 5)`."""
    place = first_null(column)
    if place is not None:
        raise ValueError(f"{path}: row {first_row + place} has no {name}.")
    values = column.combine_chunks().flatten()
    return _read_numbers(path, name, values, first_row=first_row, per_row=TOP).reshape(-1, TOP)


def _read_numbers(
    path: Path, name: str, column: pa.Array | pa.ChunkedArray, *, first_row: int, per_row: int = 1
) -> np.ndarray:
    """Return the values of a column: int32 for a column of whole numbers, otherwise float64 with NaN for null."""
    if name in WHOLE_NUMBERS:
        return _whole_numbers(path, name, column, first_row=first_row, per_row=per_row)
    values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
    infinite = np.isinf(values)
    if infinite.any():
        row = first_row + int(np.argmax(infinite)) // per_row
        raise ValueError(f"{path}: row {row} has a {name} that is not finite.")
    return values


def _whole_numbers(
    path: Path, name: str, column: pa.Array | pa.ChunkedArray, *, first_row: int, per_row: int = 1
) -> np.ndarray:
    limit = MAX_VOCABULARY if name == "token_id" or name in TOP_IDS else 2**31
    return whole_numbers(path, name, column, limit=limit, first_row=first_row, per_row=per_row)
