"""Tests of the evidence section: effects of forbidding tokens, norms of gradients, and both ends of long lists."""

import json

import pyarrow.parquet as pq
import pytest

from trl_opd.report.blocks import Facts, Table
from trl_opd.report.contents import read_contents
from trl_opd.report.sections.evidence import MOST_ARMS, evidence
from trl_opd.report.sections.rocks import MOST_ROCKS, rocks

from tests.helpers.report_folders import gradients, knockout
from tests.helpers.report_sections import of_kind, table
from tests.helpers.rock_sets import rock_file

pytestmark = pytest.mark.usefixtures("undrawn")


def test_evidence_shows_the_results_of_probe_and_gradients(copy):
    (copy / "knockout.json").write_text(json.dumps(knockout()))
    pq.write_table(gradients(), copy / "gradients.parquet")
    contents = read_contents(copy)
    section = evidence(contents)
    effects, medians = table(section, 0), table(section, 1)
    assert [(row["token"], row["effect"], row["p (BH)"], row["label"]) for row in effects] == [
        ("So", -0.25, 0.002, "pillar"),
        ("all rocks", -0.25, None, None),
    ]
    assert (medians[0]["types"], medians[0]["number"], medians[0]["norm"]) == ("rocks", 2, 0.2)
    assert medians[1]["norm"] is None
    facts = dict(of_kind(section, Facts)[0].rows)
    assert facts["do rocks differ from mass-matched controls?"].startswith("not tested")
    assert facts["baseline"] == "mean reward 0.500 (no interval) on 100 problems"
    assert [row["role"] for row in table(rocks(contents))][:2] == ["pillar", None]


def test_long_lists_show_the_first_rocks_and_both_ends_of_the_effects_and_say_so(tmp_path):
    rock_file(tmp_path / "rock_set.json", list(range(MOST_ROCKS + 500)))
    content = knockout()
    content["arms"] = [content["arms"][0] | {"ids": [id], "effect": id * 1e-4} for id in range(MOST_ARMS + 500)]
    (tmp_path / "knockout.json").write_text(json.dumps(content))
    contents = read_contents(tmp_path)
    section = rocks(contents)
    assert [row["id"] for row in table(section)] == list(range(MOST_ROCKS))
    assert of_kind(section, Table)[0].caption.startswith(f"The first {MOST_ROCKS} of {MOST_ROCKS + 500} rocks in rank")
    effects = [row["effect"] for row in table(evidence(contents))]
    assert len(effects) == MOST_ARMS
    assert (effects[0], effects[-1]) == (0.0, pytest.approx((MOST_ARMS + 499) * 1e-4))
    assert of_kind(evidence(contents), Table)[0].caption.endswith(f"{MOST_ARMS // 2} at each end of {MOST_ARMS + 500}")
