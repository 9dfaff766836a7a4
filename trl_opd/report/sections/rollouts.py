"""Which rollouts a report shows, and their columns: a few of many, evenly taken, read without the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...artefacts.occurrences import BATCH_ROWS, MAX_VOCABULARY, read_prompts
from ...artefacts.parquet import open_parquet
from ...artefacts.sampled_rollouts import FIGURES, TOP, read_metadata
from ..blocks import Block, Note, Rollouts, Section, ShownRollout
from ..contents import Contents

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


Place = tuple[Path, Span]


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
    picked = _of_steps(spans, most_tokens)
    prompts = {path: read_metadata(path).get("prompts") for path in {path for path, _ in picked}}
    found = []
    for path, span in picked:
        columns = _read(path, span, (*FIGURES, *LISTS))
        known = prompts[path] if isinstance(prompts[path], dict) else {}
        ids = known.get(f"{span.step}/{columns['prompt'][0]}") if "prompt" in columns else None
        found.append(_rollout(span, columns, decode(ids) if _are_ids(ids) else None, step=span.step))
    steps = [len({span.step for _, span in part}) for part in (picked, spans)]
    return Shown(found, _note(picked, len(spans), f" of {steps[0]} of {steps[1]} steps that were kept"))


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
    return Shown(found, _note(picked, len(spans), ""))


def _note(picked: list[Place], total: int, steps: str) -> str:
    cut = sum(span.end - span.first > MOST_OF_ONE for _, span in picked)
    texts = [f"A sample: {len(picked)} of {total} rollouts{steps}, taken evenly."] * (len(picked) < total)
    texts += [f"Of {cut} only the first {MOST_OF_ONE} tokens are shown."] * (cut > 0)
    return " ".join(texts)


def _evenly(count: int, most: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist())) if count else []


def _of_steps(spans: list[Place], tokens: int) -> list[Place]:
    """Return rollouts of as many steps as show at most `tokens` tokens, of two steps at least."""
    steps = sorted({span.step for _, span in spans})
    for most in range(MOST_STEPS, 1, -1):
        chosen = [steps[place] for place in _evenly(len(steps), most)]
        picked = []
        for step in chosen:
            mine = [(path, span) for path, span in spans if span.step == step]
            picked += _within(mine, MOST_OF_A_STEP, tokens // len(chosen))
        if _shown_tokens(picked) <= tokens:
            break
    return picked


def _within(spans: list[Place], most: int, tokens: int) -> list[Place]:
    """Return some of the spans, evenly, at least one, that together show at most `tokens` tokens."""
    while True:
        chosen = [spans[place] for place in _evenly(len(spans), most)]
        if most == 1 or _shown_tokens(chosen) <= tokens:
            return chosen
        most -= 1


def _shown_tokens(picked: list[Place]) -> int:
    return sum(min(span.end - span.first, MOST_OF_ONE) for _, span in picked)


def _spans(path: Path, keys: tuple[str, ...]) -> list[Span]:
    """Return the rollouts of a file, in its order."""
    read_metadata(path)  # refuses what is cut, or newer
    file = open_parquet(path)
    _require_columns(path, file.schema_arrow, (*keys, "position", "token_id", "kl"))
    found, starts, size = [], [], 0
    last = np.full((1, len(keys)), -1)
    for batch in _batches(file, path, keys):
        rows = np.stack([_whole(batch.column(name), path, name) for name in keys], 1)
        both = np.concatenate([last, rows])
        changed = np.flatnonzero((both[1:] != both[:-1]).any(1))
        found += rows[changed].tolist()
        starts += (size + changed).tolist()
        last, size = both[-1:], size + len(rows)
    if len(set(map(tuple, found))) < len(found):
        raise ValueError(f"{path}: the rows of a rollout do not stand together.")
    step = [0] * (2 - len(keys))
    return [Span(*step, *key, *rows) for key, rows in zip(found, pairwise([*starts, size]), strict=True)]


def _batches(
    file: pq.ParquetFile, path: Path, names: Sequence[str], groups: list[int] | None = None
) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(BATCH_ROWS, groups, columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is cut or damaged: {error}") from error


def _read(path: Path, span: Span, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the columns of a rollout, as many of its tokens as are shown; NaN for null."""
    file = open_parquet(path)
    keys = [name for name in ("prompt", "token_id") if name in file.schema_arrow.names]
    _require_columns(path, file.schema_arrow, (*keys, *names))
    table = _rows(file, path, [*keys, *names], span.first, min(span.end, span.first + MOST_OF_ONE))
    found = {name: _whole(table.column(name), path, name) for name in keys}
    for name in names:
        column = table.column(name)
        if name not in LISTS:
            found[name] = _numbers(column, path, name)
        elif column.null_count:
            raise ValueError(f"{path}: a row has no {name}.")
        else:
            kind = _whole if name.endswith("ids") else _numbers
            found[name] = kind(column.combine_chunks().flatten(), path, name).reshape(-1, TOP)
    return found


def _rows(file: pq.ParquetFile, path: Path, names: Sequence[str], first: int, end: int) -> pa.Table:
    """Return rows of a file, for which no other row groups are read, and a part of those at a time."""
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    edges = list(pairwise(accumulate(sizes, initial=0)))
    groups = [group for group, (start, stop) in enumerate(edges) if start < end and first < stop]
    place, parts = edges[groups[0]][0] if groups else end, []
    for batch in _batches(file, path, names, groups):
        parts.append(batch.slice(max(first - place, 0), max(end - max(first, place), 0)))
        place += batch.num_rows
        if place >= end:
            break
    if sum(part.num_rows for part in parts) != end - first:
        raise ValueError(f"{path} is damaged: its row groups do not hold as many rows as they say.")
    return pa.Table.from_batches(parts)


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
            raise ValueError(f"{path}: there must be one column {name!r}, it has {', '.join(schema.names):.200}.")
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
    ids_of = read_prompts(path)

    def text_of(prompt: int) -> str | None:
        ids = ids_of(prompt)
        return decode(ids) if _are_ids(ids) else None

    return text_of


def rollouts(contents: Contents) -> Section | None:
    """Return completions that can be looked at, of the runs or of a collection."""
    ids = frozenset(rock.id for rock in contents.rocks.rocks) if contents.rocks else frozenset()
    blocks: list[Block] = []
    sampled = {name: run.samples for name, run in contents.runs.items() if run.samples}
    for name, files in sampled.items():
        shown = shown_of_run(files, contents.names.decode, most_tokens=MOST_TOKENS // len(sampled))
        title = f"Rollouts of the arm {name}. " if len(sampled) > 1 else ""
        blocks += _viewer(shown.rollouts, title + shown.note, contents, ids)
    if contents.occurrences is not None and not sampled:
        shown = shown_of_collection(contents.occurrences.path, contents.prompts, contents.names.decode)
        blocks += _viewer(shown.rollouts, shown.note, contents, ids)
    return Section("rollouts", "Rollouts", blocks) if blocks else None


def _viewer(shown: list[ShownRollout], note: str, contents: Contents, rocks: frozenset[int]) -> list[Block]:
    ids = {int(id) for rollout in shown for id in rollout.token_ids}
    for rollout in shown:
        for top in (rollout.student_top, rollout.teacher_top):
            ids |= set() if top is None else {int(id) for id in top[0].ravel()}
    texts = {id: text for id in sorted(ids) if (text := contents.names.text_of(id)) is not None}
    notes = [Note(note)] if note.strip() else []
    if not contents.names.complete:
        notes.append(Note("No tokenizer of these ids is on this machine, so tokens stand as their ids."))
    return [*notes, Rollouts(shown, texts, rocks)] if shown else []
