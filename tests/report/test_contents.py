"""Reading the folder of a report: a broken, foreign or newer file is a one-line error."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.cli import main
from trl_opd.report.contents import read_contents

from tests.helpers.report_folders import changed, knockout_without, make_collection

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.slow
def test_curve_keeps_the_last_value_of_a_repeated_step(copy):
    record = json.loads((copy / "opd_run.json").read_text())
    record["log"] = [{"step": 2, "kl/mean": 9.0}, {"step": 4, "kl/mean": 1.0}, {"step": 2, "kl/mean": 2.0}]
    (copy / "opd_run.json").write_text(json.dumps(record))
    assert read_contents(copy).main_run.curve("kl/mean") == [(2, 2.0), (4, 1.0)]


def change(**entries):
    """Return a function that changes entries of a JSON file's content."""
    return lambda content: content | entries


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


RUN = "opd_run.json"
# What is wrong -> file, its new content (bytes, JSON, or a function of the old bytes or JSON), part of the message
CASES = {
    "cut samples": (FILE_NAME, cut, "rollout_samples.parquet is not a complete Parquet file"),
    "cut statistics": ("checkpoint-8/token_stats.safetensors", cut, "not token statistics"),
    "cut record": (RUN, cut, "opd_run.json: not the record of a run"),
    "empty record": (RUN, b"", "not the record of a run"),
    "newer record": (RUN, change(version=2), "version 2, this trl_opd reads version 1: upgrade trl_opd"),
    "foreign record": (RUN, [], 'its "format" is not "trl_opd.run"'),
    "log without steps": (RUN, change(log=[{"loss": 1.0}]), '"log[0].step" is missing'),
    "NaN": (RUN, {"format": "trl_opd.run", "version": 1, "a": float("nan")}, "NaN"),
    "deep": (RUN, b"[" * 100_000, "nested too deeply"),
    "newer rocks": ("rock_set.json", change(version=7), "version 7"),
    "foreign knockout": ("knockout.json", {}, "not the result of a probe"),
    "foreign gradients": ("gradients.parquet", pa.table({"a": [1]}), "gradients.parquet: there must be one column"),
    "foreign samples": (FILE_NAME, pa.table({"step": [1], "rollout": [0]}), "there must be one column 'position'"),
    "steps in words": (RUN, change(steps=["x"]), "not the record of a run: run.steps is ['x'], not a whole number"),
    "uncountable parameters": (
        RUN,
        lambda content: content | {"student": content["student"] | {"parameters": 10**400}},
        "student.parameters is a number of too many digits",
    ),
    "start in words": (
        RUN,
        lambda content: content | {"student": content["student"] | {"starts_at_base": "no"}},
        "student.starts_at_base is 'no', not true or false",
    ),
    "foreign summary": ("summary.json", [], "not the summary of a demo"),
    "newer summary": ("summary.json", {"version": 2}, "version 2, this trl_opd"),
    "knockout without labels": ("knockout.json", knockout_without("label"), '"arms[0].label" is missing'),
    "knockout without intervals": ("knockout.json", knockout_without("ci95"), '"arms[0].ci95" is missing'),
    "latin text": (RUN, b'{"format": "\xe9"}', "not the record of a run"),
}


def damage(path, content) -> None:
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
        return
    if content is cut:
        content = cut(path.read_bytes())
    elif callable(content):
        content = content(json.loads(path.read_text()))
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def error_of_report(folder, capsys) -> str:
    """Return the last line of the error of `trl-opd report`, which must not write anything."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["report", str(folder)]) == 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd report: error: ")
    return error


@pytest.mark.parametrize(("name", "content", "reason"), CASES.values(), ids=CASES)
@pytest.mark.slow
def test_broken_file_is_a_one_line_error_and_keeps_the_old_report(copy, capsys, name, content, reason):
    (copy / "report.html").write_text("old")
    damage(copy / name, content)
    assert reason in error_of_report(copy, capsys)
    assert (copy / "report.html").read_text() == "old"


def first(name: str, value):
    """Return a function that changes the first value of a table's column."""
    return lambda table: changed(table, name, [value, *table[name].to_pylist()[1:]])


def column(name: str, value, kind: pa.DataType):
    """Return a function that fills a table's column with one value of another type."""
    return lambda table: changed(table, name, [value] * len(table), kind)


def without(name: str):
    """Return a function that removes a table's column."""
    return lambda table: table.drop_columns(name)


def newer(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({"trl_opd": '{"version": 99}'})


INF = float("inf")
THREE = pa.list_(pa.int32(), 3)
SAMPLES = {
    "newer": (newer, "has version 99, and this trl_opd reads up to version 1: upgrade trl_opd"),
    "infinite": (first("kl", INF), "row 0 has a kl that is not finite"),
    "infinite top": (first("teacher_top_p", [INF] * 5), "row 0 has a teacher_top_p that is not finite"),
    "null step": (first("step", None), "row 0 has no step"),
    "null list": (first("student_top_ids", None), "row 0 has no student_top_ids"),
    "null in a list": (first("student_top_ids", [1, None, 2, 3, 4]), "row 0 has no student_top_ids"),
    "huge id": (first("token_id", 2**31 - 1), "row 0 has token_id 2147483647, outside of 0..4194303"),
    "negative step": (first("step", -1), "row 0 has step -1, outside of 0..2147483647"),
    "prompts in words": (column("prompt", "a", pa.string()), "column 'prompt' holds string, not whole numbers"),
    "two prompts": (lambda table: table.append_column("prompt", table["prompt"]), "there must be one column 'prompt'"),
    "lists of three": (column("teacher_top_ids", [1, 2, 3], THREE), "column 'teacher_top_ids' must be lists of 5"),
    "no entropy": (without("entropy"), "there must be one column 'entropy'"),
    "rows apart": (
        lambda table: table.take([*range(1, len(table)), 0]),
        "the rows of a rollout are not next to each other",
    ),
}


@pytest.mark.parametrize(("change", "reason"), SAMPLES.values(), ids=SAMPLES)
def test_impossible_sampled_rollouts_are_a_one_line_error(run_folder, tmp_path, capsys, change, reason):
    record = json.loads((run_folder / RUN).read_text())
    (tmp_path / RUN).write_text(json.dumps(record | {"log": []}))
    pq.write_table(change(pq.read_table(run_folder / FILE_NAME)), tmp_path / FILE_NAME)
    error = error_of_report(tmp_path, capsys)
    assert f"{tmp_path / FILE_NAME}" in error
    assert reason in error


COLLECTIONS = {
    "negative position": ("occurrences", first("position", -1), "row 0 has position -1"),
    "no kl": ("occurrences", first("kl", None), "row 0 has no kl"),
    "NaN as kl": ("occurrences", first("kl", float("nan")), "a divergence is finite and at least 0"),
    "newer": ("occurrences", newer, "has version 99"),
    "infinite entropy": ("occurrences", first("entropy", INF), "row 0 has a entropy"),
    "foreign prompts": ("prompts", without("token_ids"), "prompts.parquet: there must be one column 'token_ids'"),
    "prompts in words": ("prompts", column("prompt", [1], pa.list_(pa.int32())), "column 'prompt' holds list"),
}


@pytest.mark.parametrize(("name", "change", "reason"), COLLECTIONS.values(), ids=COLLECTIONS)
def test_impossible_collection_is_a_one_line_error(tmp_path, capsys, name, change, reason):
    make_collection(tmp_path)
    path = tmp_path / f"{name}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    error = error_of_report(tmp_path, capsys)
    assert str(path) in error
    assert reason in error
