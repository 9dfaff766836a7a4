"""Any split of the positions gives the same sums, and a file that is not statistics is an error with its path."""

import json
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from trl_opd import TokenSignals, TokenStats

from tests.helpers.full_disk import full_disk
from tests.helpers.token_statistics import (
    MEASURE,
    NAMES,
    NAN,
    ROWS,
    SUMS,
    V,
    assert_sums,
    equal,
    positions,
    signals,
    slow_sums,
    stats_of,
)

# Sums


def test_sums_of_seven_positions():
    stats = stats_of(ROWS)
    assert stats.seen.tolist() == [1, 2, 0, 2, 2]
    assert stats.count.tolist() == [1, 0, 0, 2, 1]
    assert stats.kl_sum.tolist() == [0.0, 0.0, 0.0, 2.0, 2.0]
    assert stats.kl_sq_sum.tolist() == [0.0, 0.0, 0.0, 2.5, 4.0]
    assert stats.entropy_sum.tolist() == [0.0, 0.0, 0.0, 2.25, 1.0]


def test_new_statistics_are_zero_and_have_the_promised_types():
    stats = TokenStats(V, MEASURE)
    assert stats.vocab_size == V
    assert_sums(stats, slow_sums([]))
    assert [getattr(stats, name).dtype for name in NAMES] == 2 * [torch.int64] + 3 * [torch.float64]


def test_mean_is_over_measured_positions_and_nan_without_any():
    mean = stats_of(ROWS).mean_kl
    assert mean.dtype == torch.float64
    assert mean[[0, 3, 4]].tolist() == [0.0, 1.0, 2.0]
    assert mean[[1, 2]].isnan().all()


@given(positions)
def test_sums_are_those_of_a_slow_twin(rows):
    assert_sums(stats_of(rows), slow_sums(rows))


@given(positions, st.data())
@pytest.mark.slow
def test_any_split_merged_in_any_order_gives_the_same_sums(rows, data):
    shuffled = data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    pieces = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    parts = data.draw(st.permutations([stats_of(piece) for piece in pieces]))
    total = TokenStats(V, MEASURE)
    for part in parts:
        total.merge(part)
    assert_sums(total, slow_sums(rows))
    updated = TokenStats(V, MEASURE)
    for piece in pieces:
        updated.update(signals(piece))
    assert_sums(updated, slow_sums(rows))


def test_many_small_values_on_a_large_sum_are_not_lost():
    # In float32 an addition of 1e-4 to 1e5 changes nothing: the sum would be off by 1e-4 of its value.
    stats = stats_of([(0, 1e5, 1e5)] + 100_000 * [(0, 1e-4, 1e-4)])
    expected = 1e5 + 100_000 * float(torch.tensor(1e-4))
    assert stats.kl_sum[0].item() == pytest.approx(expected, rel=1e-9)
    assert stats.entropy_sum[0].item() == pytest.approx(expected, rel=1e-9)
    assert stats.kl_sq_sum[0].item() == pytest.approx(1e10 + 100_000 * float(torch.tensor(1e-4)) ** 2, rel=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_update_ignores_weights_keeps_no_graph_and_leaves_the_signals_unchanged(weight):
    given = signals(ROWS)
    divergence = given.divergence.clone().requires_grad_()
    entropy = given.entropy.clone().requires_grad_()
    stats = TokenStats(V, MEASURE)
    stats.update(TokenSignals(given.token_ids, divergence, entropy, torch.full((len(ROWS),), weight)))
    assert equal(stats, stats_of(ROWS))
    assert not any(getattr(stats, name).requires_grad for name in NAMES)
    assert torch.equal(given.token_ids, signals(ROWS).token_ids)
    torch.testing.assert_close(divergence.detach(), signals(ROWS).divergence, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(entropy.detach(), signals(ROWS).entropy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("id", [-1, V, 2**31])
def test_id_outside_the_vocabulary_is_an_error_and_adds_nothing(id):
    stats = stats_of(ROWS)
    with pytest.raises(ValueError, match=rf"0\.\.{V - 1}.*{id}"):
        stats.update(signals([(0, 1.0, 1.0), (id, 1.0, 1.0)]))
    assert equal(stats, stats_of(ROWS))


@pytest.mark.parametrize("shapes", [(2, 3, 3), (3, 2, 3), (3, 3, 2), (1, 3, 3), (3, 1, 3), (3, 3, 1), 3 * ((2, 3),)])
def test_signals_of_different_or_two_dimensional_shapes_are_an_error_and_add_nothing(shapes):
    stats = TokenStats(V, MEASURE)
    ids, divergence, entropy = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="one shape"):
        stats.update(TokenSignals(ids.long(), divergence, entropy, torch.ones(3)))
    assert equal(stats, TokenStats(V, MEASURE))


@pytest.mark.parametrize("vocab_size", [0, -1])
def test_vocabulary_size_below_1_is_an_error(vocab_size):
    with pytest.raises(ValueError, match="vocab_size"):
        TokenStats(vocab_size, MEASURE)


# Merging


def test_merge_adds_into_the_first_and_leaves_the_second():
    one, two = stats_of(ROWS[:3]), stats_of(ROWS[3:])
    assert one.merge(two) is one
    assert equal(one, stats_of(ROWS))
    assert equal(two, stats_of(ROWS[3:]))


def test_copy_shares_nothing():
    stats = stats_of(ROWS)
    copy = stats.copy()
    copy.update(signals(ROWS))
    copy.measure["student"] = "another"
    assert equal(stats, stats_of(ROWS))
    assert copy.seen.tolist() == [2, 4, 0, 4, 4]


@pytest.mark.parametrize("name", [*MEASURE, "of another program"])
def test_different_measures_do_not_merge_and_add_nothing(name):
    stats, other = stats_of(ROWS), stats_of(ROWS, MEASURE | {name: "another"})
    for one, two in ((stats, other), (other, stats)):
        with pytest.raises(ValueError, match=f"{name} is .*another"):
            one.merge(two)
    assert_sums(stats, slow_sums(ROWS))
    assert_sums(other, slow_sums(ROWS))


def test_vocabularies_of_different_size_do_not_merge():
    with pytest.raises(ValueError, match=r"5 and of 6"):
        TokenStats(5, MEASURE).merge(TokenStats(6, MEASURE))


# Files


@settings(max_examples=25)
@given(positions)
def test_saved_statistics_load_as_the_same(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("stats") / "a file.safetensors"
    stats = stats_of(rows)
    stats.save(path)
    loaded = TokenStats.load(str(path))
    assert equal(loaded, stats)
    assert_sums(loaded.merge(stats), slow_sums(rows + rows))


def test_file_holds_five_tensors_and_names_its_format(tmp_path):
    path = tmp_path / "stats.safetensors"
    stats_of(ROWS).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == slow_sums(ROWS)
    assert (metadata["format"], metadata["version"]) == ("trl_opd.token_stats", "1")
    assert json.loads(metadata["measure"]) == MEASURE


def test_checkpoint_folder_stands_for_the_statistics_in_it(tmp_path):
    stats_of(ROWS).save(tmp_path / "token_stats.safetensors")
    assert equal(TokenStats.load(tmp_path), stats_of(ROWS))


def test_loaded_statistics_do_not_change_with_their_file(tmp_path):
    stats_of(ROWS).save(tmp_path / "stats")
    loaded = TokenStats.load(tmp_path / "stats")
    TokenStats(V, MEASURE).save(tmp_path / "stats")
    loaded.update(signals(ROWS))
    assert_sums(loaded, slow_sums(ROWS + ROWS))
    assert equal(TokenStats.load(tmp_path / "stats"), TokenStats(V, MEASURE))


@pytest.mark.parametrize("name", ["missing.safetensors", "folder", "missing/folder", "folder/missing"])
def test_missing_file_is_an_oserror_that_names_it(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
        TokenStats.load(tmp_path / name)


METADATA = {"format": "trl_opd.token_stats", "version": "1", "measure": json.dumps(MEASURE)}
WHOLE, REAL = torch.tensor([1, 2, 0]), torch.tensor([1.5, 2.0, 0.0], dtype=torch.float64)
TENSORS = {"seen": WHOLE, "count": WHOLE, "kl_sum": REAL, "kl_sq_sum": REAL, "entropy_sum": REAL}


def write(path: Path, changes: dict | None = None, metadata: dict | None = METADATA) -> Path:
    """Write a right file, but for tensors that are replaced, or left out where the change is `None`."""
    tensors = {name: tensor.clone() for name, tensor in (TENSORS | (changes or {})).items() if tensor is not None}
    save_file(tensors, path, metadata)
    return path


def refused(path: Path) -> str:
    """Return the reason for which the file is refused; the message is one short line that begins with the path."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        TokenStats.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    start = f"{path}: not token statistics: "
    assert message.startswith(start)
    return message.removeprefix(start)


def test_the_file_that_the_next_tests_break_is_whole(tmp_path):
    stats = TokenStats.load(write(tmp_path / "stats"))
    assert {name: getattr(stats, name).tolist() for name in NAMES} == {name: t.tolist() for name, t in TENSORS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor_or_one_of_another_type_or_shape_is_an_error(tmp_path, name):
    assert name in refused(write(tmp_path / "stats", {name: None}))
    for dtype in (torch.int32, torch.float32, torch.bool, torch.complex64, torch.float16):
        assert f"{name} is {dtype}" in refused(write(tmp_path / "stats", {name: TENSORS[name].to(dtype)}))
    for shape in ((2,), (4,), (3, 1), (1, 3), (0,), ()):
        wrong = torch.zeros(shape, dtype=TENSORS[name].dtype)
        assert "shape" in refused(write(tmp_path / "stats", {name: wrong}))
    if name in SUMS:
        for value in (NAN, float("inf"), float("-inf")):
            wrong = torch.tensor([0.0, value, 0.0], dtype=torch.float64)
            assert f"{name} holds values that are not finite" in refused(write(tmp_path / "stats", {name: wrong}))


@pytest.mark.parametrize("shape", [(0,), (), (3, 1)])
def test_equal_shapes_that_are_not_a_vocabulary_are_an_error(tmp_path, shape):
    changes = {name: torch.zeros(shape, dtype=tensor.dtype) for name, tensor in TENSORS.items()}
    assert "shape" in refused(write(tmp_path / "stats", changes))


@pytest.mark.parametrize(
    "changes",
    [{"count": [-1, 2, 0]}, {"count": [1, 3, 0]}, {"seen": [1, 2, -1]}, {"seen": [-1, 2, 0], "count": [-1, 2, 0]}],
    ids=["count below 0", "count above seen", "seen below 0", "both below 0"],
)
def test_impossible_counts_are_an_error(tmp_path, changes):
    changes = {name: torch.tensor(values) for name, values in changes.items()}
    assert "between 0 and seen" in refused(write(tmp_path / "stats", changes))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "format"),
        ({}, "format"),
        ({"format": "pt"}, "format"),
        (METADATA | {"format": "trl_opd.rock_set"}, "format"),
        ({key: value for key, value in METADATA.items() if key != "format"}, "format"),
        ({key: value for key, value in METADATA.items() if key != "version"}, "version None"),
        (METADATA | {"version": "2"}, "version '2'"),
        (METADATA | {"version": 5000 * "1\n"}, "version"),
        ({key: value for key, value in METADATA.items() if key != "measure"}, "measure"),
        (METADATA | {"measure": ""}, "line 1 column 1"),
        (METADATA | {"measure": METADATA["measure"][:-1]}, "line 1"),
        (METADATA | {"measure": "[]"}, "measure"),
        (METADATA | {"measure": '"reverse_kl"'}, "measure"),
        (METADATA | {"measure": 100_000 * "["}, "recursion"),
        (METADATA | {"measure": '{"beta": ' + 5000 * "9" + "}"}, "digits"),
    ],
)
def test_metadata_of_another_format_or_version_is_an_error(tmp_path, metadata, reason):
    assert reason in refused(write(tmp_path / "stats", metadata=metadata))


FOREIGN = {
    "empty": b"",
    "text": b"not statistics\n" * 99,
    "zeros": bytes(4096),
    "random": random.Random(0).randbytes(4096),
    "JSON": json.dumps(MEASURE).encode(),
    "pickle": pickle.dumps({"seen": [1, 2]}),
    "header of 2^40 bytes": (2**40).to_bytes(8, "little") + b"{}",
    "header that is no JSON": (5).to_bytes(8, "little") + b"{;;;}",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_file_of_another_format_is_an_error(tmp_path, content):
    (tmp_path / "stats").write_bytes(content)
    assert refused(tmp_path / "stats")


def test_file_of_torch_save_is_an_error_and_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"seen": Trap()}, tmp_path / "stats")
    assert refused(tmp_path / "stats")
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_file_cut_anywhere_or_with_bytes_behind_it_is_an_error(tmp_path):
    path = write(tmp_path / "stats")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


@pytest.mark.slow
def test_file_with_wrong_bytes_is_a_one_line_error_or_holds_statistics(tmp_path):
    path, generator, reasons = write(tmp_path / "stats"), random.Random(0), []
    content = path.read_bytes()
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 2, 8])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            stats = TokenStats.load(path)
        except ValueError as error:
            reasons.append(str(error))
            continue
        assert (stats.count >= 0).all()
        assert (stats.count <= stats.seen).all()
        assert all(getattr(stats, name).isfinite().all() for name in SUMS)
    assert 100 < len(reasons) < 500
    assert all(reason.startswith(f"{path}: not token statistics: ") for reason in reasons)
    assert not any("\n" in reason for reason in reasons)


def test_save_on_a_full_disk_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "stats"
    stats_of(ROWS).save(path)
    with full_disk(room=200), pytest.raises(OSError, match="File too large"):
        TokenStats(V, MEASURE).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert equal(TokenStats.load(path), stats_of(ROWS))


@pytest.mark.parametrize("name", ["missing/stats", "stats/stats", "folder"])
def test_path_that_cannot_be_written_is_an_error_and_leaves_no_part(tmp_path, name):
    stats_of(ROWS).save(tmp_path / "stats")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"(?i)directory"):
        TokenStats(V, MEASURE).save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", tmp_path / "stats"]
    assert equal(TokenStats.load(tmp_path / "stats"), stats_of(ROWS))


@pytest.mark.parametrize("name", ["kl_sum", "entropy_sum"])
def test_sums_that_load_would_not_accept_are_not_saved(tmp_path, name):
    stats = stats_of(ROWS)
    getattr(stats, name)[int(stats.count.argmax())] = float("inf")
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        stats.save(tmp_path / "stats")
    assert not list(tmp_path.iterdir())


def test_measure_is_copied_in_the_form_that_a_file_gives_back():
    nested = {"tokenizer": {"name": "a"}, "sizes": (1, 2)}
    stats = TokenStats(V, MEASURE | nested)
    nested["tokenizer"]["name"] = "b"
    assert stats.measure["tokenizer"] == {"name": "a"}
    assert stats.measure["sizes"] == [1, 2]


@pytest.mark.parametrize("wrong", [{"beta": float("nan")}, {1: "a", "b": 2}, {"student": object()}])
def test_measure_that_is_not_plain_is_an_error(wrong):
    with pytest.raises(ValueError, match="measure must"):
        TokenStats(V, wrong)


def test_null_key_of_a_measure_differs_from_a_missing_one():
    with pytest.raises(ValueError, match="student is null and not there"):
        TokenStats(V, {"student": None}).merge(TokenStats(V, {}))
