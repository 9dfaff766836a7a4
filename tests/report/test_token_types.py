"""Token types of a report: the last quarter of the windows against the first, families and coverage."""

import shutil
import time

import numpy as np
import pytest
import torch

from trl_opd import TokenStats
from trl_opd.report.contents import read_contents
from trl_opd.report.sections.rocks import find_types
from trl_opd.report.token_types import TokenTypes, kind_means, types_of_last_quarter
from trl_opd.rocks.families import family_of

from tests.helpers.report_folders import make_window


def test_types_are_from_the_last_quarter_and_before_from_the_first_window(run_folder):
    contents = read_contents(run_folder)
    windows = [TokenStats.load(run_folder / f"checkpoint-{step}") for step in (2, 4, 6, 8)]
    types = find_types(contents)
    np.testing.assert_array_equal(types.count, windows[3].seen.numpy())
    np.testing.assert_array_equal(types.mean_kl, windows[3].mean_kl.numpy())
    np.testing.assert_array_equal(types.before, windows[0].mean_kl.numpy())
    assert (types.source, types.before_source) == ("the rollouts of steps 7 to 8", "those of steps 1 to 2")
    only = types_of_last_quarter([(8, run_folder / "checkpoint-8" / "token_stats.safetensors")])
    assert only.before is None


def test_the_last_quarter_is_the_sum_of_its_windows(copy):
    shutil.rmtree(copy / "checkpoint-2")
    windows = {
        4: {0: (1, 8.0), 1: (2, 4.0)},
        6: {0: (1, 9.0)},
        10: {0: (1, 2.0), 3: (5, 0.5)},
        12: {0: (3, 4.0), 2: (1, 2.0)},
    }
    for step, sums in windows.items():
        make_window(copy, step, sums, frozen=[2, 2] if step == 12 else [])
    shutil.rmtree(copy / "checkpoint-8")
    types = find_types(read_contents(copy))
    assert types.count.tolist() == [4, 0, 3, 5, 0, 0, 0, 0, 0, 0]
    assert (types.mean_kl[0], types.mean_kl[2], types.mean_kl[3]) == (14.0 / 4, 2.0, 0.5)
    assert (types.before[0], types.before[1]) == (8.0, 4.0)
    assert (types.source, types.before_source) == ("the rollouts of steps 7 to 12", "those of steps 1 to 4")
    points = kind_means(read_contents(copy).main_run.windows, [0, 2], [3])
    assert points == [(4, 8.0, None, 4.0), (6, 9.0, None, None), (10, 2.0, 0.5, None), (12, 3.0, None, None)]


@pytest.mark.parametrize("step", [2, 7])
def test_error_names_the_window_of_another_divergence_or_vocabulary(copy, step):
    for at in (2, 4, 6, 8):
        make_window(copy, at, {0: (1, 1.0)})
    make_window(copy, step, {0: (1, 1.0)}, measure="forward_kl")
    with pytest.raises(ValueError, match=f"checkpoint-{step}/token_stats.*divergence is "):
        find_types(read_contents(copy))
    make_window(copy, step, {0: (1, 1.0)})
    TokenStats(11, {"divergence": "reverse_kl"}).save(copy / f"checkpoint-{step}" / "token_stats.safetensors")
    with pytest.raises(ValueError, match=f"checkpoint-{step}/token_stats.* of 11 vocabulary entries"):
        find_types(read_contents(copy))


def test_families_of_a_large_vocabulary_take_less_than_ten_seconds():
    count = np.arange(1, 150_001, dtype=float)
    types = TokenTypes(count, np.ones(len(count)), None, "", "", "reverse_kl")
    start = time.perf_counter()
    families = types.families(lambda id: "7" if id % 2 else "So")
    assert time.perf_counter() - start < 10  # summing again for every type would take a minute
    largest = count[-20_000:]
    assert families["digit"][1] == pytest.approx(largest[1::2].sum() / count.sum())


def test_coverage_and_families_are_shares_of_the_whole(run_folder):
    contents = read_contents(run_folder)
    types = find_types(contents)
    mass = np.sort(types.mass)[::-1]
    sweep = types.coverage(7)
    expected = [mass[:cutoff].sum() / mass.sum() for cutoff in sweep.cutoffs]
    np.testing.assert_allclose(sweep.coverage, expected)
    assert sweep.coverage[-1] == pytest.approx(1.0)
    families = types.families(contents.names.text_of)
    assert sum(tokens for tokens, _ in families.values()) == pytest.approx(1.0)
    assert sum(kl for _, kl in families.values()) == pytest.approx(1.0)
    digits = [id for id in range(300) if family_of(contents.names.text_of(id)) == "digit"]
    assert families["digit"][0] == pytest.approx(types.count[digits].sum() / types.count.sum())


def test_frozen_type_counts_as_often_as_it_was_emitted(tmp_path):
    stats = TokenStats(4, {})
    stats.seen[:], stats.count[:] = torch.tensor([10, 30, 10, 5]), torch.tensor([10, 3, 10, 0])
    stats.kl_sum[:] = torch.tensor([20.0, 15.0, 10.0, 0.0])  # means 2, 5 and 1; the last was never measured
    stats.save(tmp_path / "seven.safetensors")
    TokenStats(4, {}).save(tmp_path / "eight.safetensors")
    windows = [(7, tmp_path / "seven.safetensors"), (8, tmp_path / "eight.safetensors")]
    assert kind_means(windows, [0], []) == [(7, 2.0, None, (5 * 30 + 10) / 40), (8, None, None, None)]
    assert kind_means(windows[:1], [0], [2, 3, 99]) == [(7, 2.0, 1.0, 5.0)]
