"""The demo: its world, the models that ship with it, whole short runs, going on after an interruption, wrong input."""

import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from trl_opd import RockSet, TokenStats
from trl_opd.cli import main
from trl_opd.cli.demo import HELP, DemoArguments
from trl_opd.demo import arms, build, run
from trl_opd.demo.arithmetic import (
    CARRY,
    FAMILIES,
    PLANTED_PILLARS,
    PLANTED_ROCKS,
    Problem,
    draw_problems,
    is_right,
    make_tokenizer,
    random_marks,
    ruled_marks,
    worked_answer,
)
from trl_opd.report.token_types import kind_means

SUMMARY = {"version", "seconds", "task", "eval_problems", "start", "teacher", "arms", "differences", "rocks"}
ALL_ARMS = ("uniform", "rock", "control", "random")


# The world


@given(st.integers(100, 998), st.integers(100, 998), st.integers(0, 1000))
def test_a_worked_answer_adds_column_by_column(a, b, seed):
    problem = Problem("", a, b, "eggs")
    marks = random_marks(random.Random(seed))
    words = worked_answer(problem, marks).split()
    assert words[:5] == [str(a), "eggs", "+", str(b), ":"]
    assert words[-2:] == ["####", str(a + b)]
    assert [word for word in words if word in PLANTED_ROCKS] == marks
    carries = [(a % 10**n + b % 10**n) >= 10**n for n in (1, 2, 3)]
    assert words.count(CARRY) == sum(carries)
    results = [words[place + 2] for place, word in enumerate(words) if word == "=" and words[place + 1] in marks]
    assert "".join(results)[::-1] == f"{(a + b) % 1000:03d}"
    assert is_right(problem, worked_answer(problem, marks))
    assert not is_right(problem, worked_answer(Problem("", a, b ^ 1, "eggs"), marks))


@pytest.mark.parametrize("completion", ["", "347 + 285 : 632", "#### ", "#### 63", "#### 6 3 2 1", "#### apples 632"])
def test_only_the_sum_after_the_answer_mark_is_right(completion):
    problem = Problem("", 347, 285, "apples")
    assert not is_right(problem, completion)
    assert is_right(problem, "#### 6 3 2 apples")


def test_the_world_is_as_rich_as_it_says():
    tokenizer = make_tokenizer()
    problems = draw_problems(400, 1, held_out=False)
    answers = tokenizer([worked_answer(problem, ruled_marks(problem)) for problem in problems])["input_ids"]
    questions = tokenizer([problem.question for problem in problems])["input_ids"]
    in_use = {id for ids in questions + answers for id in ids}
    assert tokenizer.unk_token_id not in in_use
    assert len(in_use) == len(tokenizer) - 3 == 146  # all but padding, end and unknown
    assert len(FAMILIES) == 3
    assert len(set(PLANTED_ROCKS)) == 14
    assert set(PLANTED_PILLARS) <= set(tokenizer.convert_ids_to_tokens(sorted(in_use)))
    assert sum(map(len, answers)) / len(answers) + 1 <= 48


def test_a_text_comes_back_from_its_tokens():
    tokenizer = make_tokenizer()
    problem = draw_problems(1, 2, held_out=True)[0]
    text = worked_answer(problem, ruled_marks(problem))
    assert (
        tokenizer.decode(tokenizer(text)["input_ids"]).split()
        == " ".join(word if word.isalpha() or not word.isdigit() else " ".join(word) for word in text.split()).split()
    )
    assert is_right(problem, tokenizer.decode(tokenizer(text)["input_ids"]))


def test_no_held_out_operands_are_trained_on():
    held_out, trained = ({(p.a, p.b) for p in draw_problems(3000, 3, held_out=out)} for out in (True, False))
    assert not held_out & trained
    assert draw_problems(5, 3, held_out=True) == draw_problems(5, 3, held_out=True)
    assert draw_problems(5, 3, held_out=True) != draw_problems(5, 4, held_out=True)


def test_the_rule_uses_every_mark_and_follows_the_operands():
    problems = draw_problems(2000, 5, held_out=False)
    marks = Counter(mark for problem in problems for mark in ruled_marks(problem))
    for family in FAMILIES.values():
        shares = [marks[mark] / 6000 for mark in family]
        assert sum(shares) == pytest.approx(1.0)
        assert min(shares) > 0.7 / len(family)
    one, other = (Problem("", a, 555, "eggs") for a in (123, 124))
    assert ruled_marks(one) == ruled_marks(Problem("Another sentence?", 123, 555, "pens"))
    assert ruled_marks(one) != ruled_marks(other)


# The models


def test_the_shipped_models_are_small_and_as_able_as_the_page_says():
    files = list(arms.MODELS.rglob("*.safetensors"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in arms.MODELS.rglob("*") if file.is_file()) <= 2_000_000
    accuracy = {name: sum(arms.solve(*arms.load(name), arms.eval_problems())) / 500 for name in ("teacher", "student")}
    assert accuracy["teacher"] >= 0.98
    assert 0.02 <= accuracy["student"] <= 0.25


def test_the_teacher_follows_its_rule_whatever_marks_stood_before():
    teacher, tokenizer = arms.load("teacher")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    rocks = torch.tensor(tokenizer.convert_tokens_to_ids(list(PLANTED_ROCKS)))
    problems = draw_problems(64, 6, held_out=True)
    ids, labels = build.training_batch(problems, random.Random(0), tokenizer, ruled=True)
    with torch.no_grad():
        predicted = teacher(input_ids=ids).logits[:, :-1].argmax(-1)
    wanted, seen = labels[:, 1:], ids[:, 1:]
    marks = torch.isin(wanted, rocks)
    assert int(marks.sum()) == 9 * 64
    assert (predicted == wanted)[marks].float().mean() > 0.95
    assert (seen == wanted)[marks].float().mean() < 0.4


def test_training_rows_teach_answers_and_not_questions():
    tokenizer = make_tokenizer()
    problems = draw_problems(64, 7, held_out=False)
    for ruled in (False, True):
        ids, labels = build.training_batch(problems, random.Random(0), tokenizer, ruled=ruled)
        taught = labels != -100
        counts = [len(tokenizer(worked_answer(p, ruled_marks(p)))["input_ids"]) + 1 for p in problems]
        assert taught.sum(1).tolist() == counts
        differ = (ids != labels) & taught
        marks = torch.isin(labels, torch.tensor(tokenizer.convert_tokens_to_ids(list(PLANTED_ROCKS))))
        assert bool(differ.any()) == ruled
        assert not (differ & ~marks).any()


def test_building_writes_models_that_load(tmp_path, monkeypatch, capsys):
    for name in ("TEACHER", "STUDENT"):
        monkeypatch.setattr(build, name, getattr(build, name) | {"steps": 1})
    monkeypatch.setattr("sys.argv", ["build", "--output_dir", str(tmp_path)])
    build.main()
    for name, shipped in (("teacher", arms.load("teacher")[0]), ("student", arms.load("student")[0])):
        made = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert made.num_parameters() == shipped.num_parameters()
    assert "student: " in capsys.readouterr().out


# Whole runs


def demo(folder: Path, *more: str) -> int:
    return main(["demo", "--output_dir", str(folder), "--steps", "8", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with all four arms of a short demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert demo(folder, "--arms", ",".join(ALL_ARMS)) == 0
    return folder


def test_the_summary_is_as_promised(finished):
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


def test_the_accuracies_are_those_of_the_students_on_disk(finished):
    summary = json.loads((finished / "summary.json").read_text())
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(finished / "rock", dtype=torch.float32)
    correct = arms.solve(model, tokenizer, arms.eval_problems())
    assert summary["arms"]["rock"]["accuracy"] == sum(correct) / 500
    assert not all(
        torch.equal(one, two) for one, two in zip(model.parameters(), arms.load("student")[0].parameters(), strict=True)
    )


def test_the_rock_set_comes_from_the_last_windows_and_its_controls_match(finished):
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


def test_the_plots_are_pictures(finished):
    for name in ("accuracy.png", "divergence.png"):
        content = (finished / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_a_finished_demo_is_not_run_again(finished, capsys):
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


def test_an_interrupted_demo_goes_on_and_ends_alike(finished, tmp_path, monkeypatch, capsys):
    whole, run_arm = {arm: arms.read_result(finished / arm) for arm in ALL_ARMS}, run.run_arm

    def interrupted(arm, *args, **kwargs):
        if arm == "rock":
            raise KeyboardInterrupt
        return run_arm(arm, *args, **kwargs)

    monkeypatch.setattr(run, "run_arm", interrupted)
    assert demo(tmp_path) == 130
    error = capsys.readouterr().err
    assert "interrupted: finished arms are kept, and the same command goes on from there." in error
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(run, "run_arm", run_arm)
    written = (tmp_path / "uniform" / "result.json").stat().st_mtime_ns
    assert demo(tmp_path) == 0
    assert (tmp_path / "uniform" / "result.json").stat().st_mtime_ns == written
    for arm in ("uniform", "rock", "control"):
        result = arms.read_result(tmp_path / arm)
        assert (result.correct, result.curve) == (whole[arm].correct, whole[arm].curve)


def test_other_settings_run_anew(tmp_path):
    settings = ["demo", "--output_dir", str(tmp_path), "--arms", "uniform"]
    assert main([*settings, "--steps", "1"]) == 0
    assert main([*settings, "--steps", "2"]) == 0
    assert arms.read_result(tmp_path / "uniform").settings["steps"] == 2
    assert sorted(path.name for path in (tmp_path / "uniform").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_result_that_cannot_be_read_counts_as_none(tmp_path):
    assert arms.read_result(tmp_path) is None
    good = {"settings": {}, "correct": [True] * 500, "curve": [[0, 0.1]], "seconds": 1.0, "frozen_token_share": 0.0}
    (tmp_path / "result.json").write_text(json.dumps(good))
    assert arms.read_result(tmp_path).accuracy == 1.0
    spoiled = [good | change for change in ({"correct": []}, {"correct": [2] * 500}, {"seconds": "x"}, {"curve": [1]})]
    for content in ("", "{", "[]", "{}", '{"curve": 3}', *map(json.dumps, spoiled)):
        (tmp_path / "result.json").write_text(content)
        assert arms.read_result(tmp_path) is None


@pytest.mark.parametrize("arm", ["rock", "control"])
def test_arms_that_have_nothing_to_freeze_are_left_out_with_a_reason(arm):
    nothing = RockSet([], {}, {}, {}, {"tokens": 1, "kl_sum": 0.0})
    assert run._cannot_run(arm, nothing) == f"{arm}: not run, no rocks were found."
    assert run._rock_summary(nothing) == {
        "tokens": [],
        **dict.fromkeys(("token_share", "kl_share", "planted_precision", "planted_recall")),
    }


def test_the_help_lists_every_option_with_its_default():
    for option in dataclasses.fields(DemoArguments):
        assert re.search(rf"^  --{option.name} \w+ +{re.escape(str(option.default))} ", HELP, re.MULTILINE), option.name


def test_a_frozen_type_counts_in_the_curves_as_often_as_it_was_seen(tmp_path):
    stats = TokenStats(4, {})
    stats.seen[:], stats.count[:] = torch.tensor([10, 30, 10, 5]), torch.tensor([10, 3, 10, 0])
    stats.kl_sum[:] = torch.tensor([20.0, 15.0, 10.0, 0.0])  # means 2, 5 and 1; the last was never measured
    stats.save(tmp_path / "seven.safetensors")
    TokenStats(4, {}).save(tmp_path / "eight.safetensors")
    windows = [(7, tmp_path / "seven.safetensors"), (8, tmp_path / "eight.safetensors")]
    assert kind_means(windows, [0], []) == [(7, 2.0, None, (5 * 30 + 10) / 40), (8, None, None, None)]
    assert kind_means(windows[:1], [0], [2, 3, 99]) == [(7, 2.0, 1.0, 5.0)]


def test_an_arm_of_another_seed_does_not_keep_the_old_rocks(tmp_path):
    (tmp_path / arms.MARKER).touch()
    (tmp_path / "rock_set.json").write_text("{}")
    arms._clear(tmp_path)
    assert not (tmp_path / "rock_set.json").exists()


# Wrong input


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms", "uniform,rocks"], "There is no arm 'rocks': --arms takes uniform, rock, control, random"),
        (["--steps", "0"], "--steps counts optimizer steps, at least 1, got 0"),
        (["--seed", "-1"], "--seed must lie in 0.."),
        (["--output_dir", __file__], "is a file: name a folder"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_flag_is_one_sentence(capsys, flags, sentence):
    assert main(["demo", *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("steps: 1.5", "demo.yaml: steps is 1.5, and must be int"),
        ("steps: null", "demo.yaml: steps is None, and must be int"),
    ],
)
def test_a_wrong_value_in_a_file_is_one_sentence(tmp_path, capsys, line, sentence):
    (tmp_path / "demo.yaml").write_text(f"{line}\n")
    assert main(["demo", "--config", str(tmp_path / "demo.yaml")]) == 1
    assert sentence in capsys.readouterr().err


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path, capsys):
    own = tmp_path / "uniform" / "checkpoint-1000" / "model.safetensors"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert main(["demo", "--output_dir", str(tmp_path), "--steps", "1", "--arms", "uniform"]) == 1
    assert "holds files that are not the demo's: choose another --output_dir" in capsys.readouterr().err
    assert own.read_text() == "mine"


@pytest.mark.parametrize("flags", [["--step", "x"], ["--colour", "red"], ["surplus"]])
def test_bad_usage_is_two(capsys, flags):
    with pytest.raises(SystemExit) as error:
        main(["demo", *flags])
    assert error.value.code == 2


def test_settings_may_come_from_a_file(tmp_path):
    (tmp_path / "demo.yaml").write_text(f"output_dir: {tmp_path / 'out'}\nsteps: 1\narms: [uniform]\n")
    assert main(["demo", "--config", str(tmp_path / "demo.yaml")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert tuple(summary["arms"]) == ("uniform",)
    assert summary["differences"] == {}
