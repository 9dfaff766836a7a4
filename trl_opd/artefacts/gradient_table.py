"""gradients.parquet: a row for each token type of a gradient study, written, and read back with checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import complete_file
from .parquet import column_type, open_parquet, read_table

# Group of token types -> how a table names it.
GROUPS = {"rock": "rocks", "rare": "rare, high KL", "random": "random rest"}
# Column -> its head in the table of groups.
MEDIANS = {
    "count": "n",
    "norm": "norm",
    "norm_unbiased": "unbiased",
    "norm_matched": "equal n",
    "cos_balanced": "cos",
    "cos_balanced_without": "cos, less own",
    "cos_matched": "cos, equal n",
}
# Columns of numbers that every table has.
NUMBERS = (*MEDIANS, "mean_kl")


@dataclass(frozen=True)
class Study:
    """What was measured of token types, `(T,)` each, by column; `group`, `token_id` and `mean_kl` among them.

    Args:
        columns (`dict[str, np.ndarray]`): The table.
        matched (`int`): Positions of each type in the groups of equal number.
        has_early (`bool`): Whether `mean_kl_early` is there.
    """

    columns: dict[str, np.ndarray]
    matched: int
    has_early: bool

    def of(self, group: str, name: str) -> np.ndarray:
        """Return the finite values of a column for the types of a group."""
        values = self.columns[name][self.columns["group"] == group]
        return values[np.isfinite(values)]


def write_table(found: Study, tokenizer, path: str | os.PathLike) -> None:
    """Write `gradients.parquet`: a row for each type; it appears under its name only when it is complete."""
    columns: Mapping[str, np.ndarray] = found.columns
    texts = [tokenizer.decode([id]) for id in columns["token_id"].tolist()]
    arrays = {
        "token_id": pa.array(columns["token_id"], pa.int32()),
        "text": pa.array(texts),
        "group": pa.array(columns["group"].tolist()),
        "count": pa.array(columns["count"].astype(np.int64)),
        "matched_count": pa.array(columns["matched_count"].astype(np.int64)),
    }
    arrays |= {name: pa.array(values, from_pandas=True) for name, values in columns.items() if name not in arrays}
    with complete_file(path) as part:
        pq.write_table(pa.table(arrays), part, compression="zstd")


def read_gradients(path: Path) -> Study:
    """Return the gradient study of a file.

    Raises:
        `ValueError`: if it is no whole table of `trl-opd gradients`.
        `OSError`: if there is no such file.
    """
    schema = open_parquet(path).schema_arrow
    has_early = "mean_kl_early" in schema.names
    numbers = list(NUMBERS)
    if has_early:
        numbers.append("mean_kl_early")
    wanted = [*numbers, "group"]
    types = {name: column_type(path, schema, name) for name in wanted}
    if pa.types.is_nested(types["group"]):
        raise ValueError(f"{path}: column 'group' holds {types['group']}, not texts.")

    # As a dictionary a text that stands in many rows is in memory once.
    table = read_table(path, open_parquet(path, read_dictionary=["group"]), wanted)
    try:
        columns = {name: np.asarray(table.column(name).to_numpy(), dtype=np.float64) for name in numbers}
        groups = table.column("group").to_pylist()
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of `trl-opd gradients`: {error}") from error
    if not groups or not all(isinstance(group, str) and group in GROUPS for group in groups):
        raise ValueError(f"{path}: not a table of `trl-opd gradients`: its groups are not {', '.join(GROUPS)}.")
    if not (columns["count"] >= 1).all():
        raise ValueError(f"{path}: not a table of `trl-opd gradients`: a count is below 1.")
    columns["group"] = np.array(groups, dtype=object)
    return Study(columns, matched=0, has_early=has_early)
