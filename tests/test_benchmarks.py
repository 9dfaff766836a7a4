"""The benchmark scripts run at small sizes. No test asserts a time."""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from trl_opd import opd_trainer
from trl_opd.rocks.recurrence import ContextSettings

from tests.benchmarks import (
    detection,
    detection_sensitivity,
    divergence_op,
    equality,
    gradients_memory,
    memory_gpu,
    profile_step,
    report,
    step_time,
)
from tests.benchmarks.workload import (
    LONGEST,
    MEAN_SHARE,
    ROCK_SHARE,
    ROCKS,
    host_peak_bytes,
    in_a_process,
    make_rollouts,
    peak_bytes,
)
from tests.helpers.planted import make_world

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these are the real sizes")


def test_workload_has_the_stated_lengths_and_share_of_rocks():
    batches = [make_rollouts(32_768, seed) for seed in range(20)]
    for rollouts in batches:
        lengths = [len(ids) for ids in rollouts.completions]
        assert max(lengths) == LONGEST
        assert sum(lengths) / len(lengths) / LONGEST == pytest.approx(MEAN_SHARE, abs=0.06)
        assert all(32 <= len(ids) <= 96 for ids in rollouts.prompts)
    tokens = torch.tensor([id for rollouts in batches for ids in rollouts.completions for id in ids])
    assert (tokens < ROCKS).double().mean().item() == pytest.approx(ROCK_SHARE, abs=0.02)


@pytest.mark.slow
def test_step_time_measures_both_trainers():
    theirs, ours, ratio = step_time.compare(512, 1, lora=True, freeze=True)
    assert theirs > 0
    assert ours > 0
    assert ratio == pytest.approx(ours / theirs)


@pytest.mark.parametrize("name", ["TRL", "ours", "ours, without gradient"])
def test_divergence_op_is_timed(name):
    inputs = (*divergence_op.make_inputs(512, 8), 1.0, True)
    assert divergence_op.seconds(divergence_op.OPS[name], *inputs) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_counts_short_lived_buffers():
    held = peak_bytes(lambda: torch.ones(2**25).sum())
    assert 2**27 * 0.9 < held < 2**27 * 1.5


@pytest.mark.slow
def test_profile_separates_the_phases_of_a_step(monkeypatch):
    for module, name in (
        (opd_trainer, "loss_and_signals"),
        (opd_trainer, "locate_loss_positions"),
    ):  # which the profile replaces
        monkeypatch.setattr(module, name, getattr(module, name))
    options = argparse.Namespace(vocab=512, steps=2, log_every=1, freeze=True, lora=True)
    seconds = profile_step.profile(options)
    assert seconds.keys() == set(profile_step.PHASES)
    assert all(value > 0 for value in seconds.values())


def test_gpu_memory_script_runs_on_tiny_shapes():
    options = argparse.Namespace(student="tiny", teacher="tiny", per_device=2, accumulation=2, completion=8)
    assert memory_gpu.predicted(options, "parked")["student"] > 0
    peaks = memory_gpu.peaks_of(True, options, four_bit=True, placement="parked")
    assert peaks.keys() == set(memory_gpu.PHASES)


@pytest.mark.slow
def test_detection_ranks_as_the_dictionary_baseline_does(tmp_path):
    detection.make_file(tmp_path / "o.parquet", 20_000, 200)
    assert detection.by_dicts(tmp_path / "o.parquet") == detection.ours(tmp_path / "o.parquet", "aggregate")
    seconds, _, rocks = detection.run("context", tmp_path / "o.parquet")
    assert seconds > 0
    assert rocks


def test_detection_sensitivity_writes_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detection_sensitivity, "VALUES", {"eta": (0.05, 0.9), "gamma": (0.5,)})
    plot = tmp_path / "plot.png"
    monkeypatch.setattr("sys.argv", ["detection_sensitivity", "--worlds", "1", "--output", str(plot)])
    detection_sensitivity.main()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "0.05=1.00" in capsys.readouterr().out
    shares = detection_sensitivity.shares_by_features(make_world(0, rollouts=1000), ContextSettings(), (0.5,))
    assert shares["offsets"] == [1.0]  # a third implementation of the filter agrees


@pytest.mark.slow
def test_gradient_study_needs_two_vectors_per_type():
    # Each in a process of its own: here an allocator would hand out again what other tests have freed.
    sizes = [in_a_process(host_peak_bytes, gradients_memory.study, 20_000, types, 64) for types in (20, 520)]
    assert sizes[1] - sizes[0] == pytest.approx(500 * 2 * 20_000 * 4, rel=0.25)


@pytest.mark.parametrize("make", [report.make_samples, report.make_collection])
@pytest.mark.slow
def test_report_of_many_rollouts_is_small_and_shows_a_subset(tmp_path, make):
    make(tmp_path, 500, 20, 400)
    found = report.measure(tmp_path)
    assert 0 < found["size"] < 5
    assert 0 < found["shown"] < 500
    assert found["seconds"] > 0
    assert found["memory"] > 0
    assert "word7" in (tmp_path / "report.html").read_text(encoding="utf-8")


CHANGES = {
    "model.safetensors": lambda path: save_file({"w": torch.tensor([1.0, -0.0])}, path),
    "optimizer.pt": lambda path: torch.save({"step": 2}, path),
    "rows.parquet": lambda path: pq.write_table(pa.table({"kl": [0.5, None]}), path),
    "rock_set.json": lambda path: path.write_text('{"rocks": [1, 3], "seconds": 9.0}'),
    "report.html": lambda path: path.write_text("<p>mean 0.51</p><p>took 9 s</p>"),
    "demo.out": lambda path: path.write_text("rock 0.983\n"),
    "plot.png": lambda path: path.write_bytes(b"other"),
    "new.json": lambda path: path.write_text("{}"),
}


def write_results(folder: Path, *, seconds: float) -> None:
    folder.mkdir()
    (folder / equality.CHECKOUT).write_text(str(folder))
    save_file({"w": torch.tensor([1.0, 0.0])}, folder / "model.safetensors")
    torch.save({"step": 1}, folder / "optimizer.pt")
    pq.write_table(pa.table({"kl": [0.5, float("nan")]}), folder / "rows.parquet")
    (folder / "rock_set.json").write_text(f'{{"rocks": [1, 2], "seconds": {seconds}, "name": "{folder}/student"}}')
    (folder / "report.html").write_text(f"<p>mean 0.5</p><p>took {seconds} s</p>")
    (folder / "demo.out").write_text("rock 0.982\n")
    (folder / "plot.png").write_bytes(b"one")


@pytest.mark.parametrize("name", [None, *CHANGES])
def test_equality_ignores_times_and_paths_but_no_value(tmp_path, name):
    write_results(tmp_path / "before", seconds=1.5)
    write_results(tmp_path / "after", seconds=2.5)
    if name is not None:
        CHANGES[name](tmp_path / "after" / name)
    found = equality.compare(tmp_path / "before", tmp_path / "after")
    assert {line.split(":")[0].split(" ")[0] for line in found} == (set() if name is None else {name})
