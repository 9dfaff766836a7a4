"""A file of occurrences has the promised columns, types and metadata."""

import json

import numpy as np
import pyarrow.parquet as pq

from trl_opd.artefacts.occurrences import SCHEMA, write_occurrences

from tests.helpers.occurrence_columns import columns


def test_a_file_has_the_promised_columns_and_nulls_where_nothing_was_measured(tmp_path):
    given = columns() | {"kl": [np.nan, *[0.5] * 7], "weight": np.ones(8), "entropy": np.ones(8)}
    write_occurrences(tmp_path / "o.parquet", given, {"vocab_size": 3})
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.schema.names == ["rollout", "position", "token_id", "kl", "entropy", "prompt", "weight"]
    assert all(table.schema.field(name).type == SCHEMA.field(name).type for name in table.schema.names)
    assert table["kl"].null_count == 1
    assert json.loads(table.schema.metadata[b"trl_opd"]) == {"version": 1, "vocab_size": 3}
    assert pq.ParquetFile(tmp_path / "o.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
