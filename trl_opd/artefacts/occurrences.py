"""occurrences.parquet, a table with one row per generated token: writers, and a reader that checks the rows in batches.

A rollout "So 3" of prompt 0, whose second token was frozen and therefore not measured, gives two rows:

    rollout  position  token_id  kl    entropy  prompt  weight
    0        0         4416      0.71  1.25     0       1.0
    0        1         18        null  null     0       0.0
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .atomic import complete_file
from .parquet import (
    column_type,
    first_null,
    open_parquet,
    read_batches,
    read_metadata,
    read_table,
    require_float_type,
    require_whole_type,
    whole_numbers,
    with_metadata,
)

VERSION = 1
SCHEMA = pa.schema(
    [
        ("rollout", pa.int32()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("kl", pa.float32()),
        ("kl_pre", pa.float32()),
        ("entropy", pa.float32()),
        ("prompt", pa.int32()),
        ("weight", pa.float32()),
    ]
)
PROMPT_SCHEMA = pa.schema([("prompt", pa.int32()), ("token_ids", pa.list_(pa.int32())), ("row", pa.int64())])
# Columns that are read; a file may lack the optional ones.
REQUIRED = ("rollout", "position", "token_id", "kl")
OPTIONAL = ("kl_pre", "prompt")
# No tokenizer has this many tokens. The limit is needed because statistics of every token type are kept in memory.
MAX_VOCABULARY = 2**22
# A KL divergence is at least 0, but its float32 sum over a vocabulary may come out this far below 0.
LEAST_KL = -1e-4
# More tokens than the context of any model.
MOST_OF_A_PROMPT = 2**20
# Size of a data page: a reader has one page of each column in memory at once.
PAGE_BYTES = 2**17


class _Row(NamedTuple):
    """Keys of a row, with which the order of the rows is checked."""

    rollout: int
    position: int
    unit: int


def write_occurrences(path: str | os.PathLike, columns: Mapping[str, Sequence], metadata: dict[str, Any]) -> None:
    """Write occurrences to a file that appears under its name only when it is complete.

    Args:
        path (`str` or `os.PathLike`): The Parquet file.
        columns (`Mapping[str, Sequence]`):
            Columns of `SCHEMA`, with rows in the order of (rollout, position). NaN is written as null.
        metadata (`dict`): What the file says about itself: models, tokenizer, temperature and so on.
    """
    fields = [field for field in SCHEMA if field.name in columns]
    arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in fields]
    table = pa.Table.from_arrays(arrays, schema=with_metadata(pa.schema(fields), metadata, version=VERSION))
    with complete_file(path) as part:
        pq.write_table(table, part, compression="zstd", data_page_size=PAGE_BYTES)


def join_files(parts: Sequence[Path], path: str | os.PathLike, metadata: dict[str, Any] | None = None) -> None:
    """Write the rows of Parquet files of one schema to one file, with one part in memory at a time."""
    schema = pq.read_schema(parts[0])
    if metadata is not None:
        schema = with_metadata(schema, metadata, version=VERSION)
    with (
        complete_file(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", data_page_size=PAGE_BYTES) as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part).cast(schema))


def read_prompts(path: str | os.PathLike) -> Callable[[int], list[int] | None]:
    """Return a function that gives the token ids of a prompt from its index, `None` for an index that is not there.

    Raises:
        `ValueError`: if the file is not a table of prompts, or a prompt is longer than `MOST_OF_A_PROMPT`.
        `OSError`: if there is no such file.
    """
    path = Path(path)
    file = open_parquet(path)
    prompts = column_type(path, file.schema_arrow, "prompt")
    lists = column_type(path, file.schema_arrow, "token_ids")
    require_whole_type(path, "prompt", prompts)
    if not pa.types.is_list(lists) or not pa.types.is_integer(lists.value_type):
        raise ValueError(f"{path}: column 'token_ids' must hold lists of whole numbers, it holds {lists}.")

    table = read_table(path, file, ["prompt", "token_ids"])
    token_ids = table["token_ids"]
    longest = pc.max(pc.list_value_length(token_ids)).as_py() or 0
    if longest > MOST_OF_A_PROMPT:
        raise ValueError(f"{path} holds a prompt of {longest} tokens, at most {MOST_OF_A_PROMPT} are read.")
    places = {prompt: place for place, prompt in enumerate(table["prompt"].to_pylist())}

    def find_prompt(prompt: int) -> list[int] | None:
        place = places.get(prompt)
        return None if place is None else token_ids[place].as_py()

    return find_prompt


class Occurrences:
    """Reader of a file of occurrences: it checks the columns when it is created and the rows as they are read.

    Args:
        path (`str` or `os.PathLike`): The Parquet file, which another program may have written.

    Attributes:
        metadata (`dict`): What the file says about itself; empty if another program wrote it.
        has_pre (`bool`): Whether it holds `kl_pre`, the divergence under the reference student.
        rows (`int`): Number of rows.

    Raises:
        `ValueError`: if it is not a Parquet file, has no rows, or a column is missing or has another type.
        `OSError`: if there is no such file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = open_parquet(self.path)
        schema = self._file.schema_arrow
        self._names = list(REQUIRED)
        self._names += [name for name in OPTIONAL if name in schema.names]
        self._check_columns(schema)
        self.metadata = read_metadata(self.path, schema, version=VERSION)
        self.rows = self._file.metadata.num_rows
        if self.rows == 0:
            raise ValueError(f"{path} has no rows.")
        self.has_pre = "kl_pre" in self._names
        self._has_prompt = "prompt" in self._names

    def units(self) -> np.ndarray:
        """Return the distinct values of `prompt` (of `rollout` where absent) in ascending order."""
        found = np.empty(0, dtype=np.int64)
        name = "prompt" if self._has_prompt else "rollout"
        for batch in self._raw_batches([name]):
            found = np.union1d(found, self._whole_numbers(batch, name, 0))
        return found

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the checked rows in batches, as columns: `rollout`, `position`, `token_id`, `unit`, `kl`.

        `unit` is the prompt, or the rollout in a file without prompts. `kl_pre` is there if the file has it.

        Raises:
            `ValueError`: naming the row (counted from 0) for a null, a negative id, a divergence that is negative or
                not finite, rows out of order, or a rollout with two prompts.
        """
        first = 0
        last = _Row(rollout=-1, position=-1, unit=-1)
        for batch in self._raw_batches(self._names):
            rows = {name: self._whole_numbers(batch, name, first) for name in ("rollout", "position", "token_id")}
            rows["unit"] = self._whole_numbers(batch, "prompt", first) if self._has_prompt else rows["rollout"]
            rows["kl"] = self._divergences(batch, "kl", first)
            if self.has_pre:
                rows["kl_pre"] = self._divergences(batch, "kl_pre", first)
            last = self._check_order(rows, last, first)
            first += batch.num_rows
            yield rows

    def _raw_batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        rows = 0
        for batch in read_batches(self.path, self._file, names):
            rows += batch.num_rows
            yield batch
        if rows != self.rows:  # Arrow reports no error where a column ends too early
            raise ValueError(f"{self.path} is cut or damaged: {rows} of {self.rows} rows can be read.")

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in self._names:
            found = column_type(self.path, schema, name)
            if name.startswith("kl"):
                require_float_type(self.path, name, found)
            else:
                require_whole_type(self.path, name, found)

    def _whole_numbers(self, batch: pa.RecordBatch, name: str, first: int) -> np.ndarray:
        limit = MAX_VOCABULARY if name == "token_id" else 2**31
        return whole_numbers(self.path, name, batch.column(name), limit=limit, first_row=first)

    def _divergences(self, batch: pa.RecordBatch, name: str, first: int) -> np.ndarray:
        column = batch.column(name)
        place = first_null(column)
        if place is not None:
            raise ValueError(
                f"{self.path}: row {first + place} has no {name}: the position was not measured (frozen in training?). "
                "Collect the rollouts with `trl-opd collect`."
            )
        values = column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        wrong = ~((values >= LEAST_KL) & (values < np.inf))  # NaN fails both comparisons
        if wrong.any():
            place = int(np.argmax(wrong))
            raise ValueError(
                f"{self.path}: row {first + place} has {name} {values[place]}, but a divergence is finite and at "
                "least 0."
            )
        return values

    def _check_order(self, rows: dict[str, np.ndarray], last: _Row, first: int) -> _Row:
        """Check that (rollout, position) rises from row to row and that every rollout has one prompt.

        Args:
            rows (`dict[str, np.ndarray]`): Columns of a batch.
            last (`_Row`): The row before this batch.
            first (`int`): Number of the first row of this batch in the file.

        Raises:
            `ValueError`: naming the first row that breaks the order.
        """
        rollout = rows["rollout"]
        position = rows["position"]
        unit = rows["unit"]
        rollout_step = np.diff(rollout, prepend=last.rollout)
        position_step = np.diff(position, prepend=last.position)
        unit_step = np.diff(unit, prepend=last.unit)

        same = rollout_step == 0
        wrong = (rollout_step < 0) | (same & (position_step <= 0))
        if wrong.any():
            place = int(np.argmax(wrong))
            reason = "is out of order: rows go by (rollout, position)"
            if same[place] and position_step[place] == 0:
                reason = "occurs twice"
            raise ValueError(
                f"{self.path}: row {first + place} (rollout {rollout[place]}, position {position[place]}) {reason}."
            )

        moved = same & (unit_step != 0)
        if moved.any():
            place = int(np.argmax(moved))
            raise ValueError(
                f"{self.path}: row {first + place} has prompt {unit[place]}, but the row before it, of the same "
                f"rollout, has prompt {unit[place] - unit_step[place]}. A rollout belongs to one prompt."
            )
        return _Row(rollout=int(rollout[-1]), position=int(position[-1]), unit=int(unit[-1]))
