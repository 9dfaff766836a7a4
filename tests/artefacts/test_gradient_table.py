"""The table of `trl-opd gradients`: what is written can be read, and lists in place of numbers are refused."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd.artefacts.gradient_table import read_gradients

from tests.helpers.report_folders import changed, gradients


def test_what_probe_and_gradients_really_write_can_be_read(tmp_path):
    from trl_opd.artefacts.gradient_table import Study, write_table

    class Names:
        def decode(self, ids):
            return str(ids[0])

    names = ("norm", "norm_unbiased", "norm_matched", "cos_balanced", "cos_balanced_without", "cos_matched", "mean_kl")
    columns = {"token_id": np.array([1, 2]), "group": np.array(["rock", "rare"]), "count": np.array([5.0, 3.0])}
    columns |= {"matched_count": np.array([3.0, 3.0]), "mean_kl_early": np.array([1.0, np.nan])}
    write_table(
        Study(columns | {name: np.array([0.5, np.nan]) for name in names}, 3, True), Names(), tmp_path / "g.parquet"
    )
    found = read_gradients(tmp_path / "g.parquet")
    assert found.has_early
    assert found.of("rock", "norm").tolist() == [0.5]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.list_(pa.float64())])
def test_gradients_of_lists_are_one_sentence(tmp_path, kind):
    name, values = ("group", ["rock"]) if kind.value_type == pa.string() else ("norm", [0.5])
    pq.write_table(changed(gradients(), name, [values] * 4, kind), tmp_path / "gradients.parquet")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "gradients.parquet"))):
        read_gradients(tmp_path / "gradients.parquet")
