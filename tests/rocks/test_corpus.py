"""The two halves of a file: one selects rocks, the other is held out."""

import numpy as np

from trl_opd.artefacts.occurrences import Occurrences, write_occurrences
from trl_opd.rocks.corpus import read_selection, split_units

from tests.helpers.occurrence_columns import columns


def test_halves_are_of_prompts_or_without_prompts_of_rollouts(tmp_path):
    good = columns()
    good["prompt"] = np.array([7, 7, 7, 7, 3, 3, 9, 9])
    write_occurrences(tmp_path / "a.parquet", good, {})
    file = Occurrences(tmp_path / "a.parquet")
    assert [half.tolist() for half in split_units(file)] == [[3, 9], [7]]
    assert read_selection(file, split_units(file)[0]).rollout.tolist() == [2, 2, 3, 3]
    del good["prompt"]
    write_occurrences(tmp_path / "b.parquet", good, {})
    file = Occurrences(tmp_path / "b.parquet")
    assert [half.tolist() for half in split_units(file)] == [[0, 2], [1, 3]]
