"""Rewards: those that are built in, and what a reward of others is called with."""

from trl_opd.studies.rewards import exact_match, last_number, reward_completions


def test_built_in_rewards():
    assert exact_match([" 7 ", "8"], ["7", "7"]) == [1.0, 0.0]
    assert exact_match([[{"role": "assistant", "content": "7"}]], ["7"]) == [1.0]
    given = ["1 + 2 = 3.", "so 1,200", "-4", "none", "3.50"]
    assert last_number(given, ["#### 3", "1200", "4", "1", "3.5"]) == [1, 1, 0, 0, 1]


def test_a_reward_gets_prompts_completions_and_columns_as_trl_has_them():
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
