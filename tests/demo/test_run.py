"""Whole short demos: what they write, how they resume after an interruption, and which files they leave alone."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_opd import RockSet, TokenStats
from trl_opd.cli import main
from trl_opd.demo import arms, run
from trl_opd.demo.arithmetic import PLANTED_ROCKS, make_tokenizer

SUMMARY = {"version", "seconds", "task", "eval_problems", "start", "teacher", "arms", "differences", "rocks"}
ALL_ARMS = ("uniform", "rock", "control", "random")


# Whole runs


def demo(folder: Path, *more: str) -> int:
    return main(["demo", "--output_dir", str(folder), "--steps", "8", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with all four arms of a short demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert demo(folder, "--arms", ",".join(ALL_ARMS)) == 0
    return folder


@pytest.mark.slow
def test_summary_has_the_documented_fields_and_ranges(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    assert summary["version"] == 1
    assert tuple(summary["arms"]) == ALL_ARMS
    assert tuple(summary["differences"]) == ALL_ARMS[1:]
    for arm, result in summary["arms"].items():
        assert result.keys() == {"accuracy", "accuracy_ci95", "seconds", "steps", "frozen_token_share"}
        low, high = result["accuracy_ci95"]
        assert 0 <= low <= result["accuracy"] <= high <= 1
        assert result["steps"] == 8
        assert (result["frozen_token_share"] == 0) == (arm == "uniform")
    for arm, difference in summary["differences"].items():
        expected = summary["arms"][arm]["accuracy"] - summary["arms"]["uniform"]["accuracy"]
        assert difference["estimate"] == pytest.approx(expected)
        assert difference["ci95"][0] <= difference["estimate"] <= difference["ci95"][1]
        assert difference["over"] == "problems"
    rocks = summary["rocks"]
    assert len(rocks["tokens"]) == len(PLANTED_ROCKS)
    planted = len(set(rocks["tokens"]) & set(PLANTED_ROCKS)) / 14
    assert rocks["planted_precision"] == rocks["planted_recall"] == planted
    assert 0 < rocks["token_share"] < 1
    assert 0 < rocks["kl_share"] < 1


def test_accuracy_is_that_of_the_saved_student(finished):
    summary = json.loads((finished / "summary.json").read_text())
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(finished / "rock", dtype=torch.float32)
    correct = arms.solve(model, tokenizer, arms.eval_problems())
    assert summary["arms"]["rock"]["accuracy"] == sum(correct) / 500
    assert not all(
        torch.equal(one, two) for one, two in zip(model.parameters(), arms.load("student")[0].parameters(), strict=True)
    )


def test_rock_set_is_from_the_last_windows_with_matching_controls(finished):
    rock_set = RockSet.load(finished / "rock_set.json")
    windows = [TokenStats.load(finished / "uniform" / f"checkpoint-{step}") for step in range(1, 9)]
    assert rock_set.corpus["tokens"] == int((windows[6].seen + windows[7].seen).sum())
    first = windows[0]
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
def test_finished_demo_is_not_run_again(finished, capsys):
    before = {arm: (finished / arm / "result.json").stat().st_mtime_ns for arm in ALL_ARMS}
    assert demo(finished) == 0
    assert before == {arm: (finished / arm / "result.json").stat().st_mtime_ns for arm in ALL_ARMS}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("uniform", "rock ", "control", "random"))] == [
        "uniform",
        "rock",
        "control",
    ]
    assert any(line.startswith("rocks found: ") for line in lines)
    assert any("no interval" in line for line in lines)


@pytest.mark.slow
def test_interrupted_demo_resumes_with_the_same_result(finished, tmp_path, monkeypatch, capsys):
    whole, run_arm = {arm: arms.read_result(finished / arm) for arm in ALL_ARMS}, run.run_arm

    def interrupted(arm, *args, **kwargs):
        if arm == "rock":
            raise KeyboardInterrupt
        return run_arm(arm, *args, **kwargs)

    monkeypatch.setattr(run, "run_arm", interrupted)
    assert demo(tmp_path) == 130
    error = capsys.readouterr().err
    assert "interrupted: finished arms are kept, run the same command again to resume." in error
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(run, "run_arm", run_arm)
    written = (tmp_path / "uniform" / "result.json").stat().st_mtime_ns
    assert demo(tmp_path) == 0
    assert (tmp_path / "uniform" / "result.json").stat().st_mtime_ns == written
    for arm in ("uniform", "rock", "control"):
        result = arms.read_result(tmp_path / arm)
        assert (result.correct, result.curve) == (whole[arm].correct, whole[arm].curve)


@pytest.mark.slow
def test_other_settings_run_again(tmp_path):
    settings = ["demo", "--output_dir", str(tmp_path), "--arms", "uniform"]
    assert main([*settings, "--steps", "1"]) == 0
    assert main([*settings, "--steps", "2"]) == 0
    assert arms.read_result(tmp_path / "uniform").settings["steps"] == 2
    assert sorted(path.name for path in (tmp_path / "uniform").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_unreadable_result_counts_as_missing(tmp_path):
    assert arms.read_result(tmp_path) is None
    good = {"settings": {}, "correct": [True] * 500, "curve": [[0, 0.1]], "seconds": 1.0, "frozen_token_share": 0.0}
    (tmp_path / "result.json").write_text(json.dumps(good))
    assert arms.read_result(tmp_path).accuracy == 1.0
    spoiled = [good | change for change in ({"correct": []}, {"correct": [2] * 500}, {"seconds": "x"}, {"curve": [1]})]
    for content in ("", "{", "[]", "{}", '{"curve": 3}', *map(json.dumps, spoiled)):
        (tmp_path / "result.json").write_text(content)
        assert arms.read_result(tmp_path) is None


@pytest.mark.parametrize("arm", ["rock", "control"])
def test_arm_with_nothing_to_freeze_is_skipped_with_a_reason(arm):
    nothing = RockSet([], {}, {}, {}, {"tokens": 1, "kl_sum": 0.0})
    assert run._cannot_run(arm, nothing) == f"{arm}: not run, no rocks were found."
    assert run._rock_summary(nothing) == {
        "tokens": [],
        **dict.fromkeys(("token_share", "kl_share", "planted_precision", "planted_recall")),
    }


def test_arm_of_another_seed_does_not_keep_the_old_rocks(tmp_path):
    (tmp_path / arms.MARKER).touch()
    (tmp_path / "rock_set.json").write_text("{}")
    arms._clear(tmp_path)
    assert not (tmp_path / "rock_set.json").exists()


# Wrong input


@pytest.mark.slow
def test_folder_with_other_files_is_an_error_and_stays_unchanged(tmp_path, capsys):
    own = tmp_path / "uniform" / "checkpoint-1000" / "model.safetensors"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert main(["demo", "--output_dir", str(tmp_path), "--steps", "1", "--arms", "uniform"]) == 1
    assert "holds files that are not the demo's: choose another --output_dir" in capsys.readouterr().err
    assert own.read_text() == "mine"
