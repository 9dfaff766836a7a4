"""Tests of the sections about a run: facts and plots are those of its record."""

import json

import pytest
import torch

from trl_opd import TokenStats
from trl_opd.report.blocks import Facts
from trl_opd.report.contents import read_contents
from trl_opd.report.sections.run import training, what_was_run
from trl_opd.report.token_types import kind_means

from tests.helpers.report_folders import CONTROLS, ROCKS
from tests.helpers.report_sections import labels, of_kind

pytestmark = pytest.mark.usefixtures("undrawn")


def test_facts_of_a_run_are_those_of_its_record(run_folder):
    record = json.loads((run_folder / "opd_run.json").read_text())
    facts = dict(of_kind(what_was_run(read_contents(run_folder)), Facts)[0].rows)
    assert facts["command"] == record["command"]
    assert "LORA of rank 4" in facts["student"]
    assert facts["steps"] == "8 of 8"
    assert facts["seed"] == "7"
    assert facts["divergence"] == "KL(student ‖ teacher)"
    assert "token_weighting rock" in facts["other settings"]
    assert f"torch {torch.__version__}" in facts["versions"]


def test_phases_are_means_over_the_log(run_folder):
    contents = read_contents(run_folder)
    seconds = [line["phase/generate_s"] for line in contents.main_run.log if "phase/generate_s" in line]
    assert f"generate {sum(seconds) / len(seconds):.3g} s" in labels(what_was_run(contents))


def test_accuracy_that_was_measured_twice_counts_once_with_the_last_value(copy):
    record = json.loads((copy / "opd_run.json").read_text())
    record["log"] += [{"step": 8, "eval_accuracy": 0.125}]
    (copy / "opd_run.json").write_text(json.dumps(record))
    contents = read_contents(copy)
    assert "at the end: rock 0.125" in labels(training(contents))
    assert [step for step, _ in contents.main_run.curve("eval_accuracy")] == [0, 4, 8]


def test_divergence_by_kind_comes_from_the_checkpoints_if_it_is_not_logged(copy):
    record = json.loads((copy / "opd_run.json").read_text())
    record["log"] = [{name: v for name, v in line.items() if "mean_kl" not in name} for line in record["log"]]
    (copy / "opd_run.json").write_text(json.dumps(record))
    contents = read_contents(copy)
    assert "of rocks, controls and the rest" in labels(training(contents))
    points = kind_means(contents.main_run.windows, ROCKS, CONTROLS)
    assert [step for step, *_ in points] == [2, 4, 6, 8]
    stats = TokenStats.load(copy / "checkpoint-8")
    measured = (stats.count > 0).double() * stats.seen
    mean = stats.mean_kl.nan_to_num(0.0)
    assert points[-1][1] == pytest.approx(float((mean * measured)[ROCKS].sum() / measured[ROCKS].sum()))
