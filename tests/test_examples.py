"""The example script that makes tiny models: its problems are correct, and it reads GSM8K."""

import re
import runpy

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def tiny_models():
    return runpy.run_path(str(ROOT / "examples" / "tiny_models.py"))


def test_steps_of_word_problems_are_correct(tiny_models):
    problems = tiny_models["word_problems"](300, seed=1)
    assert problems == tiny_models["word_problems"](300, seed=1)
    for problem in problems:
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)", problem["answer"])
        assert len(steps) == 2
        for step, result in steps:
            assert eval(step) == int(result), problem
        assert problem["answer"].endswith(f"\n#### {steps[-1][1]}")


def test_gsm8k_questions_survive_the_chat_template(tiny_models, shared_data):
    problems = tiny_models["read_problems"](shared_data / "gsm8k" / "test.jsonl")
    assert len(problems) == 1319
    assert not any("<<" in problem["answer"] for problem in problems)
    tokenizer = tiny_models["make_tokenizer"]([problem["question"] for problem in problems], size=2048)
    chat = [{"role": "user", "content": problems[0]["question"]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert problems[0]["question"] in tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert max(ids) < len(tokenizer) <= 2048
