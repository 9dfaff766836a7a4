"""Which rollouts a report shows, and their columns: a few of many, evenly taken, read without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..occurrences import MAX_VOCABULARY
from ..rollout_file import FIGURES, TOP, read_metadata
from .blocks import ShownRollout

# Of all that is shown of a page's rollouts, and of one of them; a token takes about 250 bytes of the page.
MOST_TOKENS, MOST_OF_ONE = 10_000, 600
MOST_STEPS, MOST_OF_A_STEP, MOST_OF_A_COLLECTION = 12, 4, 12
LISTS = tuple(f"{who}_top_{what}" for who in ("student", "teacher") for what in ("ids", "p"))

# Ids of a prompt -> its text.
Decode = Callable[[Sequence[int]], str | None]


class Span(NamedTuple):
    """A rollout in a file: its step (0 where there is none), its index, and its rows."""

    step: int
    rollout: int
    first: int
    end: int


@dataclass(frozen=True)
class Shown:
    """Rollouts that are shown, of how many, and what was left out, in words."""

    rollouts: list[ShownRollout]
    note: str


def shown_of_run(files: Sequence[Path], decode: Decode, *, most_tokens: int = MOST_TOKENS) -> Shown:
    """Return rollouts of the steps of a run, the first and the last among them.

    Args:
        files (`Sequence[Path]`): `rollout_samples.parquet`, or the parts of a run that has not ended.
        decode (`Callable`): Token ids of a prompt to its text, or `None`.
        most_tokens (`int`, *optional*): Tokens that are shown at most.

    Raises:
        `ValueError`: for a file that is none, cut, or with values that cannot be.
    """
    spans = [(path, span) for path in files for span in _spans(path, ("step", "rollout"))]
    steps = sorted({span.step for _, span in spans})
    chosen = [steps[place] for place in _evenly(len(steps), MOST_STEPS)]
    room = most_tokens // max(len(chosen), 1)
    picked = []
    for step in chosen:
        picked += _within([(path, span) for path, span in spans if span.step == step], MOST_OF_A_STEP, room)
    prompts = {path: read_metadata(path).get("prompts") for path in {path for path, _ in picked}}
    found = []
    for path, span in picked:
        columns = _read(path, span, (*FIGURES, *LISTS))
        known = prompts[path] if isinstance(prompts[path], dict) else {}
        ids = known.get(f"{span.step}/{columns['prompt'][0]}") if "prompt" in columns else None
        found.append(_rollout(span, columns, decode(ids) if _are_ids(ids) else None, step=span.step))
    return Shown(found, _note(found, len(spans), f" of {len(chosen)} of {len(steps)} steps that were kept"))


def shown_of_collection(path: Path, prompts: Path, decode: Decode) -> Shown:
    """Return rollouts of collected occurrences.

    Args:
        path (`Path`): `occurrences.parquet`, whose rows were checked.
        prompts (`Path`): `prompts.parquet`, which may be absent.
        decode (`Callable`): Token ids of a prompt to its text, or `None`.

    Raises:
        `ValueError`: for a file that is cut, or with values that cannot be.
    """
    spans = [(path, span) for span in _spans(path, ("rollout",))]
    picked = _within(spans, MOST_OF_A_COLLECTION, MOST_TOKENS)
    names = [name for name in ("kl", "kl_pre", "entropy", "weight") if name in pq.read_schema(path).names]
    found, texts = [], _prompt_texts(prompts, decode)
    for _, span in picked:
        columns = _read(path, span, names)
        prompt = texts(int(columns["prompt"][0])) if "prompt" in columns else None
        found.append(_rollout(span, columns, prompt, step=None))
    return Shown(found, _note(found, len(spans), ""))


def _note(found: list[ShownRollout], total: int, steps: str) -> str:
    cut = sum(len(rollout.token_ids) >= MOST_OF_ONE for rollout in found)
    text = f"A sample: {len(found)} of {total} rollouts{steps}, taken evenly." if len(found) < total else ""
    return f"{text} Of {cut} only the first {MOST_OF_ONE} tokens are shown." if cut else text


def _evenly(count: int, most: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist())) if count else []


def _within(spans: list[tuple[Path, Span]], most: int, tokens: int) -> list[tuple[Path, Span]]:
    """Return some of the spans, evenly, at least one, that together show at most `tokens` tokens."""
    while True:
        chosen = [spans[place] for place in _evenly(len(spans), most)]
        if most == 1 or sum(min(span.end - span.first, MOST_OF_ONE) for _, span in chosen) <= tokens:
            return chosen
        most -= 1


def _spans(path: Path, keys: tuple[str, ...]) -> list[Span]:
    """Return the rollouts of a file, in its order."""
    read_metadata(path)  # refuses what is cut, or newer
    file = pq.ParquetFile(path)
    _require_columns(path, file.schema_arrow, (*keys, "position", "token_id", "kl"))
    parts = [
        np.stack([_whole(batch.column(name), path, name) for name in keys], 1) for batch in _batches(file, path, keys)
    ]
    rows = np.concatenate(parts) if parts else np.zeros((0, len(keys)), dtype=np.int64)
    starts = np.flatnonzero(np.r_[len(rows) > 0, (rows[1:] != rows[:-1]).any(1)]) if len(rows) else np.zeros(0, int)
    ends = np.append(starts[1:], len(rows))
    found = [
        Span(*([0] * (2 - len(keys))), *key, start, end)
        for key, start, end in zip(rows[starts].tolist(), starts.tolist(), ends.tolist(), strict=True)
    ]
    if len({(span.step, span.rollout) for span in found}) < len(found):
        raise ValueError(f"{path}: the rows of a rollout do not stand together.")
    return found


def _batches(file: pq.ParquetFile, path: Path, names: Sequence[str]):
    try:
        yield from file.iter_batches(columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is cut or damaged: {error}") from error


def _read(path: Path, span: Span, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the columns of a rollout, as many of its tokens as are shown; NaN for null."""
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    _require_columns(path, schema, names)
    keys = [name for name in ("prompt", "token_id") if name in schema.names]
    end = min(span.end, span.first + MOST_OF_ONE)
    tables, start = [], 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if start < end and span.first < start + rows:
            try:
                table = file.read_row_group(group, [*keys, *names], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is cut or damaged: {error}") from error
            tables.append(table.slice(max(span.first - start, 0), end - max(span.first, start)))
        start += rows
    table = pa.concat_tables(tables)
    found = {name: _whole(table.column(name), path, name) for name in keys}
    for name in names:
        column = table.column(name)
        if name in LISTS:
            flat = column.combine_chunks().flatten()
            kind = _whole if name.endswith("ids") else _numbers
            found[name] = kind(flat, path, name).reshape(-1, TOP)
        else:
            found[name] = _numbers(column, path, name)
    return found


def _rollout(span: Span, columns: dict[str, np.ndarray], prompt: str | None, *, step: int | None) -> ShownRollout:
    known = {name: columns.get(name) for name in FIGURES}
    known = {name: None if values is None or np.isnan(values).all() else values for name, values in known.items()}
    for who in ("student", "teacher"):
        if f"{who}_top_ids" in columns:
            known[f"{who}_top"] = columns[f"{who}_top_ids"], columns[f"{who}_top_p"]
    kl = columns["kl"]
    return ShownRollout(step, span.rollout, prompt, columns["token_id"], **known | {"kl": kl})


def _require_columns(path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    for name in names:
        if schema.names.count(name) != 1:
            raise ValueError(f"{path}: there must be one column {name!r}, it has {', '.join(schema.names)}.")
        kind = schema.field(name).type
        if name in LISTS:
            if not pa.types.is_fixed_size_list(kind) or kind.list_size != TOP:
                raise ValueError(f"{path}: column {name!r} must be lists of {TOP}, it is {kind}.")
            kind = kind.value_type
        is_number = name in FIGURES or name.endswith("_p")
        if not (pa.types.is_floating(kind) if is_number else pa.types.is_integer(kind)):
            raise ValueError(
                f"{path}: column {name!r} holds {kind}, not {'numbers' if is_number else 'whole numbers'}."
            )


def _whole(column, path: Path, name: str) -> np.ndarray:
    if column.null_count:
        raise ValueError(f"{path}: a row has no {name}.")
    values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)
    limit = MAX_VOCABULARY if "id" in name.split("_") or name.endswith("ids") else 2**31
    if len(values) and not 0 <= values.min() <= values.max() < limit:
        raise ValueError(f"{path}: a row has a {name} outside of 0..{limit - 1}.")
    return values


def _numbers(column, path: Path, name: str) -> np.ndarray:
    values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
    if np.isinf(values).any():
        raise ValueError(f"{path}: a row has a {name} that is not finite.")
    return values


def _are_ids(value) -> bool:
    return isinstance(value, list) and all(type(id) is int and 0 <= id < MAX_VOCABULARY for id in value)


def _prompt_texts(path: Path, decode: Decode) -> Callable[[int], str | None]:
    """Return a function from the index of a prompt to its text."""
    if not path.is_file():
        return lambda prompt: None
    try:
        table = pq.read_table(path, columns=["prompt", "token_ids"])
        places = {prompt: place for place, prompt in enumerate(table.column("prompt").to_pylist())}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file of prompts: {error}") from error

    def text_of(prompt: int) -> str | None:
        ids = table.column("token_ids")[places[prompt]].as_py() if prompt in places else None
        return decode(ids) if _are_ids(ids) else None

    return text_of
