"""gradients.parquet, a table with one row per token type of a gradient study: a writer and a checking reader."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import complete_file
from .parquet import column_type, open_parquet, read_table

# Group of token types -> its name in a printed table.
GROUPS = {"rock": "rocks", "rare": "rare, high KL", "random": "random rest"}
# Column whose median is printed for each group -> its heading.
MEDIANS = {
    "count": "n",
    "norm": "norm",
    "norm_unbiased": "unbiased",
    "norm_matched": "equal n",
    "cos_balanced": "cos",
    "cos_balanced_without": "cos, less own",
    "cos_matched": "cos, equal n",
}
# Numeric columns that every file has.
NUMBERS = [*MEDIANS, "mean_kl"]


@dataclass(frozen=True)
class Study:
    """Measurements of a gradient study, one value per token type and column.

    Args:
        columns (`dict[str, np.ndarray]`): Column -> values `(T,)`; `group`, `token_id` and `mean_kl` are among them.
        matched (`int`): Number of positions per type in the columns that compare groups at an equal number.
        has_early (`bool`): Whether there is a column `mean_kl_early`.
    """

    columns: dict[str, np.ndarray]
    matched: int
    has_early: bool

    def of(self, group: str, name: str) -> np.ndarray:
        """Return the finite values of a column for the types of a group."""
        values = self.columns[name][self.columns["group"] == group]
        return values[np.isfinite(values)]


def write_table(found: Study, tokenizer, path: str | os.PathLike) -> None:
    """Write `gradients.parquet`, a row for each type; the file appears under its name only when it is complete."""
    columns = found.columns
    texts = [tokenizer.decode([id]) for id in columns["token_id"].tolist()]
    arrays = {
        "token_id": pa.array(columns["token_id"], pa.int32()),
        "text": pa.array(texts),
        "group": pa.array(columns["group"].tolist()),
        "count": pa.array(columns["count"].astype(np.int64)),
        "matched_count": pa.array(columns["matched_count"].astype(np.int64)),
    }
    for name, values in columns.items():
        if name not in arrays:
            arrays[name] = pa.array(values, from_pandas=True)
    with complete_file(path) as part:
        pq.write_table(pa.table(arrays), part, compression="zstd")


def read_gradients(path: Path) -> Study:
    """Return the gradient study in a file, without its token ids.

    Raises:
        `ValueError`: if the file is cut, or is not a table that `trl-opd gradients` wrote.
        `OSError`: if there is no such file.
    """
    schema = open_parquet(path).schema_arrow
    has_early = "mean_kl_early" in schema.names
    numbers = NUMBERS.copy()
    if has_early:
        numbers.append("mean_kl_early")
    for name in numbers:
        column_type(path, schema, name)
    group_type = column_type(path, schema, "group")
    if pa.types.is_nested(group_type):
        raise ValueError(f"{path}: column 'group' holds {group_type}, not strings.")

    # Read as a dictionary column, a string that many rows share is in memory only once.
    table = read_table(path, open_parquet(path, read_dictionary=["group"]), [*numbers, "group"])
    try:
        columns = {name: np.asarray(table[name].to_numpy(), dtype=np.float64) for name in numbers}
        groups = table["group"].to_pylist()
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of `trl-opd gradients`: {error}") from error

    if not groups or not set(groups) <= GROUPS.keys():
        raise ValueError(
            f"{path}: not a table of `trl-opd gradients`: its column 'group' must hold {', '.join(GROUPS)} only."
        )
    if not (columns["count"] >= 1).all():
        raise ValueError(f"{path}: not a table of `trl-opd gradients`: a count is below 1.")
    columns["group"] = np.array(groups, dtype=object)
    return Study(columns, matched=0, has_early=has_early)
