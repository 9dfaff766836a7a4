"""Tests of the rocks section: its table is the rock set, and its plots show the sweep and the families."""

import json
import shutil

import pytest

from trl_opd.report.blocks import Plot
from trl_opd.report.contents import read_contents
from trl_opd.report.sections.rocks import rocks

from tests.helpers.report_sections import of_kind, table

pytestmark = pytest.mark.usefixtures("undrawn")

SWEEP = {"cutoffs": [10, 20], "coverage": [0.25, 0.5], "stability": {"50": [0.875, 0.75]}}


@pytest.fixture
def changed(collection, tmp_path):
    """Return a function that copies the collection, passes its rock set to a function that changes it, and reads it."""

    def change(function):
        folder = shutil.copytree(collection, tmp_path / "c")
        content = json.loads((folder / "rock_set.json").read_text())
        function(content)
        (folder / "rock_set.json").write_text(json.dumps(content))
        return read_contents(folder)

    return change


def has_overlap(contents) -> bool:
    """Return whether a plot shows the stability of a stored sweep."""
    return any("overlap (Jaccard) of 50 rollouts" in plot.svg for plot in of_kind(rocks(contents), Plot))


def test_without_a_stored_sweep_coverage_is_shown_alone(collection):
    contents = read_contents(collection)
    notes = " ".join(plot.note for plot in of_kind(rocks(contents), Plot))
    assert "The stability of this list was not measured" in notes
    assert not has_overlap(contents)


def test_stored_sweep_is_shown_with_its_stability(changed):
    assert has_overlap(changed(lambda content: content["method"].update(sweep=SWEEP)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"cutoffs": [10**400, 20]},
        {"coverage": [10**400, 0.5]},
        {"stability": {"50": ["nan", 0.75]}},
        {"cutoffs": [0, 20]},
        {"coverage": [0.25]},
    ],
)
def test_invalid_stored_sweep_is_ignored(changed, wrong):
    assert not has_overlap(changed(lambda content: content["method"].update(sweep=SWEEP | wrong)))


def test_without_a_tokenizer_names_are_those_of_the_rock_set(changed):
    known = {}

    def name(content):
        for rock in content["rocks"]:
            rock["text"] = f"t{rock['id']}"
        content["controls"]["texts"] = [f"c{id}" for id in content["controls"]["ids"]]
        known.update((rock["id"], rock["text"]) for rock in content["rocks"])
        known.update(zip(content["controls"]["ids"], content["controls"]["texts"], strict=True))

    contents = changed(name)
    section = rocks(contents)
    assert [row["token"] for row in table(section)] == [f"t{row['id']}" for row in table(section)]
    assert {id: contents.names.text_of(id) for id in range(300)} == dict.fromkeys(range(300)) | known
    assert of_kind(section, Plot)[-1].note.startswith("Only types whose text is in the rock set")
