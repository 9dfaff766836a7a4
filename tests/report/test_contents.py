"""Folders that are read for a report: a damaged, foreign or newer file is an error of one sentence."""

import json
import random
import resource
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd.artefacts.gradient_table import read_gradients
from trl_opd.artefacts.occurrences import Occurrences
from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.cli import main
from trl_opd.report.build import write_report
from trl_opd.report.contents import read_contents
from trl_opd.report.sections.evidence import arm_results
from trl_opd.report.sections.rocks import find_types
from trl_opd.report.sections.rollouts import rollouts
from trl_opd.report.sections.run import run_facts

from tests.helpers.report_folders import SUMMARY, changed, gradients, knockout, knockout_without, make_collection


def test_a_step_that_was_done_again_counts_once(copy):
    record = json.loads((copy / "opd_run.json").read_text())
    record["log"] = [{"step": 2, "kl/mean": 9.0}, {"step": 4, "kl/mean": 1.0}, {"step": 2, "kl/mean": 2.0}]
    (copy / "opd_run.json").write_text(json.dumps(record))
    assert read_contents(copy).main_run.curve("kl/mean") == [(2, 2.0), (4, 1.0)]


def break_file(folder, name: str, how) -> None:
    path = folder / name
    if callable(how):
        content = json.loads(path.read_text())
        how(content)
        how = json.dumps(content)
    path.write_bytes(how if isinstance(how, bytes) else how.encode())


def cut(folder, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


CASES = {
    "cut samples": (lambda folder: cut(folder, FILE_NAME), "rollout_samples.parquet is not a whole Parquet file"),
    "cut statistics": (lambda folder: cut(folder, "checkpoint-8/token_stats.safetensors"), "not token statistics"),
    "cut record": (lambda folder: cut(folder, "opd_run.json"), "opd_run.json: not the record of a run"),
    "empty record": (lambda folder: break_file(folder, "opd_run.json", ""), "not the record of a run"),
    "newer record": (
        lambda folder: break_file(folder, "opd_run.json", lambda content: content.update(version=2)),
        "version 2, this trl_opd reads version 1: upgrade it",
    ),
    "foreign record": (lambda folder: break_file(folder, "opd_run.json", "[]"), 'its "format" is not "trl_opd.run"'),
    "log without steps": (
        lambda folder: break_file(folder, "opd_run.json", lambda content: content.update(log=[{"loss": 1.0}])),
        '"log[0].step" is missing',
    ),
    "NaN": (
        lambda folder: break_file(folder, "opd_run.json", '{"format": "trl_opd.run", "version": 1, "a": NaN}'),
        "NaN",
    ),
    "deep": (lambda folder: break_file(folder, "opd_run.json", "[" * 100_000), "nested too deeply"),
    "newer rocks": (
        lambda folder: break_file(folder, "rock_set.json", lambda content: content.update(version=7)),
        "version 7",
    ),
    "knockout of others": (lambda folder: break_file(folder, "knockout.json", "{}"), "not the result of a probe"),
    "gradients of others": (
        lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "gradients.parquet"),
        "gradients.parquet: there must be one column 'count'",
    ),
    "samples of others": (
        lambda folder: pq.write_table(pa.table({"step": [1], "rollout": [0]}), folder / FILE_NAME),
        "there must be one column 'position'",
    ),
    "steps in words": (
        lambda folder: break_file(folder, "opd_run.json", lambda content: content.update(steps=["x"])),
        "opd_run.json: not the record of a run: run.steps is ['x'], not a whole number",
    ),
    "uncountable parameters": (
        lambda folder: break_file(
            folder, "opd_run.json", lambda content: content["student"].update(parameters=10**400)
        ),
        "student.parameters is a number of too many digits",
    ),
    "summary of others": (lambda folder: break_file(folder, "summary.json", "[]"), "not the summary of a demo"),
    "newer summary": (lambda folder: break_file(folder, "summary.json", '{"version": 2}'), "version 2, this trl_opd"),
    "knockout without labels": (
        lambda folder: break_file(folder, "knockout.json", json.dumps(knockout_without("label"))),
        'knockout.json: not the result of a probe: "arms[0].label" is missing',
    ),
    "knockout without intervals": (
        lambda folder: break_file(folder, "knockout.json", json.dumps(knockout_without("ci95"))),
        '"arms[0].ci95" is missing',
    ),
    "latin text": (lambda folder: break_file(folder, "opd_run.json", b'{"format": "\xe9"}'), "not the record of a run"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_none_is_one_sentence_and_the_old_report_stays(copy, capsys, case):
    (copy / "report.html").write_text("old")
    damage, sentence = CASES[case]
    damage(copy)
    assert main(["report", str(copy)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd report: error: ")
    assert sentence in error
    assert (copy / "report.html").read_text() == "old"
    assert not list(copy.glob("*.part")) + list(copy.glob(".*.part"))


def first(table: pa.Table, name: str, value) -> pa.Table:
    return changed(table, name, [value, *table[name].to_pylist()[1:]])


def newer(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({"trl_opd": '{"version": 99}'})


SAMPLES = {
    "newer": (newer, "has version 99, and this trl_opd reads up to 1: upgrade it"),
    "infinite": (lambda table: first(table, "kl", float("inf")), "row 0 has a kl that is not finite"),
    "infinite top": (
        lambda table: first(table, "teacher_top_p", [float("inf")] * 5),
        "row 0 has a teacher_top_p that is not finite",
    ),
    "null step": (lambda table: first(table, "step", None), "row 0 has no step"),
    "null list": (lambda table: first(table, "student_top_ids", None), "row 0 has no student_top_ids"),
    "null in a list": (
        lambda table: first(table, "student_top_ids", [1, None, 2, 3, 4]),
        "row 0 has no student_top_ids",
    ),
    "huge id": (
        lambda table: first(table, "token_id", 2**31 - 1),
        "row 0 has token_id 2147483647, outside of 0..4194303",
    ),
    "negative step": (lambda table: first(table, "step", -1), "row 0 has step -1, outside of 0..2147483647"),
    "prompts in words": (
        lambda table: changed(table, "prompt", ["a"] * len(table), pa.string()),
        "column 'prompt' holds string, not whole numbers",
    ),
    "two prompts": (lambda table: table.append_column("prompt", table["prompt"]), "there must be one column 'prompt'"),
    "lists of three": (
        lambda table: changed(table, "teacher_top_ids", [[1, 2, 3]] * len(table), pa.list_(pa.int32(), 3)),
        "column 'teacher_top_ids' must be lists of 5",
    ),
    "no entropy": (lambda table: table.drop_columns("entropy"), "there must be one column 'entropy'"),
    "rows apart": (lambda table: table.take([*range(1, len(table)), 0]), "the rows of a rollout do not stand together"),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_cannot_be_are_one_sentence(run_folder, tmp_path, capsys, case):
    record = json.loads((run_folder / "opd_run.json").read_text())
    (tmp_path / "opd_run.json").write_text(json.dumps(record | {"log": []}))
    damage, sentence = SAMPLES[case]
    pq.write_table(damage(pq.read_table(run_folder / FILE_NAME)), tmp_path / FILE_NAME)
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / FILE_NAME}" in error
    assert sentence in error
    assert {path.name for path in tmp_path.iterdir()} == {"opd_run.json", FILE_NAME}


COLLECTIONS = {
    "negative position": ("occurrences", lambda table: first(table, "position", -1), "row 0 has position -1"),
    "no kl": ("occurrences", lambda table: first(table, "kl", None), "row 0 has no kl"),
    "newer": ("occurrences", newer, "has version 99"),
    "infinite entropy": ("occurrences", lambda table: first(table, "entropy", float("inf")), "row 0 has a entropy"),
    "prompts of others": (
        "prompts",
        lambda table: table.drop_columns("token_ids"),
        "prompts.parquet: there must be one column 'token_ids'",
    ),
    "prompts in words": (
        "prompts",
        lambda table: changed(table, "prompt", [[1]] * len(table), pa.list_(pa.int32())),
        "column 'prompt' holds list",
    ),
}


@pytest.mark.parametrize("case", COLLECTIONS)
def test_a_collection_that_cannot_be_is_one_sentence(tmp_path, capsys, case):
    make_collection(tmp_path)
    name, damage, sentence = COLLECTIONS[case]
    path = tmp_path / f"{name}.parquet"
    pq.write_table(damage(pq.read_table(path)), path)
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(path) in error
    assert sentence in error
    assert not (tmp_path / "report.html").exists()


def test_the_occurrences_of_a_collection_are_checked(collection, tmp_path, capsys):
    shutil.copytree(collection, tmp_path / "c")
    found = pq.read_table(tmp_path / "c" / "occurrences.parquet")
    column = found.schema.names.index("kl")
    broken = found.set_column(column, found.schema.field(column), pa.array([float("nan")] * len(found), pa.float32()))
    pq.write_table(broken, tmp_path / "c" / "occurrences.parquet")
    assert Occurrences(tmp_path / "c" / "occurrences.parquet").rows == len(found)
    assert main(["report", str(tmp_path / "c")]) == 1
    assert "a divergence is finite and at least 0" in capsys.readouterr().err


# Damaged files


VALUES = (None, -1, 1e999, 1e300, "x", "", [], {}, True, 2**70, 10**400, "\ud800", [[1]], {"a": None})
NUMBERS = (None, -1, 0, 2**22, 2**31 - 1, -(2**31), float("nan"), float("inf"), 1e30, -1e30)
TYPES = (pa.string(), pa.list_(pa.int32()), pa.float64(), pa.uint64(), pa.bool_(), pa.list_(pa.int32(), 3))


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Return a file of JSON with a value swapped, or gone."""
    content = json.loads(data)
    places, holders = [], [content]
    while holders:
        holder = holders.pop()
        keys = list(holder) if isinstance(holder, dict) else range(min(len(holder), 4))
        places += [(holder, key) for key in keys]
        holders += [holder[key] for key in keys if isinstance(holder[key], (dict, list))]
    holder, key = draw.choice(places)
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(VALUES)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def mutate_table(data: bytes, draw: random.Random) -> bytes:
    """Return a Parquet file with a column dropped, doubled, renamed, of another type, or with values that cannot be."""
    table = pq.read_table(pa.BufferReader(data))
    name = draw.choice(table.schema.names)
    kind, place = table.schema.field(name).type, table.schema.names.index(name)
    match draw.randrange(6):
        case 0:
            table = table.remove_column(place)
        case 1:
            table = table.append_column(name, table[name])
        case 2:
            table = table.rename_columns(["else" if other == name else other for other in table.schema.names])
        case 3:
            kind = draw.choice(TYPES)
            value = [1, 1, 1] if pa.types.is_nested(kind) else "1" if kind == pa.string() else 1
            table = changed(table, name, [bool(value) if kind == pa.bool_() else value] * len(table), kind)
        case _:
            values, value = table[name].to_pylist(), draw.choice(NUMBERS)
            if pa.types.is_nested(kind) and value is not None:
                value = [value] * 5
            values[draw.randrange(len(values))] = value
            try:
                table = changed(table, name, values)
            except (pa.ArrowException, OverflowError, TypeError):  # no value of this type
                table = table.slice(0, 0)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def mutate(data: bytes, name: str, draw: random.Random) -> bytes:
    """Return a damaged copy of a file's bytes."""
    kind = draw.randrange(5)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind > 1 and name.endswith(".json"):
        return mutate_json(data, draw)
    if kind > 1 and name.endswith(".parquet"):
        return mutate_table(data, draw)
    changed_bytes = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed_bytes[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed_bytes)


def read_everything(folder) -> None:
    """Read what a report reads, without drawing it."""
    contents = read_contents(folder)
    find_types(contents)
    rollouts(contents)
    if contents.summary is not None:
        arm_results(contents)
    if contents.main_run is not None:
        run_facts(contents.main_run)
    if contents.gradients is not None:
        read_gradients(contents.gradients)


def fuzzed_folders(run_folder, folder) -> dict[Path, list[str]]:
    """Make folders of a run and of a collection, with all that a report takes, and return the files in each."""
    run, collected = folder / "run", folder / "collected"
    shutil.copytree(run_folder, run)
    (run / "knockout.json").write_text(json.dumps(knockout()))
    pq.write_table(gradients(), run / "gradients.parquet")
    for step in (2, 4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    collected.mkdir()
    make_collection(collected)
    (collected / "summary.json").write_text(json.dumps(SUMMARY))
    names = ["opd_run.json", "rock_set.json", "knockout.json", "gradients.parquet", FILE_NAME]
    names += ["checkpoint-8/token_stats.safetensors"]
    return {run: names, collected: ["occurrences.parquet", "prompts.parquet", "summary.json"]}


def test_damaged_files_are_read_or_told(run_folder, tmp_path):
    folders = fuzzed_folders(run_folder, tmp_path)
    places = [(folder, name) for folder, names in folders.items() for name in names]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw, told = random.Random(7), []
    for turn in range(270):
        folder, name = places[turn % len(places)]
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(mutate(data, name, draw))
        try:
            if turn % 30:
                read_everything(folder)
            else:
                write_report(folder, tmp_path / "page.html")
        except (ValueError, OSError) as error:
            told.append((Path(name).name, str(error)))
        finally:
            (folder / name).write_bytes(data)
    assert 90 < len(told) < 250
    assert not [sentence for name, sentence in told if name not in sentence]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB: a GB
