"""A folder -> its report: every part shows what the files hold, and a bad file is an error of one sentence."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

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
from trl_opd.rocks.families import family_of

from tests.helpers.full_disk import full_disk
from tests.helpers.report_folders import SUMMARY, knockout
from tests.helpers.report_sections import of_kind, table
from tests.helpers.tiny import make_config, make_dataset, make_model
from tests.helpers.trainers import Stop

ALL_PARTS = ["What was run", "Training", "Rocks", "Rollouts"]


class Parsed(HTMLParser):
    """What a page holds: labels of its figures and rows of its tables by section, its articles, its JSON."""

    def __init__(self, path):
        super().__init__()
        self.figures, self.tables, self.articles, self.data = {}, {}, [], []
        self._section = self._tag = self._text = self._is_json = None
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs, self._tag, self._text = dict(attrs), tag, ""
        if tag == "section":
            self._section = attrs["id"]
            self.figures[self._section], self.tables[self._section] = [], []
        elif attrs.get("class") == "plot":
            self.figures[self._section].append(attrs["aria-label"])
        elif tag == "table":
            self.tables[self._section].append([])
        elif tag == "tr":
            self.tables[self._section][-1].append([])
        self._is_json = attrs.get("type") == "application/json"

    def handle_data(self, data):
        self._text = (self._text or "") + data

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.tables[self._section][-1][-1].append(self._text)
        elif tag in ("h3", "h4") and self._text.startswith("Rollout "):
            self.articles.append(int(self._text.removeprefix("Rollout ")))
        elif tag == "script" and self._is_json:
            self.data += json.loads(self._text)["rollouts"]


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    """The page of that run, parsed."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_report(run_folder, path)
    return Parsed(path)


# What a run left


def test_the_page_of_a_run_has_these_figures(page, run_folder):
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
    assert page.figures.keys() == starts.keys()
    for part, found in page.figures.items():
        assert len(found) == len(starts[part])
        assert all(label.startswith(start) for label, start in zip(found, starts[part], strict=True))


def test_the_rows_of_the_page_are_the_rock_set(page, run_folder, tokenizer):
    (rows,) = page.tables["rocks"]
    assert rows[0] == ["rank", "token", "id", "family", "count", "mean KL", "score"]
    for rank, (row, rock) in enumerate(zip(rows[1:], RockSet.load(run_folder).rocks, strict=True), 1):
        family = family_of(tokenizer.decode([rock.id]))
        assert [row[0], *row[2:]] == [str(rank), str(rock.id), family, str(rock.count), f"{rock.mean_kl:.4f}", "10"]


def test_the_figures_of_tokens_in_the_page_are_the_rows_of_the_file(page, run_folder):
    rows = pq.read_table(run_folder / FILE_NAME).to_pandas()
    groups = list(rows.groupby(["step", "rollout"]))
    assert page.articles == [rollout for (_, rollout), _ in groups]
    for found, (_, mine) in zip(page.data, groups, strict=True):
        assert found["id"] == mine["token_id"].tolist()
        for name in ("kl", "kl_pre", "entropy", "weight", "student_p", "teacher_p"):
            np.testing.assert_allclose(found[name], mine[name], rtol=1e-3)
        assert found["student_top_id"] == np.concatenate(mine["student_top_ids"].to_list()).tolist()
        np.testing.assert_allclose(found["teacher_top_p"], np.concatenate(mine["teacher_top_p"].to_list()), rtol=1e-3)


def test_a_run_has_every_part_that_it_has_data_for(run_folder, tmp_path):
    assert write_report(run_folder, tmp_path / "page.html") == ALL_PARTS
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for part in ("run", "training", "rocks", "rollouts"):
        assert f'<section id="{part}"' in text
    assert 'id="evidence"' not in text
    assert len(text) < 5 * 2**20
    assert not re.search(r'(?:src|href)="(?!#|data:,)', text), "nothing is requested from anywhere"


def test_a_run_that_was_killed_shows_its_parts(tokenizer, tmp_path):
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


def test_a_run_that_went_on_from_before_its_first_rollouts_has_none(copy):
    table = pq.read_table(copy / FILE_NAME)
    pq.write_table(table.filter(pa.compute.greater(table["step"], 4)), copy / FILE_NAME)
    keep_up_to(copy, 2)
    assert write_report(copy, copy / "report.html") == ["What was run", "Training", "Rocks"]


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        (FILE_NAME, ["What was run", "Training", "Rocks"]),
        ("rock_set.json", ["What was run", "Training", "Token types", "Rollouts"]),
        ("opd_run.json", ["Rocks"]),
    ],
)
def test_a_part_without_data_is_left_out(copy, gone, left):
    (copy / gone).unlink()
    assert write_report(copy, copy / "report.html") == left


# Arms and collections


def test_arms_are_told_apart_and_compared(run_folder, tmp_path):
    for arm in ("uniform", "rock"):
        shutil.copytree(run_folder, tmp_path / arm)
    shutil.copy(run_folder / "rock_set.json", tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert write_report(tmp_path, tmp_path / "report.html") == [*ALL_PARTS, "Evidence"]
    contents = read_contents(tmp_path)
    assert list(contents.runs) == ["uniform", "rock"]
    first, second = table(evidence(contents))
    assert (first["arm"], first["accuracy"], first["difference to uniform"]) == ("uniform", 0.75, None)
    assert (second["arm"], second["difference to uniform"], second["from "], second["tokens frozen"]) == (
        "rock",
        -0.25,
        None,
        0.25,
    )
    assert "student at the start 0.125" in of_kind(what_was_run(contents), Note)[0].text
    assert len(of_kind(rollouts(contents), Rollouts)) == 2


def test_a_collection_shows_its_types_rocks_sweep_and_rollouts(collection, tmp_path):
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


def test_a_folder_of_nothing_and_an_output_of_nowhere_are_one_sentence(run_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    for flags, sentence in (
        ([tmp_path / "nowhere"], "There is no folder"),
        ([tmp_path / "empty"], "holds nothing to report"),
        ([tmp_path / "foreign"], "holds nothing to report"),
        ([run_folder, "--output", tmp_path / "nowhere" / "a.html"], "There is no folder"),
        ([run_folder, "--output", tmp_path / "foreign" / "notes.txt" / "a.html"], "There is no folder"),
        ([run_folder, "--output", tmp_path], "is a folder: name a file"),
        ([run_folder, "--output", run_folder / "opd_run.json"], "is an HTML file: name one that ends in .html"),
        ([run_folder, "--output", ""], "--output takes a path"),
    ):
        assert main(["report", *map(str, flags)]) == 1
        assert sentence in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["notes.txt"]
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2


def test_where_the_page_does_not_fit_the_old_one_stays(tmp_path, capsys):
    (tmp_path / "knockout.json").write_text(json.dumps(knockout()))
    (tmp_path / "report.html").write_text("old")
    with full_disk(room=2**12):
        assert main(["report", str(tmp_path)]) == 1
    assert "File too large" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"knockout.json", "report.html"}


def test_the_command_says_what_it_wrote_and_where(run_folder, tmp_path, capsys):
    assert main(["report", str(run_folder), "--output", str(tmp_path / "page.html")]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("What was run, Training, Rocks, Rollouts: the report is in")
    assert str(tmp_path / "page.html") in line
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_hostile_tokens_reach_the_page_as_text_only(copy, tokenizer):
    content = json.loads((copy / "rock_set.json").read_text())
    hostile = [
        "</script><script>alert(1)</script>",
        "\u202e\u2066",
        "\ud800",
        "\x00\x1b[31m",
        "x" * 100_000,
        "<img src=x onerror=y>",
    ]
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
