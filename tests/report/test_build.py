"""Writing the report of a folder: each section shows what the files hold, and wrong input is a one-line error."""

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd import OPDTrainer, RockSet, RolloutSamples
from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.artefacts.sampled_rollouts import keep_up_to
from trl_opd.cli import main
from trl_opd.report.blocks import Note, Rollouts
from trl_opd.report.build import write_report
from trl_opd.report.contents import read_contents
from trl_opd.report.sections.evidence import evidence
from trl_opd.report.sections.rocks import find_types
from trl_opd.report.sections.rollouts import rollouts
from trl_opd.report.sections.run import what_was_run
from trl_opd.report.text import named
from trl_opd.rocks.families import family_of

from tests.helpers.full_disk import full_disk
from tests.helpers.html_tree import Html
from tests.helpers.report_folders import SUMMARY, knockout
from tests.helpers.report_sections import of_kind, table
from tests.helpers.tiny import make_config, make_dataset, make_model
from tests.helpers.trainers import Stop

ALL_PARTS = ["What was run", "Training", "Rocks", "Rollouts"]


@pytest.fixture(scope="module")
def reported(run_folder, tmp_path_factory):
    """Run `trl-opd report` on that run, and return the path of the page and what was printed on stdout and stderr."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(["report", str(run_folder), "--output", str(path)]) == 0
    return path, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def page(reported):
    """The page of that run as a tree."""
    return Html(reported[0].read_text(encoding="utf-8")).root


# What a run left


@pytest.mark.slow
def test_page_of_a_run_has_these_plots(page, run_folder):
    record = json.loads((run_folder / "opd_run.json").read_text())
    accuracy = [line["eval_accuracy"] for line in record["log"] if "eval_accuracy" in line][-1]
    starts = {
        "run": ["Mean seconds of an optimizer step by phase. rock: "],
        "training": [
            "Mean KL(student ‖ teacher) of rocks, controls and the rest over steps",
            f"Accuracy over steps; at the end: rock {accuracy:.3f}",
            "Entropy",
            "Length",
            "Completions cut",
            "Repetition",
            "Padding",
        ],
        "rocks": ["Mean KL over count of ", "Mean KL of each type after over before", "Share of the", "Families"],
        "rollouts": [],
    }
    assert [section.attributes["id"] for section in page.all("section")] == list(starts)
    for section in page.all("section"):
        plots = [one.attributes for one in section if one.attributes.get("class") == "plot"]
        for plot, start in zip(plots, starts[section.attributes["id"]], strict=True):
            assert plot["aria-label"].startswith(start)


def test_table_of_the_page_has_the_rows_of_the_rock_set(page, run_folder, tokenizer):
    (section,) = [one for one in page.all("section") if one.attributes["id"] == "rocks"]
    head, *rows = [[cell.text for cell in row.all("th", "td")] for row in section.all("tr")]
    assert head == ["rank", "token", "id", "family", "count", "mean KL", "score"]
    for rank, (row, rock) in enumerate(zip(rows, RockSet.load(run_folder).rocks, strict=True), 1):
        text = tokenizer.decode([rock.id])
        numbers = [str(rock.count), f"{rock.mean_kl:.4f}", "10"]
        assert row == [str(rank), named(text), str(rock.id), family_of(text), *numbers]


def test_report_of_a_run_is_small_and_requests_nothing(reported):
    path, out, err = reported
    assert "report: " in err, "the progress bar"
    assert out.splitlines()[-1].startswith(f"{', '.join(ALL_PARTS)}: the report is in {path}")
    assert [path.name for path in path.parent.iterdir()] == ["page.html"]
    text = path.read_text(encoding="utf-8")
    assert len(text) < 5 * 2**20
    assert not re.search(r'(?:src|href)="(?!#|data:,)', text)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_interrupted_run_shows_what_it_has(tokenizer, tmp_path):
    trainer = OPDTrainer(
        model=make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(tmp_path, max_steps=6, save_strategy="steps", save_steps=2),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        callbacks=[RolloutSamples(1), Stop(5)],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    parts = write_report(tmp_path, tmp_path / "report.html")
    assert parts == ["What was run", "Training", "Token types", "Rollouts"]
    (block,) = of_kind(rollouts(read_contents(tmp_path)), Rollouts)
    assert [one.step for one in block.rollouts] == [1, 2, 3, 4, 5]


def test_run_resumed_from_before_its_first_rollouts_shows_none(copy):
    table = pq.read_table(copy / FILE_NAME)
    pq.write_table(table.filter(pa.compute.greater(table["step"], 4)), copy / FILE_NAME)
    keep_up_to(copy, 2)
    assert rollouts(read_contents(copy)) is None


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("gone", "left"),
    [
        (FILE_NAME, ["What was run", "Training", "Rocks"]),
        ("rock_set.json", ["What was run", "Training", "Token types", "Rollouts"]),
        ("opd_run.json", ["Rocks"]),
    ],
)
@pytest.mark.slow
def test_section_without_data_is_left_out(copy, gone, left):
    (copy / gone).unlink()
    assert write_report(copy, copy / "report.html") == left


# Arms and collections


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_arms_are_shown_apart_and_compared(run_folder, tmp_path):
    for arm in ("uniform", "rock"):
        shutil.copytree(run_folder, tmp_path / arm)
    shutil.copy(run_folder / "rock_set.json", tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert write_report(tmp_path, tmp_path / "report.html") == [*ALL_PARTS, "Evidence"]
    contents = read_contents(tmp_path)
    assert list(contents.runs) == ["uniform", "rock"]
    first, second = table(evidence(contents))
    assert (first["arm"], first["accuracy"], first["difference to uniform"]) == ("uniform", 0.75, None)
    names = ["arm", "difference to uniform", "from ", "tokens frozen"]
    assert [second[name] for name in names] == ["rock", -0.25, None, 0.25]
    assert "student at the start 0.125" in of_kind(what_was_run(contents), Note)[0].text
    assert len(of_kind(rollouts(contents), Rollouts)) == 2


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_collection_shows_its_types_rocks_sweep_and_rollouts(collection, tmp_path):
    contents = read_contents(collection)
    assert write_report(collection, tmp_path / "page.html") == ["What was run", "Rocks", "Rollouts"]
    rows = pq.read_table(collection / "occurrences.parquet").to_pandas()
    types, means = find_types(contents), rows.groupby("token_id")[["kl", "kl_pre"]].mean()
    np.testing.assert_allclose(types.mean_kl[means.index], means["kl"], rtol=1e-5)
    np.testing.assert_allclose(types.before[means.index], means["kl_pre"], rtol=1e-5)
    np.testing.assert_array_equal(types.count[means.index], rows.groupby("token_id").size())
    (block,) = of_kind(rollouts(contents), Rollouts)
    for one in block.rollouts:
        mine = rows[rows["rollout"] == one.rollout]
        assert one.token_ids.tolist() == mine["token_id"].tolist()
        np.testing.assert_allclose(one.kl, mine["kl"])
    assert "No tokenizer of these ids" in of_kind(rollouts(contents), Note)[-1].text


# Wrong input


@pytest.fixture
def foreign(tmp_path):
    """A folder with nothing of this package, and next to it an empty one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["nowhere"], "There is no folder"),
        (["empty"], "holds nothing to report"),
        (["foreign"], "holds nothing to report"),
        (["RUN", "--output", "nowhere/a.html"], "There is no folder"),
        (["RUN", "--output", "foreign/notes.txt/a.html"], "There is no folder"),
        (["RUN", "--output", "."], "is a folder: name a file"),
        (["RUN", "--output", "RUN/opd_run.json"], "is an HTML file: name one that ends in .html"),
        (["RUN", "--output", ""], "--output takes a path"),
    ],
)
def test_wrong_folder_or_output_is_a_one_line_error(run_folder, foreign, monkeypatch, capsys, flags, reason):
    monkeypatch.chdir(foreign)
    assert main(["report", *(flag.replace("RUN", str(run_folder)) for flag in flags)]) == 1
    assert reason in capsys.readouterr().err
    assert [path.name for path in (foreign / "foreign").iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("undrawn")
def test_full_disk_keeps_the_old_report(tmp_path, capsys):
    (tmp_path / "knockout.json").write_text(json.dumps(knockout()))
    (tmp_path / "report.html").write_text("old")
    with full_disk(room=2**12):
        assert main(["report", str(tmp_path)]) == 1
    assert "File too large" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"knockout.json", "report.html"}


@pytest.mark.slow
def test_hostile_tokens_reach_the_page_as_text_only(copy, tokenizer):
    content = json.loads((copy / "rock_set.json").read_text())
    hostile = ["</script><script>alert(1)</script>", "\u202e\u2066", "\ud800", "\x00\x1b[31m"]
    hostile += ["x" * 100_000, "<img src=x onerror=y>"]
    for rock, text in zip(content["rocks"], hostile, strict=False):
        rock["text"] = text
    (copy / "rock_set.json").write_text(json.dumps(content))
    write_report(copy, copy / "report.html")
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img" not in text
    assert not {"\u202e", "\u2066", "\x00", "\x1b"} & set(text)
    assert "x" * 1000 not in text
    assert "alert(1)" in text
