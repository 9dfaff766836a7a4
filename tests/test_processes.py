"""Several processes with unequal batches give the results of one, with and without FSDP2, and none hangs."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_opd.saving.checkpoints import find_fault

from tests.helpers import scenarios
from tests.helpers.paths import ROOT
from tests.helpers.tiny import PROMPTS

pytestmark = pytest.mark.processes

SPOILT = "spoilt"
NOISE = "sampled evaluation"
# Of time, of padding (each process has its own longest rollout), and of transformers: the remainder since the last log,
# of the first process alone.
OWN = ("runtime", "per_second", "phase/", "step_time", "padding_share", "train_loss")


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    """A folder with the results of every scenario, from one launch, and what the processes wrote to stderr."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, scenarios.__file__, str(folder), str(world)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    (folder / "stderr.txt").write_text(run.stderr)
    return folder


def read(folder: Path, name: str, group: str) -> list[dict]:
    """Return what the processes of a group have seen; errors of a process are in its exit code."""
    codes = json.loads((folder / "exit_codes.json").read_text())[group]
    assert not any(codes), (folder / "stderr.txt").read_text()[-3000:]
    return [json.loads((folder / group / f"{name}-{rank}.json").read_text()) for rank in range(len(codes))]


def require_equal(one: dict, several: list[dict]) -> None:
    """Assert that several processes train the same weights, metrics and statistics as one process."""
    assert {two["processes"] for two in several} == {len(several)}
    assert len({two["weights"] for two in several}) == 1
    for two in several:
        assert (one["error"], two["error"]) == (None, None)
        distance = np.linalg.norm(np.subtract(two["moved"], one["moved"]))
        assert distance <= 1e-5 * np.linalg.norm(one["moved"])
        for name, values in one["stats"].items():
            exact = name in ("seen", "count")
            np.testing.assert_allclose(two["stats"][name], values, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-9)
    for line, other in zip(one["log"], several[0]["log"], strict=True):
        shown = {key for key in line.keys() | other.keys() if not any(part in key for part in OWN)}
        assert {key: other.get(key) for key in shown} == pytest.approx({key: line.get(key) for key in shown}, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in scenarios.SCENARIOS if name not in (SPOILT, NOISE)])
@pytest.mark.slow
def test_two_processes_with_unequal_batches_equal_one_process(folder, name):
    require_equal(*read(folder, name, "one"), read(folder, name, "two"))


@pytest.mark.parametrize("name", scenarios.SHARDED)
@pytest.mark.slow
def test_student_sharded_by_fsdp2_trains_like_an_unsharded_one(folder, name):
    several = read(folder, name, "fsdp2")
    assert all(two["sharded"] for two in several)
    require_equal(*read(folder, name, "one"), several)


def test_files_of_two_processes_equal_those_of_one(folder):
    (one,), (first, second) = read(folder, "weighted", "one"), read(folder, "weighted", "two")
    for two in (first, second):
        assert 0 < two["local"]["seen"] < sum(two["stats"]["seen"])
        assert two["checkpoint"] == two["stats"]
    for name in ("occurrences", "samples"):
        assert len(one[name]["kl"]) > 0
        divergences, expected = (np.array(found[name].pop("kl"), dtype=float) for found in (first, one))
        np.testing.assert_allclose(divergences, expected, rtol=1e-4, atol=1e-6)  # NaN in the same places
        assert first[name] == one[name]


@pytest.mark.parametrize("name", ["cut on one", "cut on one, LoRA"])
def test_process_whose_rollouts_were_all_cut_has_empty_statistics_and_trains(folder, name):
    first, second = read(folder, name, "two")
    assert first["local"]["seen"] > 0
    assert second["local"] == {"seen": 0, "count": 0}
    assert np.linalg.norm(second["moved"]) > 0.1
    assert sum(second["stats"]["seen"]) == first["local"]["seen"]


@pytest.mark.parametrize("name", ["cut everywhere", "cut everywhere, LoRA"])
def test_step_with_only_cut_rollouts_warns_on_every_process_and_keeps_the_weights(folder, name):
    for found in read(folder, name, "two"):
        assert not np.any(found["moved"])
        assert any("every rollout was cut" in text for text in found["warnings"])
        assert next(line for line in found["log"] if "loss" in line)["loss"] == 0.0


@pytest.mark.parametrize("name", ["frozen on one", "frozen on one, LoRA"])
def test_process_whose_positions_are_all_frozen_projects_none_and_trains(folder, name):
    first, second = read(folder, name, "two")
    assert 0 < first["local"]["count"] < first["local"]["seen"]  # some of its positions are frozen
    assert second["local"]["count"] == 0 < second["local"]["seen"]
    assert np.linalg.norm(second["moved"]) > 0.1


@pytest.mark.parametrize(("name", "problems"), [("weighted", 5), ("uneven", 3), ("one problem", 1)])
def test_evaluation_counts_each_prompt_once_even_with_fewer_prompts_than_processes(folder, name, problems):
    (one,), (two, other) = read(folder, name, "one"), read(folder, name, "two")
    shown = ("eval_loss", "eval_kl/mean", "eval_entropy", "eval_completions/repetition", "eval_rock/token_share")
    expected = {key: value for key, value in one["evaluated"].items() if key in shown}
    assert len(expected) >= 3
    assert {key: two["evaluated"].get(key) for key in expected} == pytest.approx(expected, rel=1e-5)
    assert two["evaluated"]["eval_loss"] == pytest.approx(other["evaluated"]["eval_loss"], rel=1e-12)
    solved = [line for line in two["log"] if "eval_accuracy" in line]
    assert [line["eval_accuracy_problems"] for line in solved] == [problems, problems]
    assert [line["eval_accuracy"] for line in solved] == [(problems + 1) / 2] * 2


def test_processes_sample_an_evaluation_with_noise_of_their_own(folder):
    first, second = read(folder, NOISE, "two")
    assert first["completions"] != second["completions"]


def test_logits_that_are_not_finite_on_one_process_stop_all_with_one_error(folder):
    for found in read(folder, SPOILT, "two"):
        assert found["error"].startswith("Step 2: the student's logits are not finite")
        assert "\n" not in found["error"]


@pytest.mark.slow
def test_two_processes_resume_bit_identically_from_the_newest_complete_checkpoint(folder):
    """The second process had not written its random state when both were killed."""
    stderr = (folder / "stderr.txt").read_text()
    assert json.loads((folder / "exit_codes.json").read_text())["resume"] == [0] * 4, stderr[-3000:]
    assert stderr.count("the run resumes from checkpoint-2") == 1
    whole, killed = folder / "whole", folder / "killed"
    listed = json.loads((whole / "checkpoint-4" / "opd_complete.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= listed.keys()
    for name in ("model.safetensors", "checkpoint-4/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert find_fault(killed / "checkpoint-4") is None


def test_error_on_all_processes_is_printed_once_and_ends_the_run(folder):
    assert json.loads((folder / "exit_codes.json").read_text())["no dataset"] == [1, -signal.SIGTERM]
    stderr = (folder / "stderr.txt").read_text()
    assert stderr.count("trl-opd train: error") == 1, stderr[-3000:]
    assert "trl-opd train: error: There is no dataset file" in stderr


@pytest.mark.slow
def test_error_on_one_process_is_printed_once_and_the_launcher_ends_the_others(world, tmp_path):
    prompts = [*PROMPTS[:3], "6 * 7 = " * 200]  # the second process draws the one that is too long
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = scenarios.command(world, tmp_path / "out", dataset_name=tmp_path / "prompts.jsonl", max_steps=1)
    command = [*launcher, str(ROOT / "examples" / "opd.py"), *given]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert run.returncode == 1
    assert run.stderr.count("trl-opd train: error") == 1, run.stderr[-3000:]
    assert "trl-opd train: error on process 1: The prompt in row 3" in run.stderr
    # torch marks a traceback with its process. The others may lose the connection before the launcher ends them.
    assert "[rank1]:" not in run.stderr
