"""occurrences.parquet: one row per generated token, written from part files and read back in checked batches.

A rollout "So 3" of prompt 0 whose second token was frozen, and so not measured, gives two rows:

    rollout  position  token_id  kl    entropy  prompt  weight
    0        0         4416      0.71  1.25     0       1.0
    0        1         18        null  null     0       0.0
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
REQUIRED, OPTIONAL = ("rollout", "position", "token_id", "kl"), ("kl_pre", "prompt")
# No tokenizer has this many tokens; statistics of every type are kept in memory.
MAX_VOCABULARY = 2**22
# KL is at least 0; float32 sums over a vocabulary may fall this far below.
LEAST_KL = -1e-4
# Above the context of every model.
MOST_OF_A_PROMPT = 2**20
# Bytes that a reader has in memory at once, of each column.
PAGE_BYTES = 2**17


def write_occurrences(path: str | os.PathLike, columns: Mapping[str, Sequence], metadata: dict[str, Any]) -> None:
    """Write occurrences to a file that appears under its name only when it is complete.

    Args:
        path (`str` or `os.PathLike`): The Parquet file.
        columns (`Mapping[str, Sequence]`): Columns of the format, in the order of (rollout, position); NaN is null.
        metadata (`dict`): What FORMATS of the project lists: models, tokenizer, temperature and so on.
    """
    fields = [field for field in SCHEMA if field.name in columns]
    arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in fields]
    table = pa.Table.from_arrays(arrays, schema=with_metadata(pa.schema(fields), metadata, version=VERSION))
    with complete_file(path) as part:
        pq.write_table(table, part, compression="zstd", data_page_size=PAGE_BYTES)


def join_files(parts: Sequence[Path], path: str | os.PathLike, metadata: dict[str, Any] | None = None) -> None:
    """Write the rows of Parquet files of one schema to one file, a part at a time."""
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
    """Return a function from the index of a prompt to its token ids, `None` where there is none.

    Raises:
        `ValueError`: if the file holds no prompts.
        `OSError`: if there is no such file.
    """
    path = Path(path)
    file = open_parquet(path)
    prompts, lists = (column_type(path, file.schema_arrow, name) for name in ("prompt", "token_ids"))
    require_whole_type(path, "prompt", prompts)
    if not pa.types.is_list(lists) or not pa.types.is_integer(lists.value_type):
        raise ValueError(f"{path}: column 'token_ids' must hold lists of whole numbers, it holds {lists}.")
    table = read_table(path, file, ["prompt", "token_ids"])
    longest = pc.max(pc.list_value_length(table["token_ids"])).as_py() or 0
    if longest > MOST_OF_A_PROMPT:
        raise ValueError(f"{path} holds a prompt of {longest} tokens, at most {MOST_OF_A_PROMPT} are read.")
    places = {prompt: place for place, prompt in enumerate(table["prompt"].to_pylist())}
    return lambda prompt: table["token_ids"][places[prompt]].as_py() if prompt in places else None


class Occurrences:
    """A file of occurrences, whose schema is checked at once and whose rows are checked as they are read.

    Args:
        path (`str` or `os.PathLike`): The Parquet file; it comes from outside.

    Attributes:
        metadata (`dict`): What the file says of itself; empty when another program wrote it.
        has_pre (`bool`): Whether it holds `kl_pre`, the divergence under the reference student.
        rows (`int`): Number of rows.

    Raises:
        `ValueError`: if it is no Parquet file, has no rows, or a column is missing or of another type.
        `OSError`: if there is no such file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = open_parquet(self.path)
        schema = self._file.schema_arrow
        self._check_columns(schema)
        self.metadata = read_metadata(self.path, schema, version=VERSION)
        self.rows = self._file.metadata.num_rows
        if self.rows == 0:
            raise ValueError(f"{path} has no rows.")
        self.has_pre = "kl_pre" in schema.names
        self._has_prompt = "prompt" in schema.names

    def units(self) -> np.ndarray:
        """Return the distinct values of `prompt` (of `rollout` where absent) in ascending order."""
        found = np.empty(0, dtype=np.int64)
        name = "prompt" if self._has_prompt else "rollout"
        for batch in self._raw_batches([name]):
            found = np.union1d(found, self._whole_numbers(batch, name, 0))
        return found

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the rows in batches, checked: `rollout`, `position`, `token_id`, `unit`, `kl` and, if any, `kl_pre`.

        Raises:
            `ValueError`: naming the row (counted from 0) for a null, a divergence that is none, a negative id, rows out
                of order, or a rollout of two prompts.
        """
        names = [*REQUIRED, *(name for name in OPTIONAL if name in self._file.schema_arrow.names)]
        first, last = 0, None
        for batch in self._raw_batches(names):
            rows = {name: self._whole_numbers(batch, name, first) for name in ("rollout", "position", "token_id")}
            unit = self._whole_numbers(batch, "prompt", first) if self._has_prompt else rows["rollout"]
            rows["unit"] = unit
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
        if rows != self.rows:  # Arrow ends in silence where a column does
            raise ValueError(f"{self.path} is cut or damaged: {rows} of {self.rows} rows can be read.")

    def _check_columns(self, schema: pa.Schema) -> None:
        present = [name for name in OPTIONAL if name in schema.names]
        for name in (*REQUIRED, *present):
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
        if (place := first_null(column)) is not None:
            raise ValueError(
                f"{self.path}: row {first + place} has no {name}: the position was not measured (frozen in training?). "
                "Collect the rollouts with `trl-opd collect`."
            )
        values = column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        wrong = ~((values >= LEAST_KL) & (values < np.inf))  # NaN is not at least anything
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{self.path}: row {first + row} has {name} {values[row]}, and a divergence is finite and at least 0."
            )
        return values

    def _check_order(self, rows: dict[str, np.ndarray], last: tuple | None, first: int) -> tuple[int, int, int]:
        """Raise `ValueError` unless (rollout, position) rises from row to row; return the last row's place."""
        names = ("rollout", "position", "unit")
        before = last or (-1, -1, -1)
        rollout, position, unit = (
            np.concatenate([[edge], rows[name]]) for edge, name in zip(before, names, strict=True)
        )
        same = rollout[1:] == rollout[:-1]
        wrong = (rollout[1:] < rollout[:-1]) | (same & (position[1:] <= position[:-1]))
        if wrong.any():
            row = int(np.argmax(wrong))
            twice = same[row] and position[row + 1] == position[row]
            what = "occurs twice" if twice else "is out of order: rows go by (rollout, position)"
            place = f"rollout {rollout[row + 1]}, position {position[row + 1]}"
            raise ValueError(f"{self.path}: row {first + row} ({place}) {what}.")
        moved = same & (unit[1:] != unit[:-1])
        if moved.any():
            row = int(np.argmax(moved))
            raise ValueError(
                f"{self.path}: row {first + row} has prompt {unit[row + 1]}, the row before it, of the same rollout, "
                f"{unit[row]}."
            )
        return int(rollout[-1]), int(position[-1]), int(unit[-1])
