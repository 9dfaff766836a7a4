"""The demo's models: the shipped ones, their training batches, and building them again."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_opd.demo import arms, build
from trl_opd.demo.arithmetic import PLANTED_ROCKS, draw_problems, make_tokenizer, ruled_marks, worked_answer


@pytest.mark.slow
def test_shipped_models_are_small_and_have_the_documented_accuracy():
    assert len(list(arms.MODELS.rglob("*.safetensors"))) == 2
    assert sum(file.stat().st_size for file in arms.MODELS.rglob("*") if file.is_file()) <= 2_000_000
    accuracy = {name: sum(arms.solve(*arms.load(name), arms.eval_problems())) / 500 for name in ("teacher", "student")}
    assert accuracy["teacher"] >= 0.98
    assert 0.02 <= accuracy["student"] <= 0.25


def batch_of(seed: int, *, held_out: bool, ruled: bool):
    """Return 64 problems, the ids and labels of their batch, and which labels are marks."""
    tokenizer = make_tokenizer()
    problems = draw_problems(64, seed, held_out=held_out)
    ids, labels = build.training_batch(problems, random.Random(0), tokenizer, ruled=ruled)
    rocks = torch.tensor(tokenizer.convert_tokens_to_ids(list(PLANTED_ROCKS)))
    return problems, ids, labels, torch.isin(labels, rocks)


def test_teacher_follows_its_rule_after_random_marks():
    teacher, tokenizer = arms.load("teacher")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    _, ids, labels, is_mark = batch_of(6, held_out=True, ruled=True)
    with torch.no_grad():
        predicted = teacher(input_ids=ids).logits.argmax(-1).roll(1, dims=1)
    assert int(is_mark.sum()) == 9 * 64
    assert (predicted == labels)[is_mark].float().mean() > 0.95
    assert (ids == labels)[is_mark].float().mean() < 0.4


@pytest.mark.parametrize("ruled", [False, True])
def test_labels_cover_answers_and_not_questions(ruled):
    problems, ids, labels, is_mark = batch_of(7, held_out=False, ruled=ruled)
    answers = make_tokenizer()([worked_answer(problem, ruled_marks(problem)) for problem in problems])["input_ids"]
    is_taught = labels != -100
    assert is_taught.sum(1).tolist() == [len(answer) + 1 for answer in answers]
    differs = (ids != labels) & is_taught
    assert bool(differs.any()) == ruled
    assert not (differs & ~is_mark).any()


def test_building_writes_models_that_load(tmp_path, monkeypatch, capsys):
    for training in build.TRAINING.values():
        monkeypatch.setitem(training, "steps", 1)
    monkeypatch.setattr("sys.argv", ["build", "--output_dir", str(tmp_path)])
    build.main()
    for name in build.TRAINING:
        made = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert made.num_parameters() == arms.load(name)[0].num_parameters()
    assert "student: " in capsys.readouterr().out
