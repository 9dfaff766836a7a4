"""Several processes with unequal batches give the results of one, with and without FSDP2, and none hangs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_opd.saving.checkpoints import find_fault

from tests.helpers.paths import ROOT
from tests.helpers.tiny import PROMPTS, make_model, make_tokenizer

pytestmark = pytest.mark.processes

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
CUT = ["cut on one", "cut on one, LoRA", "cut everywhere", "cut everywhere, LoRA"]
FROZEN = ["frozen on one", "frozen on one, LoRA", "frozen on one, by weights"]
EVALUATED = ["uneven", "one problem"]
ALL = [*CUT, *FROZEN, *EVALUATED, "sampled", "spoilt"]
SHARDED = ["cut on one", "cut on one, LoRA", "uneven", "sampled"]
# Of time, of padding (each process has its own longest rollout), and of transformers: the remainder since the last log,
# of the first process alone.
OWN = ("runtime", "per_second", "phase/", "step_time", "padding_share", "train_loss")


def launch(command: list[str], limit: int) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)


def train(folder: Path, names: list[str], prefix: list[str]) -> None:
    found = launch([*prefix, str(ROOT / "tests" / "helpers" / "scenarios.py"), str(folder), *names], limit=280)
    assert found.returncode == 0, found.stderr[-3000:]


def read(folder: Path, name: str, processes: int) -> list[dict]:
    return [json.loads((folder / f"{name}-{processes}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the results of every scenario on one process and on two."""
    folder = tmp_path_factory.mktemp("processes")
    train(folder, ALL, [sys.executable])
    train(folder, ALL, LAUNCH)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A folder with the results of two processes whose student FSDP2 shards."""
    folder = tmp_path_factory.mktemp("sharded")
    train(folder, [*SHARDED, "--fsdp2"], LAUNCH)
    return folder


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


@pytest.mark.parametrize("name", [*CUT, *FROZEN, *EVALUATED, "sampled"])
@pytest.mark.slow
def test_two_processes_with_unequal_batches_equal_one_process(folder, name):
    require_equal(*read(folder, name, 1), read(folder, name, 2))


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.slow
def test_student_sharded_by_fsdp2_trains_like_an_unsharded_one(folder, sharded, name):
    several = read(sharded, name, 2)
    assert all(two["sharded"] for two in several)
    require_equal(*read(folder, name, 1), several)


@pytest.mark.parametrize("name", ["cut on one", "cut on one, LoRA"])
def test_process_whose_rollouts_were_all_cut_has_empty_statistics_and_trains(folder, name):
    first, second = read(folder, name, 2)
    assert first["local"]["seen"] > 0
    assert second["local"] == {"seen": 0, "count": 0}
    assert np.linalg.norm(second["moved"]) > 0.1
    assert sum(second["stats"]["seen"]) == first["local"]["seen"]


@pytest.mark.parametrize("name", ["cut everywhere", "cut everywhere, LoRA"])
def test_step_with_only_cut_rollouts_warns_on_every_process_and_keeps_the_weights(folder, name):
    for found in read(folder, name, 2):
        assert not np.any(found["moved"])
        assert any("every rollout was cut" in text for text in found["warnings"])
        assert next(line for line in found["log"] if "loss" in line)["loss"] == 0.0


@pytest.mark.parametrize("name", ["frozen on one", "frozen on one, LoRA"])
def test_process_whose_positions_are_all_frozen_projects_none_and_trains(folder, name):
    first, second = read(folder, name, 2)
    assert 0 < first["local"]["count"] < first["local"]["seen"]  # some of its positions are frozen
    assert second["local"]["count"] == 0 < second["local"]["seen"]
    assert np.linalg.norm(second["moved"]) > 0.1


@pytest.mark.parametrize(("name", "problems"), [("uneven", 3), ("one problem", 1)])
def test_evaluation_counts_each_prompt_once_even_with_fewer_prompts_than_processes(folder, name, problems):
    (one,), (two, other) = read(folder, name, 1), read(folder, name, 2)
    for key in ("eval_loss", "eval_kl/mean", "eval_entropy", "eval_completions/repetition"):
        assert two["evaluated"].get(key) == pytest.approx(one["evaluated"].get(key), rel=1e-5), key
    assert two["evaluated"]["eval_loss"] == pytest.approx(other["evaluated"]["eval_loss"], rel=1e-12)
    solved = [line for line in two["log"] if "eval_accuracy" in line]
    assert [line["eval_accuracy_problems"] for line in solved] == [problems, problems]
    assert [line["eval_accuracy"] for line in solved] == [(problems + 1) / 2] * 2


def test_logits_that_are_not_finite_on_one_process_stop_all_with_one_error(folder):
    for found in read(folder, "spoilt", 2):
        assert found["error"].startswith("Step 2: the student's logits are not finite")
        assert "\n" not in found["error"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a student, a teacher, and prompts of which the second process draws one that is too long."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    prompts = [*PROMPTS[:3], "6 * 7 = " * 200]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return folder


def script(world: Path, out: Path, **changes) -> list[str]:
    """Return the command that trains on two processes from the command line."""
    settings = {
        "model_name_or_path": world / "student",
        "teacher_model_name_or_path": world / "teacher",
        "output_dir": out,
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "shuffle_dataset": "false",
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
        "report_to": "none",
        "disable_tqdm": "true",
        **changes,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [*LAUNCH, str(ROOT / "examples" / "opd.py"), *flags]


@pytest.mark.slow
def test_two_processes_resume_bit_identically_from_the_newest_complete_checkpoint(world, tmp_path):
    """The second process had not written its random state when both were killed."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    settings = {"dataset_name": tmp_path / "prompts.jsonl", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = launch(script(world, whole, **settings), limit=120)
    assert run.returncode == 0, run.stderr[-3000:]
    shutil.copytree(whole, killed)
    listed = json.loads((whole / "checkpoint-4" / "opd_complete.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= listed.keys()
    for name in ("rng_state_1.pth", "opd_complete.json"):
        (killed / "checkpoint-4" / name).unlink()
    run = launch(script(world, killed, resume_from_checkpoint="true", **settings), limit=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr.count("the run resumes from checkpoint-2") == 1
    for name in ("model.safetensors", "checkpoint-4/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert find_fault(killed / "checkpoint-4") is None


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ("prompts.jsonl", "error on process 1: The prompt in row 3"),
        ("nowhere.jsonl", "error: There is no dataset file"),
    ],
)
@pytest.mark.slow
def test_error_on_one_or_all_processes_is_printed_once_and_ends_the_run(world, tmp_path, dataset, sentence):
    run = launch(script(world, tmp_path / "out", dataset_name=world / dataset, max_steps=1), limit=120)
    assert run.returncode == 1
    assert run.stderr.count("trl-opd train: error") == 1, run.stderr[-3000:]
    assert f"trl-opd train: {sentence}" in run.stderr
    # torch marks a traceback with its process. The others may lose the connection before the launcher ends them.
    assert "[rank1]:" not in run.stderr
