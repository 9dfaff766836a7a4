"""The demo's models: the shipped ones, the batches that they were trained on, and building them again."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_opd.demo import arms, build
from trl_opd.demo.arithmetic import PLANTED_ROCKS, draw_problems, make_tokenizer, ruled_marks, worked_answer


@pytest.mark.slow
def test_shipped_models_are_small_and_have_the_documented_accuracy():
    files = list(arms.MODELS.rglob("*.safetensors"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in arms.MODELS.rglob("*") if file.is_file()) <= 2_000_000
    accuracy = {name: sum(arms.solve(*arms.load(name), arms.eval_problems())) / 500 for name in ("teacher", "student")}
    assert accuracy["teacher"] >= 0.98
    assert 0.02 <= accuracy["student"] <= 0.25


def test_teacher_follows_its_rule_after_random_marks():
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


def test_labels_cover_answers_and_not_questions():
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
    for name in ("teacher", "student"):
        monkeypatch.setitem(build.TRAINING[name], "steps", 1)
    monkeypatch.setattr("sys.argv", ["build", "--output_dir", str(tmp_path)])
    build.main()
    for name, shipped in (("teacher", arms.load("teacher")[0]), ("student", arms.load("student")[0])):
        made = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert made.num_parameters() == shipped.num_parameters()
    assert "student: " in capsys.readouterr().out
