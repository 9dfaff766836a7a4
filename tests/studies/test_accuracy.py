"""The callback that measures accuracy: its completions, metrics and steps, and a run that it does not change."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_opd import AccuracyCallback, OPDTrainer
from trl_opd.statistics import accuracy_interval, mean_interval

from tests.helpers.problems import Seen, problems
from tests.helpers.tiny import PROMPTS, make_model
from tests.helpers.trainers import build


def run(path, *callbacks, **changes) -> OPDTrainer:
    trainer = build(path, **{"max_steps": 1, **changes})
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def accuracy_lines(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "eval_accuracy" in line]


@torch.no_grad()
def greedy(model, tokenizer, prompt: str) -> str:
    """Return the most likely completion of 12 tokens, each decoded from the whole text."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = []
    while len(ids) < 12 and tokenizer.eos_token_id not in ids:
        logits = model.eval()(input_ids=torch.tensor([prompt_ids + ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_completions_are_greedy_and_of_the_student_at_that_step(tokenizer, tmp_path):
    reward = Seen()
    callback = AccuracyCallback(problems(5), reward, eval_steps=2)
    trainer = run(tmp_path, callback, student=make_model("gpt2"), max_steps=3)
    assert [line["step"] for line in accuracy_lines(trainer)] == [0, 2, 3]
    first = [greedy(make_model("gpt2"), tokenizer, prompt) for prompt in PROMPTS[:5]]
    assert reward.calls[0] == (PROMPTS[:5], first, [f"answer {row}" for row in range(5)])
    assert reward.calls[-1][1] == [greedy(trainer.model, tokenizer, prompt) for prompt in PROMPTS[:5]]
    line = accuracy_lines(trainer)[0]
    right = [len(text) % 2 == 0 for text in first]
    assert line["eval_accuracy"] == sum(right) / 5
    assert line["eval_accuracy_problems"] == 5
    assert (line["eval_accuracy_ci95_low"], line["eval_accuracy_ci95_high"]) == accuracy_interval(right)


class Logged(TrainerCallback):
    """Keeps what `report_to` backends get."""

    def __init__(self):
        self.metrics = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.metrics |= logs


def test_several_callbacks_log_rewards_of_any_kind_under_their_own_names(tmp_path):
    chat = Seen()
    scores = [0.25, 0.5, 0.75, 1.0]
    logged = Logged()
    callbacks = [
        AccuracyCallback(problems(3, chat=True), chat),
        AccuracyCallback(problems(4), Seen(scores), name="scores"),
        AccuracyCallback(problems(3), Seen([0.5] * 3), name="equal"),
    ]
    run(tmp_path, *callbacks, logged)
    prompts, completions, _ = chat.calls[0]
    assert prompts[0] == [{"role": "user", "content": PROMPTS[0]}]
    assert completions[0][0]["role"] == "assistant"
    mean, interval = mean_interval(scores, seed=7)
    assert logged.metrics["eval_scores"] == mean == 0.625
    assert (logged.metrics["eval_scores_ci95_low"], logged.metrics["eval_scores_ci95_high"]) == interval
    assert 0.25 < interval[0] < 0.5 < 0.7 < interval[1] < 1.0
    assert [name for name in logged.metrics if "equal" in name] == ["eval_equal", "eval_equal_problems"]
    wanted = {"completions/repetition", "completions/clipped_ratio", "completions/mean_length", "eval_accuracy"}
    assert wanted <= logged.metrics.keys()
    assert json.dumps(logged.metrics)  # backends take plain numbers only


@pytest.mark.parametrize(
    ("greedily", "peft_config"), [(True, None), (False, LoraConfig(r=4, target_modules="all-linear"))]
)
@pytest.mark.slow
def test_callback_does_not_change_the_run(tmp_path, greedily, peft_config):
    def noisy(completions, **_):
        return [float(torch.rand(())) for _ in completions]

    def outcome(*callbacks):
        trainer = run(tmp_path, *callbacks, max_steps=3, logging_steps=2, peft_config=peft_config)
        lines = [line for line in trainer.state.log_history if "loss" in line or "train_loss" in line]
        timed = ("time", "per_second", "_s")
        return trainer.model.state_dict(), [
            {name: value for name, value in line.items() if not name.endswith(timed)} for line in lines
        ]

    weights, lines = outcome(AccuracyCallback(problems(3), noisy, eval_steps=1, greedy=greedily))
    expected_weights, expected_lines = outcome()
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)
    assert lines == expected_lines
    assert [line["step"] for line in lines] == [2, 3]


def test_sampled_evaluations_use_the_same_noise_every_time(tokenizer, tmp_path):
    reward = Seen()
    run(tmp_path, AccuracyCallback(problems(4), reward, eval_steps=1, greedy=False), max_steps=2, learning_rate=0.0)
    texts = [completions for _, completions, _ in reward.calls]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != [greedy(make_model(), tokenizer, prompt) for prompt in PROMPTS[:4]]


@pytest.mark.slow
def test_default_is_ten_evaluations_after_the_first(tmp_path):
    callback = AccuracyCallback(problems(2), Seen())
    trainer = run(tmp_path, callback, max_steps=20, max_completion_length=2, gradient_accumulation_steps=1)
    assert [line["step"] for line in accuracy_lines(trainer)] == list(range(0, 21, 2))


def test_ids_that_the_teacher_lacks_are_never_sampled(tokenizer, tmp_path):
    student = make_model(rows=310)
    with torch.no_grad():
        student.lm_head.weight[300:] = 10 * student.lm_head.weight[:10]
    tokenizer.save_pretrained(tmp_path / "teacher")
    callback = AccuracyCallback(problems(4), Seen())
    run(tmp_path, callback, student=student, teacher_tokenizer_name_or_path=str(tmp_path / "teacher"))
    completions = callback._complete(range(4))
    assert max(map(max, completions)) < 300
    callback.trainer.generation_kwargs.pop("suppress_tokens")
    assert max(map(max, callback._complete(range(4)))) >= 300


@pytest.mark.parametrize(
    ("dataset", "reward", "settings", "message"),
    [
        (Dataset.from_dict({"question": ["a"]}), Seen(), {}, "no column 'prompt'"),
        (Dataset.from_dict({"prompt": []}), Seen(), {}, "The dataset of problems is empty"),
        ([], Seen(), {}, "got a dataset without rows: pass at least one problem"),
        (problems(2), "exact", {}, "got the reward 'exact', which cannot be called: pass a function"),
        (problems(2), Seen(), {"eval_steps": 0}, "eval_steps must be a whole number of at least 1, got 0"),
    ],
)
def test_invalid_argument_is_an_error_before_training(dataset, reward, settings, message):
    with pytest.raises(ValueError, match=message):
        AccuracyCallback(dataset, reward, **settings)


def test_failing_reward_is_an_error_during_training(tmp_path):
    with pytest.raises(ValueError, match="returned None for problem 0, not a finite number"):
        run(tmp_path, AccuracyCallback(problems(2), Seen([None, 1.0])))


def test_sampled_completions_have_the_temperature_of_the_training(tmp_path):
    """At a temperature near 0 they are the greedy ones."""
    texts = []
    for is_greedy, temperature in ((True, 1.0), (False, 1e-4), (False, 1.0)):
        reward = Seen()
        run(tmp_path, AccuracyCallback(problems(4), reward, greedy=is_greedy), temperature=temperature)
        texts.append(reward.calls[0][1])
    assert texts[1] == texts[0]
    assert texts[2] != texts[0]
