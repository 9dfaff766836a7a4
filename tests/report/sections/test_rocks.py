"""The section of the rocks: its table is the rock set, its plots are the sweep and the families."""

import json
import shutil

import pytest

from trl_opd import RockSet
from trl_opd.report.blocks import Plot, Table
from trl_opd.report.contents import read_contents
from trl_opd.report.sections.rocks import rocks

from tests.helpers.report_folders import ROCKS
from tests.helpers.report_sections import of_kind, table


def test_the_table_of_rocks_is_the_rock_set(run_folder, tokenizer):
    contents, rock_set = read_contents(run_folder), RockSet.load(run_folder)
    rows = table(rocks(contents))
    assert [(row["rank"], row["id"], row["count"], row["mean KL"]) for row in rows] == [
        (rank, rock.id, rock.count, rock.mean_kl) for rank, rock in enumerate(rock_set.rocks, 1)
    ]
    assert [row["token"] for row in rows] == [tokenizer.decode([id]) for id in ROCKS]
    assert of_kind(rocks(contents), Table)[0].tool


def test_the_sweep_is_the_one_that_chose_the_cutoff_else_coverage_alone(collection, tmp_path):
    notes = " ".join(plot.note for plot in of_kind(rocks(read_contents(collection)), Plot))
    assert "The stability of this list was not measured" in notes
    shutil.copytree(collection, tmp_path / "c")
    content = json.loads((tmp_path / "c" / "rock_set.json").read_text())
    content["method"]["sweep"] = {"cutoffs": [10, 20], "coverage": [0.25, 0.5], "stability": {"50": [0.875, 0.75]}}
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    plots = of_kind(rocks(read_contents(tmp_path / "c")), Plot)
    assert any("overlap (Jaccard) of 50 rollouts" in plot.svg for plot in plots)
    content["method"]["sweep"]["coverage"] = [0.25]
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    assert not any("overlap (Jaccard)" in plot.svg for plot in of_kind(rocks(read_contents(tmp_path / "c")), Plot))


@pytest.mark.parametrize(
    "sweep", [{"cutoffs": [10**400]}, {"coverage": [10**400]}, {"stability": {"50": ["nan"]}}, {"cutoffs": [0]}]
)
def test_a_sweep_that_cannot_be_is_none(collection, tmp_path, sweep):
    shutil.copytree(collection, tmp_path / "c")
    content = json.loads((tmp_path / "c" / "rock_set.json").read_text())
    content["method"]["sweep"] = {"cutoffs": [10], "coverage": [0.25], "stability": {"50": [0.875]}} | sweep
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    plots = of_kind(rocks(read_contents(tmp_path / "c")), Plot)
    assert not any("overlap (Jaccard)" in plot.svg for plot in plots)


def test_without_a_tokenizer_names_are_those_of_the_rock_set(collection, tmp_path):
    shutil.copytree(collection, tmp_path / "c")
    content = json.loads((tmp_path / "c" / "rock_set.json").read_text())
    for rock in content["rocks"]:
        rock["text"] = f"t{rock['id']}"
    content["controls"]["texts"] = [f"c{id}" for id in content["controls"]["ids"]]
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    contents = read_contents(tmp_path / "c")
    section = rocks(contents)
    assert [row["token"] for row in table(section)] == [f"t{row['id']}" for row in table(section)]
    control = content["controls"]["ids"][0]
    others = set(range(300)) - {rock["id"] for rock in content["rocks"]} - {*content["controls"]["ids"]}
    assert contents.names.text_of(control) == f"c{control}"
    assert {contents.names.text_of(id) for id in others} == {None}
    assert of_kind(section, Plot)[-1].note.startswith("Only types whose text is in the rock set")
