"""rollout_samples.parquet: some rollouts of a run, with what both models thought of each token; for the report.

One row per token, in order of (step, rollout, position). A part file for each step while the run goes on, one file
when it has ended.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .atomic import complete_file

METADATA_KEY, VERSION = "trl_opd", 1
# transformers pushes checkpoints from the output folder while the run goes on, without what begins with "_".
FILE_NAME, PARTS = "rollout_samples.parquet", "_rollout_samples"
TOP = 5
KEYS = ("step", "rollout", "prompt", "position", "token_id")
FIGURES = ("kl", "kl_pre", "entropy", "weight", "student_p", "teacher_p")
SCHEMA = pa.schema(
    [(name, pa.int32()) for name in KEYS]
    + [(name, pa.float32()) for name in FIGURES]
    + [(f"{who}_top_ids", pa.list_(pa.int32(), TOP)) for who in ("student", "teacher")]
    + [(f"{who}_top_p", pa.list_(pa.float32(), TOP)) for who in ("student", "teacher")]
)


def write_part(folder: Path, step: int, columns: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write the rollouts of a step; the file appears under its name only when it is complete.

    Args:
        folder (`Path`): The run's output folder.
        step (`int`): The step.
        columns (`Mapping[str, np.ndarray]`): Columns of the format; `*_top_ids` and `*_top_p` of shape `(n, 5)`.
        metadata (`dict`): Models, tokenizer, and `prompts`: token ids by "step/prompt".
    """
    arrays = []
    for field in SCHEMA:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(values.reshape(-1), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, TOP))
        else:
            arrays.append(pa.array(values, field.type, from_pandas=True))  # NaN is null
    _write(folder / PARTS / f"step-{step}.parquet", pa.Table.from_arrays(arrays, schema=SCHEMA), metadata)


def join_parts(folder: Path) -> None:
    """Make one file of a run's parts, and remove them; nothing where there are none."""
    parts = [path for _, path in _parts(folder)]
    if not parts:
        return
    metadata: dict[str, Any] = {}
    for part in parts:
        found = read_metadata(part)
        metadata = {**found, "prompts": {**metadata.get("prompts", {}), **found.get("prompts", {})}}
    with (
        complete_file(folder / FILE_NAME) as temporary,
        pq.ParquetWriter(temporary, _schema(metadata), compression="zstd") as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part).cast(writer.schema))
    shutil.rmtree(folder / PARTS)


def keep_up_to(folder: Path, step: int) -> None:
    """Forget the rollouts after a step: a run begins there, from a checkpoint or (step 0) anew."""
    whole = folder / FILE_NAME
    if whole.is_file() and step > 0:
        table, metadata = pq.read_table(whole), read_metadata(whole)
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # the file was complete, so they are in it
        _write(folder / PARTS / f"step-{step}.parquet", table.filter(pc.field("step") <= step), metadata)
    whole.unlink(missing_ok=True)
    for at, path in _parts(folder):
        if at > step:
            path.unlink()


def files_of(folder: Path) -> list[Path]:
    """Return the files that hold a run's rollouts, in order: one, or the parts of a run that has not ended."""
    whole = folder / FILE_NAME
    return [whole] if whole.is_file() else [path for _, path in _parts(folder)]


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a file says of itself; empty when another program wrote it.

    Raises:
        `ValueError`: if it is no whole Parquet file, or of a newer version.
    """
    try:
        text = (pq.read_schema(path).metadata or {}).get(METADATA_KEY.encode())
        content = {} if text is None else json.loads(text)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole Parquet file of rollouts: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its metadata {METADATA_KEY!r} is not an object.")
    version = content.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{path} has version {version!r:.40}, and this trl_opd reads up to {VERSION}: upgrade it.")
    return content


def _schema(metadata: dict[str, Any]) -> pa.Schema:
    return SCHEMA.with_metadata({METADATA_KEY: json.dumps({"version": VERSION} | metadata, allow_nan=False)})


def _write(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as part:
        pq.write_table(table.cast(SCHEMA).replace_schema_metadata(_schema(metadata).metadata), part, compression="zstd")


def _parts(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"step-(\d+)", path.stem), path) for path in (folder / PARTS).glob("step-*.parquet"))
    return sorted((int(match[1]), path) for match, path in found if match)
