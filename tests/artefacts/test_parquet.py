"""A Parquet file that a user passes in is read, or is a one-line error that names the file."""

import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd.artefacts.occurrences import Occurrences, read_prompts
from trl_opd.artefacts.parquet import open_parquet

from tests.helpers.hostile_files import damaged_parquet, good_files, large_files

ZIPPED = 3  # of the good occurrences


def write(folder, content: bytes):
    path = folder / "a.parquet"
    path.write_bytes(content)
    return path


def error_of(path) -> str:
    """Return the error that occurrences raise when they are opened or when their rows are read."""
    with pytest.raises(ValueError, match=str(path)) as caught:
        list(Occurrences(path).batches())
    return str(caught.value)


@pytest.mark.parametrize("content", good_files("occurrences"))
def test_size_in_memory_is_known_for_every_codec_and_page_version(tmp_path, content, monkeypatch):
    monkeypatch.setattr("trl_opd.artefacts.parquet.MOST_UNFOLDED", 7 * 192 * 4 - 1)
    monkeypatch.setattr("trl_opd.artefacts.parquet.MOST_TIMES", 0)
    with pytest.raises(ValueError, match=r"has \d+ bytes on disk and would take \d+ in memory. Measured values never"):
        open_parquet(write(tmp_path, content))


def test_whole_file_that_unfolds_to_far_more_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_opd.artefacts.parquet.MOST_UNFOLDED", 2**22)
    path = write(tmp_path, large_files("occurrences")[-1])
    assert "bytes on disk and would take" in error_of(path)


@pytest.mark.slow
def test_prompt_of_too_many_tokens_is_an_error(tmp_path):
    path = write(tmp_path, large_files("prompts")[-1])
    with pytest.raises(ValueError, match="a prompt of 10000000 tokens, at most 1048576"):
        read_prompts(path)


def test_file_above_the_size_limit_is_not_opened(tmp_path, monkeypatch):
    path = write(tmp_path, good_files("occurrences")[0])
    monkeypatch.setattr("trl_opd.artefacts.parquet.MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(pq, "ParquetFile", None)
    assert "bytes; at most 1000 are read. Split it" in error_of(path)


def test_only_repeated_values_count_as_unfolding(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_opd.artefacts.parquet.MOST_UNFOLDED", 1000)
    values = np.random.default_rng(0).random(10_000, dtype=np.float32)
    pq.write_table(pa.table({"kl": values}), tmp_path / "a.parquet", compression="zstd")
    assert open_parquet(tmp_path / "a.parquet").metadata.num_rows == 10_000
    pq.write_table(pa.table({"kl": np.zeros_like(values)}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(ValueError, match="bytes on disk and would take"):
        open_parquet(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"x" * 100, b"PAR1" + b"\xff" * 40 + b"PAR1"])
def test_file_of_another_format_is_a_one_line_error(tmp_path, content):
    assert "is not a complete Parquet file" in error_of(write(tmp_path, content))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_file_is_a_one_line_error(tmp_path, share):
    content = good_files("occurrences")[ZIPPED]
    assert "is not a complete Parquet file" in error_of(write(tmp_path, content[: int(share * len(content))]))


def test_pages_of_zeros_are_a_one_line_error(tmp_path):
    content = good_files("occurrences")[ZIPPED]
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert "is cut or damaged" in error_of(write(tmp_path, content[:4] + bytes(footer - 4) + content[footer:]))


@pytest.mark.parametrize("seed", range(20))
def test_damaged_pages_are_read_or_are_an_error_that_names_the_file(tmp_path, seed):
    path = write(tmp_path, damaged_parquet(random.Random(seed), good_files("occurrences")[ZIPPED]))
    try:
        list(Occurrences(path).batches())
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017  a damaged value can also be a possible one


def test_file_without_rows_is_opened(tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": pa.array([], pa.int32())}), sink)
    assert open_parquet(write(tmp_path, sink.getvalue())).metadata.num_rows == 0


def test_column_name_that_is_not_utf8_is_a_one_line_error(tmp_path):
    content = good_files("occurrences")[ZIPPED].replace(b"entropy", b"entrop\xff")
    assert "is not a complete Parquet file: 'utf-8' codec" in error_of(write(tmp_path, content))
