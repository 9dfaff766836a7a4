"""The benchmark scripts run with small sizes. No test asserts a time."""

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
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
    generation,
    gradients_memory,
    memory_gpu,
    profile_step,
    report,
    step_time,
    workload,
)
from tests.benchmarks.measuring import in_a_process
from tests.benchmarks.workload import LONGEST, MEAN_SHARE, ROCK_SHARE, ROCKS, make_rollouts
from tests.helpers.paths import ROOT
from tests.helpers.planted import make_world

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these are the real sizes")


@pytest.fixture
def small(monkeypatch):
    """Make the models and rollouts of the workload small."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(workload, "STUDENT", size)
    monkeypatch.setattr(workload, "TEACHER", size)
    short = functools.partial(make_rollouts, longest=8)
    for module in (step_time, profile_step):
        monkeypatch.setattr(module, "make_rollouts", short)


def test_workload_has_the_stated_lengths_and_share_of_rocks():
    batches = [make_rollouts(32_768, seed) for seed in range(20)]
    tokens = []
    for rollouts in batches:
        lengths = [len(ids) for ids in rollouts.completions]
        assert max(lengths) == LONGEST
        assert statistics.mean(lengths) / LONGEST == pytest.approx(MEAN_SHARE, abs=0.06)
        assert all(32 <= len(ids) <= 96 for ids in rollouts.prompts)
        tokens += itertools.chain.from_iterable(rollouts.completions)
    assert (torch.tensor(tokens) < ROCKS).double().mean().item() == pytest.approx(ROCK_SHARE, abs=0.02)


@pytest.mark.slow
def test_step_time_measures_both_trainers(small):
    theirs, ours, ratio = step_time.compare(512, 1, lora=True, freeze=True)
    assert theirs > 0
    assert ours > 0
    assert ratio == pytest.approx(ours / theirs)


@pytest.mark.parametrize("name", ["TRL", "ours", "ours, without gradient"])
def test_divergence_op_is_timed(name):
    inputs = (*divergence_op.make_inputs(512, 8), 1.0, True)
    assert divergence_op.seconds(divergence_op.OPS[name], *inputs) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_includes_short_lived_buffers():
    """In a new process, because the peak of one that has run other tests may already be higher."""
    source = (
        "import torch; from tests.benchmarks.measuring import peak_bytes; "
        "print(peak_bytes(lambda: torch.ones(2**25).sum()))"
    )
    command = [sys.executable, "-c", source]
    used = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert 2**27 * 0.9 < used < 2**27 * 1.5


@pytest.mark.slow
def test_profile_separates_the_phases_of_a_step(small, monkeypatch):
    for name in ("loss_and_signals", "locate_loss_positions"):  # the profile replaces them
        monkeypatch.setattr(opd_trainer, name, getattr(opd_trainer, name))
    options = argparse.Namespace(vocab=512, steps=2, log_every=1, freeze=True, lora=True)
    seconds = profile_step.profile(options)
    assert seconds.keys() == set(profile_step.PHASES)
    assert all(value > 0 for value in seconds.values())


def test_gpu_memory_script_runs_on_tiny_shapes():
    options = argparse.Namespace(student="tiny", teacher="tiny", per_device=2, accumulation=2, completion=8)
    assert memory_gpu.predicted(options, "parked")["student"] > 0
    peaks = memory_gpu.peaks_of(True, options, four_bit=True, placement="parked")
    assert peaks.keys() == set(memory_gpu.PHASES)


def test_generation_benchmark_makes_a_row_of_its_table():
    rounds = [generation.Sampling(2.0, [4, 6]), generation.Sampling(1.0, [4, 6])]
    assert generation.row_of_table(rounds, rounds[::-1]) == "5 | 1.50 | 8 | 1.50 | 8 | 1.25"
    prompts = generation.make_prompts(2, 512, torch.Generator().manual_seed(0))
    assert all(32 <= len(ids) <= 96 for ids in prompts)


@pytest.mark.slow
def test_detection_ranks_as_the_dictionary_baseline_does(tmp_path):
    path = tmp_path / "o.parquet"
    detection.make_file(path, 20_000, 200)
    assert detection.by_dicts(path) == detection.ours(path, "aggregate")
    seconds, _, rocks = detection.run("context", path)
    assert seconds > 0
    assert rocks


@pytest.mark.slow
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
    # In a new process, because here an allocator would reuse what other tests have freed.
    small, large = in_a_process(gradients_memory.peaks, 20_000, [20, 520], 64)
    assert large - small == pytest.approx(500 * 2 * 20_000 * 4, rel=0.25)


@pytest.mark.parametrize("make", [report.make_samples, report.make_collection])
@pytest.mark.slow
def test_report_of_many_rollouts_is_small_and_shows_some_of_them(tmp_path, make):
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
