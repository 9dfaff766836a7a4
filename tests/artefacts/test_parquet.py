"""A Parquet file of others is opened with care: it neither fills the memory nor ends the process."""

import io
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd.artefacts.occurrences import Occurrences, read_prompts
from trl_opd.artefacts.parquet import open_parquet

from tests.helpers.hostile_files import good_files, large_files
from tests.helpers.parquet_mutations import BINARY, I32, field, footer_of, pages_of, with_footer, with_page

ZIPPED = 3  # of the good occurrences


def write(folder, content: bytes):
    path = folder / "a.parquet"
    path.write_bytes(content)
    return path


def refused(path) -> str:
    """Return the reason for which occurrences are refused; some of it is told only when the rows are read."""
    with pytest.raises(ValueError, match=str(path)) as caught:
        list(Occurrences(path).batches())
    return str(caught.value)


@pytest.mark.parametrize("content", range(len(good_files("occurrences"))))
def test_pages_of_every_codec_and_version_are_counted(tmp_path, content, monkeypatch):
    path = write(tmp_path, good_files("occurrences")[content])
    monkeypatch.setattr("trl_opd.artefacts.parquet.MOST_UNFOLDED", 7 * 192 * 4 - 1)
    monkeypatch.setattr("trl_opd.artefacts.parquet.MOST_TIMES", 0)
    with pytest.raises(ValueError, match=r"would unfold from \d+ bytes to \d+: no measurement") as caught:
        open_parquet(path)
    assert int(str(caught.value).split(" to ")[1].split(":")[0]) < 3 * 7 * 192 * 4


@pytest.mark.parametrize("place", range(6))
def test_a_page_that_unfolds_to_gigabytes_is_refused_unread(tmp_path, place):
    path = write(tmp_path, large_files("occurrences")[place])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "would unfold from" in refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize(
    ("place", "reason"), [(-3, "a prompt of 10000000 tokens, at most 1048576"), (-1, "would unfold from")]
)
def test_prompts_that_repeat_for_ever_are_refused(tmp_path, place, reason):
    path = write(tmp_path, large_files("prompts")[place])
    with pytest.raises(ValueError, match=reason):
        read_prompts(path)


def test_a_large_file_of_different_values_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_opd.artefacts.parquet.MOST_UNFOLDED", 1000)
    values = np.random.default_rng(0).random(10_000, dtype=np.float32)
    pq.write_table(pa.table({"kl": values}), tmp_path / "a.parquet", compression="zstd")
    assert open_parquet(tmp_path / "a.parquet").metadata.num_rows == 10_000
    pq.write_table(pa.table({"kl": np.zeros_like(values)}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(ValueError, match="would unfold from"):
        open_parquet(tmp_path / "a.parquet")


def test_metadata_at_which_pyarrow_ends_the_process_are_a_sentence(tmp_path):
    footer = footer_of(good_files("occurrences")[ZIPPED])
    about = field(field(footer, 4)[1][0], 1)[1][3]
    field(about, 3, 1)[1] = 6  # bytes, where the schema says float
    assert "type" in refused(write(tmp_path, with_footer(good_files("occurrences")[ZIPPED], footer)))


def test_rows_that_a_file_only_says_to_have_are_missed(tmp_path):
    content = good_files("occurrences")[ZIPPED]
    footer = footer_of(content)
    for chunk in field(field(footer, 4)[1][0], 1)[1]:
        field(chunk, 3, 5)[1] = 0
    assert "fewer values than there are rows" in refused(write(tmp_path, with_footer(content, footer)))
    footer = footer_of(content)
    field(footer, 3)[1] = 2**40
    assert "do not hold as many rows as it says" in refused(write(tmp_path, with_footer(content, footer)))


@pytest.mark.parametrize(("number", "size"), [(2, -1), (3, -1), (3, 2**31 - 1), (3, 10_000)])
def test_a_page_of_a_size_that_cannot_be_is_damage(tmp_path, number, size):
    content = good_files("occurrences")[ZIPPED]
    start, end, header = pages_of(content, footer_of(content))[1]
    field(header, number)[1] = size
    assert "is cut or damaged: a page has a size that cannot be" in refused(
        write(tmp_path, with_page(content, (start, end, header)))
    )


def test_a_number_of_another_kind_does_not_hide_that_of_the_page(tmp_path):
    # Thrift skips a field of a kind that it does not expect: the last one that fits counts.
    content = large_files("occurrences")[0]
    start, end, header = pages_of(content, footer_of(content))[0]
    for kind, value in ((I32 + 1, 1), (BINARY, b"")):
        hidden = [header[0], [*header[1][:2], [2, [kind, value]], *header[1][2:]]]
        assert "would unfold" in refused(write(tmp_path, with_page(content, (start, end, hidden))))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"x" * 100, b"PAR1" + b"\xff" * 40 + b"PAR1"])
def test_what_is_no_parquet_file_is_a_sentence(tmp_path, content):
    assert "is not a whole Parquet file" in refused(write(tmp_path, content))


def test_a_file_without_rows_is_opened(tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": pa.array([], pa.int32())}), sink)
    assert open_parquet(write(tmp_path, sink.getvalue())).metadata.num_rows == 0


def test_a_name_that_is_no_text_is_a_sentence(tmp_path):
    content = good_files("occurrences")[ZIPPED].replace(b"entropy", b"entrop\xff")
    assert "is not a whole Parquet file: 'utf-8' codec" in refused(write(tmp_path, content))
