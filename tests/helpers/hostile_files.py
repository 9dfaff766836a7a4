"""Files that a user may pass in: good ones of each kind, broken ones by seed, and checks of what is read from them.

A check reads a file as the package's commands do, and asserts that the result keeps the promises of the format.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save

from trl_opd import RockSet, TokenSignals, TokenStats, detect_rocks, mass_matched_controls, token_weights
from trl_opd.artefacts.occurrences import MAX_VOCABULARY, PROMPT_SCHEMA, Occurrences, write_occurrences
from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.artefacts.sampled_rollouts import SCHEMA, join_parts, write_part
from trl_opd.artefacts.token_stats import COUNTS, FORMAT, SUMS
from trl_opd.cli import detect
from trl_opd.cli.models import make_parser
from trl_opd.cli.parsing import parse
from trl_opd.report.build import write_report
from trl_opd.studies.gradients import read_rollouts

from tests.helpers.file_mutations import NUMBERS, REALS, mutated_bytes, mutated_json, mutated_safetensors, mutated_yaml
from tests.helpers.report_folders import SUMMARY
from tests.helpers.rock_sets import FILE
from tests.helpers.run_records import record
from tests.helpers.tiny import make_tokenizer

MARKER = "a-payload-ran"
VOCAB, PROMPTS, LENGTH = 40, 12, 16
FILES = {
    "rock_set": "rock_set.json",
    "occurrences": "occurrences.parquet",
    "prompts": "prompts.parquet",
    "token_stats": "token_stats.safetensors",
    "recipe": "recipe.yaml",
    "run": "opd_run.json",
    "knockout": "knockout.json",
    "gradients": "gradients.parquet",
    "samples": FILE_NAME,
    "summary": "summary.json",
}


@functools.cache
def tokenizer():
    """Return the tokenizer that rock sets are checked with."""
    return make_tokenizer()


# Good files


def occurrence_columns(prompts: int = PROMPTS, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Return the columns of occurrences in which some types recur in the same context."""
    rng, rows = np.random.default_rng(0), prompts * length
    tokens = np.where(np.arange(rows) % 4 < 2, np.arange(rows) % 4, rng.integers(0, VOCAB, rows))
    columns = {"rollout": np.repeat(np.arange(prompts), length), "position": np.tile(np.arange(length), prompts)}
    columns |= {"token_id": tokens, "prompt": columns["rollout"] // 2}
    return columns | {name: rng.exponential(1.0, rows).astype(np.float32) for name in ("kl", "kl_pre", "entropy")}


def _parquet(table: pa.Table, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _written_in_many_ways(table: pa.Table) -> list[bytes]:
    ways = [{"compression": codec} for codec in ("none", "none", "zstd", "snappy", "gzip")]
    ways += [{"compression": "none", "use_dictionary": False}, {"compression": "none", "data_page_version": "2.0"}]
    ways += [{"compression": "zstd", "row_group_size": 7, "data_page_size": 16, "write_page_index": True}]
    whole = {name: "DELTA_BINARY_PACKED" for name in ("rollout", "position", "token_id") if name in table.column_names}
    ways += [{"compression": "none", "use_dictionary": False, "column_encoding": whole}] * bool(whole)
    return [_parquet(table, **way) for way in ways]


def _occurrences() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "o.parquet")
        about = {"name": "nobody/tokenizer", "vocab_size": VOCAB, "fingerprint": "sha256:" + 64 * "0"}
        write_occurrences(path, occurrence_columns(), {"vocab_size": VOCAB, "tokenizer": about, "temperature": 1.0})
        return [path.read_bytes(), *_written_in_many_ways(pq.read_table(path))]


def _prompts() -> list[bytes]:
    prompts = range(PROMPTS // 2)
    columns = {"prompt": list(prompts), "token_ids": [[place, 1, 2] for place in prompts], "row": list(prompts)}
    return _written_in_many_ways(pa.table(columns, schema=PROMPT_SCHEMA))


def _token_stats() -> list[bytes]:
    measure = {"divergence": "reverse_kl", "beta": 1.0, "temperature": 1.0, "dropout": 0.0, "student": "s"}
    about = {"name": "a/student", "vocab_size": VOCAB, "fingerprint": None}
    stats, columns = TokenStats(VOCAB, measure | {"tokenizer": about}), occurrence_columns()
    kl, entropy = (torch.from_numpy(columns[name]) for name in ("kl", "entropy"))
    stats.update(TokenSignals(torch.from_numpy(columns["token_id"]), kl, entropy, torch.ones(len(kl))))
    tensors = {name: getattr(stats, name) for name in (*COUNTS, *SUMS)}
    return [save(tensors, {"format": FORMAT, "version": "1", "measure": json.dumps(stats.measure)})]


def _gradients() -> list[bytes]:
    rng, types = np.random.default_rng(0), 12
    columns = {"token_id": pa.array(range(types), pa.int32()), "text": [f" t{n}" for n in range(types)]}
    columns |= {"group": ["rock", "rare", "random"] * 4, "count": [9] * types, "matched_count": [3] * types}
    names = ["mean_kl", "norm", "norm_unbiased", "cos_balanced", "cos_global", "cos_balanced_without"]
    names += ["cos_global_without", "contribution", "norm_matched", "cos_matched"]
    return _written_in_many_ways(pa.table(columns | {name: rng.random(types) for name in names}))


def _samples() -> list[bytes]:
    rng, count = np.random.default_rng(0), 12
    columns = {name: rng.random(count, dtype=np.float32) for name in SCHEMA.names}
    columns |= {"step": np.full(count, 1), "rollout": np.repeat([0, 1], 6), "prompt": np.zeros(count, int)}
    columns |= {"position": np.tile(np.arange(6), 2), "token_id": rng.integers(0, VOCAB, count)}
    for who in ("student", "teacher"):
        columns[f"{who}_top_ids"] = rng.integers(0, VOCAB, (count, 5))
        columns[f"{who}_top_p"] = rng.random((count, 5), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_part(Path(folder), 1, columns, {"prompts": {"1/0": [1, 2, 3]}})
        join_parts(Path(folder))
        content = Path(folder, FILE_NAME).read_bytes()
        return [content, *_written_in_many_ways(pq.read_table(Path(folder, FILE_NAME)))]


KNOCKOUT = {
    "format": "trl_opd.knockout",
    "version": 1,
    "problems": 100,
    "discordance": 0.1,
    "minimal_effect": 0.05,
    "baseline": {"reward": 0.5, "ci95": [0.4, 0.6]},
    "rocks_against_controls": {"p": 0.5},
    "arms": [
        {"kind": kind, "label": label, "ids": [place], "texts": [" So"], "effect": 0.01, "p": 0.5, "p_bh": 0.6}
        | {"p_holm": 1.0, "better": 3, "worse": 2, "ci95": [-0.1, 0.1]}
        for place, (kind, label) in enumerate([("rock", "pillar"), ("control", "neutral"), ("rocks", None)])
    ],
}
RECIPE = {
    "model_name_or_path": "a/student",
    "teacher_model_name_or_path": "a/teacher",
    "dataset_name": "prompts.jsonl",
    "output_dir": "out",
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "use_peft": True,
    "lora_r": 8,
    "lora_target_modules": "all-linear",
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2.0e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "max_steps": 5,
    "token_weighting": "uniform",
    "rock_weight": 0.5,
    "save_occurrences": 10,
    "generation_kwargs": {"do_sample": True, "min_p": 0.1},
    "report_to": ["none"],
    "divergence_chunk_bytes": 1048576,
}


def good_files(kind: str) -> list[bytes]:
    """Return good files of a kind."""
    trees = {"rock_set": FILE, "run": record(), "knockout": KNOCKOUT, "summary": SUMMARY}
    if kind in trees:
        return [json.dumps(trees[kind]).encode()]
    if kind == "recipe":
        return [yaml.safe_dump(RECIPE).encode()]
    parquet = {"occurrences": _occurrences, "prompts": _prompts, "gradients": _gradients, "samples": _samples}
    return _token_stats() if kind == "token_stats" else parquet[kind]()


good_files = functools.cache(good_files)


# Complete files with unusual content


def _odd_array(rng: random.Random, values: np.ndarray) -> pa.Array:
    """Return the values of a column as another type, with nulls, or other values of its size."""
    rows = len(values)
    kind = rng.choice(["cast", "cast", "null", "extreme", "dictionary", "list", "struct", "nothing", "text", "steps"])
    if kind == "cast":
        types = [pa.int8(), pa.int64(), pa.uint8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.string()]
        types += [pa.bool_(), pa.timestamp("us"), pa.decimal128(20, 2), pa.date32(), pa.large_string()]
        with contextlib.suppress(pa.ArrowException):
            return pa.array(values).cast(rng.choice(types), safe=False)
    if kind == "null":
        return pa.array([None if rng.random() < 0.2 else value for value in values.tolist()])
    if kind == "extreme":
        real = rng.random() < 0.5
        chosen = values.astype(np.float64 if real else np.int64)
        value = rng.choice(REALS if real else NUMBERS[:14])
        chosen[rng.randrange(rows) :: rng.choice([1, 7, rows])] = value
        return pa.array(chosen)
    if kind == "dictionary":
        return pa.array(values).dictionary_encode()
    if kind == "list":
        return pa.array([[value] * rng.choice([0, 1, 3]) for value in values.tolist()])
    if kind == "struct":
        return pa.array([{"kl": value} for value in values.tolist()])
    if kind == "steps":
        return pa.array(np.sort(values) * rng.choice([-1, 1, 1000]))
    return pa.nulls(rows) if kind == "nothing" else pa.array([str(value) for value in values.tolist()])


def odd_parquet(rng: random.Random, content: bytes) -> bytes:
    """Return a complete Parquet file with columns of other types, other values, other names, no rows or many groups."""
    table = pq.read_table(io.BytesIO(content))
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(table.num_columns)
        name, kind = table.column_names[place], rng.choice(["values", "values", "values", "drop", "name", "twice"])
        if kind == "drop":
            table = table.remove_column(place)
        elif kind == "name":
            table = table.rename_columns([rng.choice([n, n, n, "kl", "prompt", "", "\0"]) for n in table.column_names])
        elif kind == "twice":
            table = table.append_column(name, table.column(place))
        elif table.column(place).to_numpy().dtype.kind in "iuf":  # a column of numbers that was not changed yet
            table = table.set_column(place, name, _odd_array(rng, table.column(place).to_numpy()))
        if not table.num_columns:
            break
    known = (table.schema.metadata or {}).get(b"trl_opd")
    if known is not None and rng.random() < 0.4:
        table = table.replace_schema_metadata({b"trl_opd": mutated_json(rng, json.loads(known))})
    rows = rng.choice([0, 1, LENGTH, table.num_rows, table.num_rows, table.num_rows])
    try:
        return _parquet(table.slice(0, rows), row_group_size=rng.choice([1, 5, 1000]))
    except pa.ArrowException:  # Parquet cannot store every type of Arrow
        return content


def damaged_parquet(rng: random.Random, content: bytes) -> bytes:
    """Return a Parquet file that is cut, or whose data pages are damaged.

    Its footer stays as pyarrow wrote it: a footer that is damaged on purpose can end the process inside pyarrow.
    """
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    pages = mutated_bytes(rng, content[4:footer])
    # The footer holds offsets, so that the pages must keep their total length.
    pages = pages[: footer - 4].ljust(footer - 4, b"\0")
    return content[:4] + pages + content[footer:]


def _equal_rows(rows: int) -> bytes:
    """Return whole occurrences, in order, of one token, with a divergence of zero."""
    place = np.arange(rows, dtype=np.int32)
    columns = {"rollout": place // (rows // 2), "position": place % (rows // 2)}
    columns |= {"token_id": np.zeros(rows, np.int32), "kl": np.zeros(rows, np.float32)}
    steps = dict.fromkeys(("position", "rollout"), "DELTA_BINARY_PACKED")
    options = {"compression": "zstd", "use_dictionary": ["token_id", "kl"], "data_page_size": 2**30}
    return _parquet(pa.table(columns), row_group_size=rows, column_encoding=steps, **options)


def _long_prompts(length: int, use_dictionary: bool) -> bytes:
    offsets = pa.array([length] * PROMPTS, pa.int32()).to_numpy() * (np.arange(PROMPTS) > 0)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(length, np.int32)))
    table = pa.table({"prompt": pa.array(range(PROMPTS - 1), pa.int32()), "token_ids": lists})
    return _parquet(table, compression="zstd", use_dictionary=use_dictionary)


def _long_groups(length: int, rows: int) -> bytes:
    table = pq.read_table(io.BytesIO(good_files("gradients")[0]))
    table = pa.concat_tables([table] * (rows // len(table)))
    group = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(table), np.int32)), ["rock" * length])
    table = table.set_column(table.column_names.index("group"), "group", group)
    return _parquet(table.replace_schema_metadata(None), compression="zstd")


@functools.cache
def large_files(kind: str) -> list[bytes]:
    """Return whole files of some kB that take many times their size in memory."""
    if kind == "occurrences":
        return [_equal_rows(2**19)]
    if kind == "prompts":
        return [_long_prompts(10**5, True), _long_prompts(10**7, True), _long_prompts(10**7, False)]
    if kind == "gradients":
        return [_long_groups(10, 1200), _long_groups(25_000, 120_000)]
    return []


def broken_file(kind: str, seed: int, number: int) -> bytes:
    """Return the broken file of a kind that a seed and a number name."""
    rng = random.Random(f"{seed} {kind} {number}")
    content = rng.choice(good_files(kind))
    if FILES[kind].endswith(".json"):
        return mutated_json(rng, json.loads(content))
    if kind == "recipe":
        return mutated_yaml(rng, RECIPE, MARKER)
    if kind == "token_stats":
        return mutated_safetensors(rng, content)
    if number % 10 == 9:
        return rng.choice(large_files(kind) or [odd_parquet(rng, content)])
    if rng.random() < 0.3:
        return odd_parquet(rng, content)
    return damaged_parquet(rng, content)


# Checks


def check_rock_set(path: Path) -> None:
    """Load, save, load again, check against a tokenizer, and compute token weights."""
    rock_set = RockSet.load(path)
    rock_set.save(path.with_name("again.json"))
    assert RockSet.load(path.with_name("again.json")) == rock_set
    ids, controls = rock_set.ids, rock_set.controls
    assert ids.dtype == torch.int64
    assert len(ids.unique()) == len(ids)
    assert all(0 <= id < 2**63 for id in (*ids.tolist(), *(controls.ids if controls else ())))
    assert rock_set.token_share >= 0
    for size in (300, 2):
        try:
            rock_set.check(tokenizer(), size)
        except ValueError:
            continue
        weights = token_weights(torch.arange(size)[None], ids, rock_weight=0.0, window=1)
        assert weights[0, ids].eq(0).all()


def check_occurrences(path: Path) -> None:
    """Read all batches, and detect rocks by both scores as the command does."""
    file, last, rows = Occurrences(path), (-1, -1), 0
    for batch in file.batches():
        assert all(len(column) == len(batch["rollout"]) for column in batch.values())
        assert all(batch[name].dtype == np.int32 for name in ("rollout", "position", "token_id", "unit"))
        assert (batch["token_id"] >= 0).all()
        assert (batch["token_id"] < MAX_VOCABULARY).all()
        assert all(np.isfinite(batch[name]).all() for name in ("kl", "kl_pre") if name in batch)
        places = list(zip(batch["rollout"].tolist(), batch["position"].tolist(), strict=True))
        assert all(one < other for one, other in zip([last, *places], places, strict=False))
        last, rows = places[-1], rows + len(places)
    assert rows == file.rows
    assert len(file.units()) <= rows
    failed = None
    for score in ("context", "aggregate"):
        output = path.with_name(f"{score}.json")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                detect.run([str(path), "--output", str(output), "--score", score])
        except ValueError as error:
            failed = error
            continue
        found = RockSet.load(output)
        assert 0 < len(found.rocks) <= 100
        assert [rock.score for rock in found.rocks] == sorted((rock.score for rock in found.rocks), reverse=True)
    if failed is not None:
        raise failed


def check_prompts(path: Path) -> None:
    """Read the rollouts of good occurrences beside broken prompts."""
    good = path.with_name("occurrences.parquet")
    good.write_bytes(good_files("occurrences")[0])
    pairs, token_ids, _ = read_rollouts(Occurrences(good), path)
    assert len(pairs) == PROMPTS
    assert sum(rows.stop - rows.start for _, rows in pairs) == len(token_ids)
    assert all(prompt and all(type(id) is int for id in prompt) for prompt, _ in pairs)


def check_token_stats(path: Path) -> None:
    """Load, save and load again, and detect rocks and controls."""
    stats = TokenStats.load(path)
    stats.save(path.with_name("again"))
    again = TokenStats.load(path.with_name("again"))
    assert again.measure == stats.measure
    for name in (*COUNTS, *SUMS):
        assert torch.equal(getattr(again, name), getattr(stats, name))
        assert getattr(stats, name).isfinite().all()
    assert ((stats.count >= 0) & (stats.count <= stats.seen)).all()
    rocks = detect_rocks(stats, before=stats, top_k=5)
    rocks.save(path.with_name("rocks.json"))
    assert len(RockSet.load(path.with_name("rocks.json")).rocks) == len(rocks.rocks) <= 5
    controls = mass_matched_controls(stats, rocks, seed=0)
    assert not set(controls.ids) & set(rocks.ids.tolist())
    assert controls.matched == (0.95 <= controls.mass_ratio <= 1.05)
    dataclasses.replace(rocks, controls=controls).save(path.with_name("rocks.json"))


def check_recipe(path: Path) -> None:
    """Parse as `trl-opd train --config FILE` does."""
    environment = dict(os.environ)
    try:
        _, args, _, _ = parse(make_parser(), ["--config", str(path)])
        assert 0.0 <= args.rock_weight <= 1.0
        assert args.token_weighting in ("uniform", "rock", "control", "random")
    finally:
        os.environ.clear()
        os.environ.update(environment)


def check_report(path: Path) -> None:
    """Write the report of a folder that holds the file; an error must name the file."""
    if path.name == FILE_NAME:
        path.with_name("opd_run.json").write_bytes(good_files("run")[0])
    page = path.with_name("report.html")
    try:
        write_report(path.parent, page)
    except ValueError as error:
        if path.name not in str(error):
            raise AssertionError(f"The error does not name the file: {error}") from error
        raise
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")


CHECKS = {
    "rock_set": check_rock_set,
    "occurrences": check_occurrences,
    "prompts": check_prompts,
    "token_stats": check_token_stats,
    "recipe": check_recipe,
    **dict.fromkeys(("run", "knockout", "gradients", "samples", "summary"), check_report),
}


def read(kind: str, path: Path) -> None:
    """Read a file as the package does, and ignore warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CHECKS[kind](path)
