"""Single rollouts out of a Parquet file: where the rows of each lie, and its columns, read without the others.

For `rollout_samples.parquet`, and for `occurrences.parquet`, which has some of the same columns and no steps. Both come
from outside.
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
    """Place of a rollout in a file.

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
    """Return the rollouts of a file, in its order.

    Args:
        path (`Path`): The file.
        by_step (`bool`): Whether its rows have a `step`, in which rollouts are counted.

    Raises:
        `ValueError`: for a file that is none, cut or newer, or whose rollouts do not stand together.
        `OSError`: if there is no such file.
    """
    file = open_parquet(path)
    read_metadata(path, file.schema_arrow, version=VERSION)
    keys = ["step", "rollout"] if by_step else ["rollout"]
    _require_columns(path, file.schema_arrow, [*keys, "position", "token_id", "kl"])

    found: list[tuple[int, ...]] = []
    starts: list[int] = []
    rows = 0
    last = np.full((1, len(keys)), -1)
    for batch in read_batches(path, file, keys):
        columns = [_whole_numbers(path, name, batch.column(name), first_row=rows) for name in keys]
        values = np.concatenate([last, np.stack(columns, axis=1)])
        changed = np.flatnonzero((values[1:] != values[:-1]).any(axis=1))
        found += [tuple(key) for key in values[1:][changed].tolist()]
        starts += (rows + changed).tolist()
        last = values[-1:]
        rows += batch.num_rows
    if len(set(found)) < len(found):
        raise ValueError(f"{path}: the rows of a rollout do not stand together.")

    spans = []
    for key, (first, end) in zip(found, pairwise([*starts, rows]), strict=True):
        step = key[0] if by_step else 0
        spans.append(Span(step=step, rollout=key[-1], first=first, end=end))
    return spans


def read_rollout(path: Path, span: Span, names: Sequence[str], *, most_tokens: int) -> dict[str, np.ndarray]:
    """Return columns of a rollout, those of its first tokens only: `(n,)`, of lists `(n, 5)`; NaN for null.

    Args:
        path (`Path`): The file.
        span (`Span`): Where the rollout lies in it.
        names (`Sequence[str]`): Columns of numbers, and of lists; `prompt`, if any, and `token_id` are always there.
        most_tokens (`int`): Tokens that are read at most.

    Raises:
        `ValueError`: for a file that is cut, or with values that cannot be.
    """
    file = open_parquet(path)
    has_prompt = "prompt" in file.schema_arrow.names
    wanted = (["prompt", "token_id"] if has_prompt else ["token_id"]) + list(names)
    _require_columns(path, file.schema_arrow, wanted)
    end = min(span.end, span.first + most_tokens)
    table = _read_rows(path, file, wanted, span.first, end)
    found = {}
    for name in wanted:
        column = table.column(name)
        if name in LISTS:
            found[name] = _read_lists(path, name, column, first_row=span.first)
        elif name in WHOLE_NUMBERS:
            found[name] = _whole_numbers(path, name, column, first_row=span.first)
        else:
            found[name] = _numbers(path, name, column, first_row=span.first)
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
    """Return rows of a file, for which no other row groups are read, and a part of those at a time."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    edges = list(pairwise(accumulate(sizes, initial=0)))
    groups = [group for group, (start, stop) in enumerate(edges) if start < end and first < stop]
    place = edges[groups[0]][0] if groups else end
    parts = []
    for batch in read_batches(path, file, names, row_groups=groups):
        skipped = max(first - place, 0)
        wanted = max(end - max(first, place), 0)
        parts.append(batch.slice(skipped, wanted))
        place += batch.num_rows
        if place >= end:
            break
    if sum(part.num_rows for part in parts) != end - first:
        raise ValueError(f"{path} is damaged: its row groups do not hold as many rows as they say.")
    return pa.Table.from_batches(parts)


def _read_lists(path: Path, name: str, column: pa.ChunkedArray, *, first_row: int) -> np.ndarray:
    """Return the values of a column of lists, `(n, 5)`."""
    if (place := first_null(column)) is not None:
        raise ValueError(f"{path}: row {first_row + place} has no {name}.")
    values = column.combine_chunks().flatten()
    read = _whole_numbers if name in WHOLE_NUMBERS else _numbers
    return read(path, name, values, first_row=first_row, per_row=TOP).reshape(-1, TOP)


def _whole_numbers(
    path: Path, name: str, column: pa.Array | pa.ChunkedArray, *, first_row: int, per_row: int = 1
) -> np.ndarray:
    limit = MAX_VOCABULARY if name == "token_id" or name in TOP_IDS else 2**31
    return whole_numbers(path, name, column, limit=limit, first_row=first_row, per_row=per_row)


def _numbers(
    path: Path, name: str, column: pa.Array | pa.ChunkedArray, *, first_row: int, per_row: int = 1
) -> np.ndarray:
    """Return the values of a column of numbers, float64, NaN for null."""
    values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
    infinite = np.isinf(values)
    if infinite.any():
        row = first_row + int(np.argmax(infinite)) // per_row
        raise ValueError(f"{path}: row {row} has a {name} that is not finite.")
    return values
