"""The demo's task: worked answers, right and wrong sums, the rule of the marks, and the tokenizer."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.integers(100, 998), st.integers(100, 998), st.integers(0, 1000))
def test_worked_answer_adds_column_by_column(a, b, seed):
    problem = Problem("", a, b, "eggs")
    marks = random_marks(random.Random(seed))
    words = worked_answer(problem, marks).split()
    assert words[:5] == [str(a), "eggs", "+", str(b), ":"]
    assert words[-2:] == ["####", str(a + b)]
    assert [word for word in words if word in PLANTED_ROCKS] == marks
    assert words.count(CARRY) == sum(a % 10**n + b % 10**n >= 10**n for n in (1, 2, 3))
    results = [words[place + 2] for place, word in enumerate(words) if word == "=" and words[place + 1] in marks]
    assert "".join(results)[::-1] == f"{(a + b) % 1000:03d}"
    assert is_right(problem, " ".join(words))
    assert not is_right(problem, worked_answer(Problem("", a, b ^ 1, "eggs"), marks))


@pytest.mark.parametrize("completion", ["", "347 + 285 : 632", "#### ", "#### 63", "#### 6 3 2 1", "#### apples 632"])
def test_only_the_sum_after_the_answer_mark_is_right(completion):
    problem = Problem("", 347, 285, "apples")
    assert not is_right(problem, completion)
    assert is_right(problem, "#### 6 3 2 apples")


def test_task_uses_its_whole_vocabulary():
    tokenizer = make_tokenizer()
    problems = draw_problems(400, 1, held_out=False)
    answers = tokenizer([worked_answer(problem, ruled_marks(problem)) for problem in problems])["input_ids"]
    in_use = set().union(*answers, *tokenizer([problem.question for problem in problems])["input_ids"])
    assert tokenizer.unk_token_id not in in_use
    assert len(in_use) == len(tokenizer) - 3 == 146  # all but padding, end and unknown
    assert len(FAMILIES) == 3
    assert len(set(PLANTED_ROCKS)) == 14
    assert set(PLANTED_PILLARS) <= set(tokenizer.convert_ids_to_tokens(sorted(in_use)))
    assert sum(map(len, answers)) / len(answers) + 1 <= 48


def test_tokenizer_decodes_what_it_encoded():
    tokenizer = make_tokenizer()
    problem = draw_problems(1, 2, held_out=True)[0]
    text = worked_answer(problem, ruled_marks(problem))
    decoded = tokenizer.decode(tokenizer(text)["input_ids"])
    assert decoded.split() == [sign for word in text.split() for sign in (word if word.isdigit() else [word])]
    assert is_right(problem, decoded)


def test_held_out_operands_never_occur_in_training():
    held_out, trained = ({(p.a, p.b) for p in draw_problems(3000, 3, held_out=out)} for out in (True, False))
    assert not held_out & trained
    assert draw_problems(5, 3, held_out=True) == draw_problems(5, 3, held_out=True)
    assert draw_problems(5, 3, held_out=True) != draw_problems(5, 4, held_out=True)


def test_rule_uses_every_mark_and_depends_on_the_operands_only():
    problems = draw_problems(2000, 5, held_out=False)
    marks = Counter(mark for problem in problems for mark in ruled_marks(problem))
    for family in FAMILIES.values():
        counts = [marks[mark] for mark in family]
        assert sum(counts) == 6000
        assert min(counts) > 0.7 * 6000 / len(family)
    expected = ruled_marks(Problem("", 123, 555, "eggs"))
    assert ruled_marks(Problem("Another question?", 123, 555, "pens")) == expected
    assert ruled_marks(Problem("", 124, 555, "eggs")) != expected
