"""Rewards: the built-in functions, what a user's function is called with, and errors that name the problem."""

import pytest

from trl_opd.studies.rewards import exact_match, last_number, reward_completions


def test_built_in_rewards():
    assert exact_match([" 7 ", "8"], ["7", "7"]) == [1.0, 0.0]
    assert exact_match([[{"role": "assistant", "content": "7"}]], ["7"]) == [1.0]
    given = ["1 + 2 = 3.", "so 1,200", "-4", "none", "3.50"]
    assert last_number(given, ["#### 3", "1200", "4", "1", "3.5"]) == [1, 1, 0, 0, 1]
    assert last_number(["none"], ["none"]) == [0]


def test_reward_gets_prompts_completions_and_columns_as_in_trl():
    seen = {}

    def spy(**given):
        seen.update(given)
        return [0.5]

    chat = [{"role": "user", "content": "q"}]
    assert reward_completions(spy, [{"prompt": chat, "answer": "a", "level": 3}], ["text"], [0]) == [0.5]
    assert seen == {
        "prompts": [chat],
        "completions": [[{"role": "assistant", "content": "text"}]],
        "answer": ["a"],
        "level": [3],
    }


def raises_on_eggs(prompts, completions):
    if any("eggs" in prompt for prompt in prompts):
        raise KeyError("eggs")
    return [0.0] * len(completions)


def raises_on_a_batch(prompts, completions):
    return [1.0 / (2 - len(prompts))]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises_on_eggs, "raised KeyError for problem 8: 'eggs'"),
        (raises_on_a_batch, "raised ZeroDivisionError: .* It raises nothing for each problem alone"),
        (lambda **_: [1.0], "returned 1 numbers for 2 completions"),
        (lambda **_: [1.0, None], "returned None for problem 8, not a finite number"),
        (lambda **_: [float("nan")] * 2, "returned nan for problem 7, not a finite number"),
    ],
)
def test_failing_reward_is_an_error_that_names_the_problem(reward, message):
    rows = [{"prompt": "How many nuts?"}, {"prompt": "How many eggs?"}]
    with pytest.raises(ValueError, match=message):
        reward_completions(reward, rows, ["4", "5"], [7, 8])
