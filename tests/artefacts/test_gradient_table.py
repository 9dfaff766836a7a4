"""The table of `trl-opd gradients`: a written table can be read, and one with columns of lists is an error."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd.artefacts.gradient_table import MEDIANS, Study, read_gradients, write_table

from tests.helpers.report_folders import changed, gradients


def test_written_table_can_be_read(tmp_path, tokenizer):
    columns = {name: np.array([0.5, np.nan]) for name in (*MEDIANS, "mean_kl", "mean_kl_early")}
    columns |= {"token_id": np.array([1, 2]), "group": np.array(["rock", "rare"]), "count": np.array([5.0, 3.0])}
    columns["matched_count"] = np.array([3.0, 3.0])
    write_table(Study(columns, matched=3, has_early=True), tokenizer, tmp_path / "g.parquet")
    found = read_gradients(tmp_path / "g.parquet")
    assert found.has_early
    assert found.of("rock", "norm").tolist() == [0.5]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.list_(pa.float64())])
def test_column_of_lists_is_an_error_that_names_the_file(tmp_path, kind):
    name, values = ("group", ["rock"]) if kind.value_type == pa.string() else ("norm", [0.5])
    pq.write_table(changed(gradients(), name, [values] * 4, kind), tmp_path / "gradients.parquet")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "gradients.parquet"))):
        read_gradients(tmp_path / "gradients.parquet")
