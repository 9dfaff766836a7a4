"""Whole short demos: what they write, how they resume after an interruption, and which files they leave alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from trl_opd import RockSet, TokenStats
from trl_opd.cli import main
from trl_opd.demo import arms, run
from trl_opd.demo.arithmetic import PLANTED_ROCKS, make_tokenizer

ALL_ARMS = ("uniform", "rock", "control", "random")
STEPS = 4


# Whole runs


def demo(folder: Path, *more: str, steps: int = STEPS) -> int:
    return main(["demo", "--output_dir", str(folder), "--steps", str(steps), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with all four arms of a short demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert demo(folder, "--arms", ",".join(ALL_ARMS)) == 0
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    """Skip the evaluation of the shipped models."""
    monkeypatch.setattr(run, "_accuracy", lambda name: 0.5)


@pytest.mark.slow
def test_summary_has_the_documented_fields_and_ranges(finished):
    summary = json.loads((finished / "summary.json").read_text())
    names = {"version", "seconds", "task", "eval_problems", "start", "teacher", "arms", "differences", "rocks"}
    assert summary.keys() == names
    assert summary["version"] == 1
    assert tuple(summary["arms"]) == ALL_ARMS
    assert tuple(summary["differences"]) == ALL_ARMS[1:]
    for arm, result in summary["arms"].items():
        assert result.keys() == {"accuracy", "accuracy_ci95", "seconds", "steps", "frozen_token_share"}
        low, high = result["accuracy_ci95"]
        assert 0 <= low <= result["accuracy"] <= high <= 1
        assert result["steps"] == STEPS
        assert (result["frozen_token_share"] == 0) == (arm == "uniform")
    for arm, difference in summary["differences"].items():
        expected = summary["arms"][arm]["accuracy"] - summary["arms"]["uniform"]["accuracy"]
        assert difference["estimate"] == pytest.approx(expected)
        low, high = difference["ci95"]
        assert low <= difference["estimate"] <= high
        assert difference["over"] == "problems"
    rocks = summary["rocks"]
    assert len(rocks["tokens"]) == len(PLANTED_ROCKS)
    planted = len(set(rocks["tokens"]) & set(PLANTED_ROCKS)) / 14
    assert rocks["planted_precision"] == rocks["planted_recall"] == planted
    assert 0 < rocks["token_share"] < 1
    assert 0 < rocks["kl_share"] < 1


def test_accuracy_is_that_of_the_saved_student(finished, monkeypatch):
    summary = json.loads((finished / "summary.json").read_text())
    shipped = arms.load("student")[0].state_dict()
    monkeypatch.setattr(arms, "MODELS", finished)
    student, tokenizer = arms.load("rock")
    assert summary["arms"]["rock"]["accuracy"] == sum(arms.solve(student, tokenizer, arms.eval_problems())) / 500
    assert not all(torch.equal(value, shipped[name]) for name, value in student.state_dict().items())


def test_rock_set_is_from_the_last_windows_with_matching_controls(finished):
    rock_set = RockSet.load(finished / "rock_set.json")
    first, *_, last = (TokenStats.load(finished / "uniform" / f"checkpoint-{step}") for step in range(1, STEPS + 1))
    assert rock_set.corpus["tokens"] == int(last.seen.sum())
    for rock in rock_set.rocks:
        assert rock.mean_kl_pre == pytest.approx(float(first.kl_sum[rock.id] / first.count[rock.id]))
        assert rock.mean_kl >= 0.8 * rock.mean_kl_pre
    assert rock_set.controls.matched
    assert not set(rock_set.controls.ids) & set(rock_set.ids.tolist())
    assert rock_set.controls.texts == [make_tokenizer().decode([id]) for id in rock_set.controls.ids]
    rock_set.check(make_tokenizer(), 149)


def test_plots_are_png_files(finished):
    for name in ("accuracy.png", "divergence.png"):
        content = (finished / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


@pytest.mark.slow
def test_interrupted_demo_resumes_with_the_same_result_and_runs_no_finished_arm_again(
    finished, tmp_path, monkeypatch, capsys, unmeasured
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "rock" / "result.json").unlink()
    kept = [tmp_path / arm / "result.json" for arm in ("uniform", "control", "random")]
    before = [path.stat().st_mtime_ns for path in kept]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arms, "distil", interrupt)
        assert demo(tmp_path) == 130
    error = capsys.readouterr().err
    assert "interrupted: finished arms are kept, run the same command again to resume." in error
    assert not (tmp_path / "summary.json").exists()

    assert demo(tmp_path) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    whole = arms.read_result(finished / "rock")
    result = arms.read_result(tmp_path / "rock")
    assert (result.correct, result.curve) == (whole.correct, whole.curve)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("uniform", "rock ", "control", "random"))] == [
        "uniform",
        "rock",
        "control",
    ]
    assert any(line.startswith("rocks found: ") for line in lines)
    assert any("no interval" in line for line in lines)


@pytest.mark.slow
def test_demo_with_other_settings_runs_again(finished, tmp_path, unmeasured):
    shutil.copytree(finished / "uniform", tmp_path / "uniform")
    assert demo(tmp_path, "--arms", "uniform", steps=1) == 0
    assert arms.read_result(tmp_path / "uniform").settings["steps"] == 1
    assert [path.name for path in (tmp_path / "uniform").glob("checkpoint-*")] == ["checkpoint-1"]


# Results and arms


@pytest.mark.parametrize(
    "change", [None, {"correct": []}, {"correct": [2] * 500}, {"seconds": "x"}, {"curve": [1]}, {"curve": []}]
)
def test_unreadable_result_counts_as_missing(tmp_path, change):
    assert arms.read_result(tmp_path) is None
    good = {"settings": {}, "correct": [True] * 500, "curve": [[0, 0.1]], "seconds": 1.0, "frozen_token_share": 0.0}
    (tmp_path / "result.json").write_text(json.dumps(good))
    assert arms.read_result(tmp_path).accuracy == 1.0
    texts = ("", "{", "[]", "{}", '{"curve": 3}') if change is None else [json.dumps(good | change)]
    for text in texts:
        (tmp_path / "result.json").write_text(text)
        assert arms.read_result(tmp_path) is None


@pytest.mark.parametrize("arm", ["rock", "control"])
def test_arm_with_nothing_to_freeze_is_skipped_with_a_reason(arm):
    nothing = RockSet([], {}, {}, {}, {"tokens": 1, "kl_sum": 0.0})
    assert run._cannot_run(arm, nothing) == f"{arm}: not run, no rocks were found."
    shares = dict.fromkeys(("token_share", "kl_share", "planted_precision", "planted_recall"))
    assert run._rock_summary(nothing) == {"tokens": [], **shares}


def test_arm_of_another_seed_does_not_keep_the_old_rocks(tmp_path):
    (tmp_path / arms.MARKER).touch()
    (tmp_path / "rock_set.json").write_text("{}")
    arms._clear(tmp_path)
    assert not (tmp_path / "rock_set.json").exists()


# Wrong input


def test_folder_with_other_files_is_an_error_and_stays_unchanged(tmp_path, capsys, unmeasured):
    own = tmp_path / "uniform" / "checkpoint-1000" / "model.safetensors"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert demo(tmp_path, "--arms", "uniform", steps=1) == 1
    assert "holds files that are not the demo's: choose another --output_dir" in capsys.readouterr().err
    assert own.read_text() == "mine"
