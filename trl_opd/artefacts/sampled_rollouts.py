"""rollout_samples.parquet: some rollouts of a run for the report, with both models' probabilities of every token.

One row per token, in the order of (step, rollout, position). During the run there is a part file for each step; at the
end of the run they are joined to one file.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import parquet
from .atomic import complete_file
from .run_files import ROLLOUT_SAMPLES_FILE, find_step_parts, step_part

VERSION = 1
# Begins with an underscore, because transformers pushes the output folder during the run, except for these names.
PARTS = "_rollout_samples"
# Number of most likely tokens that are kept of each distribution.
TOP = 5
KEYS = ("step", "rollout", "prompt", "position", "token_id")
MEASURES = ("kl", "kl_pre", "entropy", "weight", "student_p", "teacher_p")
TOP_IDS = ("student_top_ids", "teacher_top_ids")
TOP_PROBABILITIES = ("student_top_p", "teacher_top_p")
LISTS = TOP_IDS + TOP_PROBABILITIES
WHOLE_NUMBERS = KEYS + TOP_IDS
SCHEMA = pa.schema(
    [(name, pa.int32()) for name in KEYS]
    + [(name, pa.float32()) for name in MEASURES]
    + [(name, pa.list_(pa.int32(), TOP)) for name in TOP_IDS]
    + [(name, pa.list_(pa.float32(), TOP)) for name in TOP_PROBABILITIES]
)


def write_part(folder: Path, step: int, columns: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write the rollouts of a step to a part file, which appears under its name only when it is complete.

    Args:
        folder (`Path`): The run's output folder.
        step (`int`): The step.
        columns (`Mapping[str, np.ndarray]`): Columns of `SCHEMA`, `(n,)`; `*_top_ids` and `*_top_p` are `(n, 5)`.
        metadata (`dict`): Models, tokenizer, and `prompts`, a mapping from "step/prompt" to token ids.
    """
    arrays = []
    for field in SCHEMA:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(values.reshape(-1), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, TOP))
        else:
            arrays.append(pa.array(values, field.type, from_pandas=True))  # NaN is null
    _write(step_part(folder / PARTS, step), pa.Table.from_arrays(arrays, schema=SCHEMA), metadata)


def join_parts(folder: Path) -> None:
    """Join the part files of a run to one file and remove them; do nothing if there are none."""
    parts = [path for _, path in find_step_parts(folder / PARTS)]
    if not parts:
        return
    metadata: dict[str, Any] = {}
    prompts: dict[str, list[int]] = {}
    for part in parts:
        metadata = read_metadata(part)
        prompts |= metadata.get("prompts", {})
    metadata["prompts"] = prompts

    schema = parquet.with_metadata(SCHEMA, metadata, version=VERSION)
    with (
        complete_file(folder / ROLLOUT_SAMPLES_FILE) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part).cast(schema))
    shutil.rmtree(folder / PARTS)


def keep_up_to(folder: Path, step: int) -> None:
    """Drop the rollouts after the step at which a run resumes from a checkpoint, or all (step 0) when it begins."""
    whole = folder / ROLLOUT_SAMPLES_FILE
    if whole.is_file() and step > 0:
        table = pq.read_table(whole)
        metadata = read_metadata(whole)
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # the joined file is complete and holds all of them
        _write(step_part(folder / PARTS, step), table.filter(pc.field("step") <= step), metadata)
    whole.unlink(missing_ok=True)
    for at, path in find_step_parts(folder / PARTS):
        if at > step:
            path.unlink()


def find_sample_files(folder: Path) -> list[Path]:
    """Return the files that hold a run's rollouts in order: one file, or the part files while the run has not ended."""
    whole = folder / ROLLOUT_SAMPLES_FILE
    if whole.is_file():
        return [whole]
    return [path for _, path in find_step_parts(folder / PARTS)]


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that a file of rollouts has about itself; empty if another program wrote it.

    Raises:
        `ValueError`: if it is not a complete Parquet file, or has a newer version.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a complete Parquet file of rollouts: {error}") from error
    return parquet.read_metadata(path, schema, version=VERSION)


def _write(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = parquet.with_metadata(SCHEMA, metadata, version=VERSION)
    with complete_file(path) as part:
        pq.write_table(table.cast(schema), part, compression="zstd")
