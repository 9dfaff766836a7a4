"""The callback that lets the student solve problems: right figures, at the right steps, and no trace in the run."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_opd import AccuracyCallback, OPDTrainer
from trl_opd.statistics import accuracy_interval, mean_interval

from tests.helpers.problems import Seen, problems
from tests.helpers.tiny import PROMPTS, make_config, make_dataset, make_model


def build(tokenizer, path, *callbacks, student=None, peft_config=None, **changes) -> OPDTrainer:
    return OPDTrainer(
        model=student or make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(path, **changes),
        train_dataset=make_dataset(chat=False),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def accuracy_lines(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "eval_accuracy" in line]


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, most: int) -> str:
    """Return the likeliest continuation, a token at a time, each from the whole text."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) - start < most:
        ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.slow
def test_the_student_of_that_step_solves_every_problem_greedily(tokenizer, tmp_path, family):
    reward = Seen()
    callback = AccuracyCallback(problems(5), reward, eval_steps=2)
    trainer = build(tokenizer, tmp_path, callback, student=make_model(family), max_steps=3)
    trainer.train()
    assert [line["step"] for line in accuracy_lines(trainer)] == [0, 2, 3]
    expected = [greedy(make_model(family), tokenizer, prompt, 12) for prompt in PROMPTS[:5]]
    assert reward.calls[0][1] == expected
    last = [greedy(trainer.model, tokenizer, prompt, 12) for prompt in PROMPTS[:5]]
    assert reward.calls[-1][1] == last
    assert reward.calls[0][0] == PROMPTS[:5]
    assert reward.calls[0][2] == [f"answer {row}" for row in range(5)]
    line, right = accuracy_lines(trainer)[0], [len(text) % 2 == 0 for text in expected]
    assert line["eval_accuracy"] == sum(right) / 5
    assert line["eval_accuracy_problems"] == 5
    assert (line["eval_accuracy_ci95_low"], line["eval_accuracy_ci95_high"]) == accuracy_interval(right)


@pytest.mark.slow
def test_a_conversation_is_asked_and_answered_as_one(tokenizer, tmp_path):
    reward = Seen()
    build(tokenizer, tmp_path, AccuracyCallback(problems(3, chat=True), reward), max_steps=1).train()
    prompts, completions, _ = reward.calls[0]
    assert prompts[0] == [{"role": "user", "content": PROMPTS[0]}]
    assert completions[0][0]["role"] == "assistant"


@pytest.mark.parametrize("greedily", [True, False])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules="all-linear")])
@pytest.mark.slow
def test_a_run_with_the_callback_is_the_run_without_it(tokenizer, tmp_path, greedily, peft_config):
    def noisy(completions, **_):
        return [float(torch.rand(())) for _ in completions]

    callback = AccuracyCallback(problems(3), noisy, eval_steps=1, greedy=greedily)
    trainers = []
    for name, callbacks in (("with", [callback]), ("without", [])):
        config = {"max_steps": 3, "logging_steps": 2, "peft_config": peft_config}
        trainers.append(build(tokenizer, tmp_path / name, *callbacks, **config))
        trainers[-1].train()
    for name, value in trainers[0].model.state_dict().items():
        assert torch.equal(value, trainers[1].model.state_dict()[name]), name
    lines = [
        [line for line in trainer.state.log_history if "loss" in line or "train_loss" in line] for trainer in trainers
    ]
    timed = ("time", "per_second", "_s")
    plain = [[{k: v for k, v in line.items() if not k.endswith(timed)} for line in part] for part in lines]
    for line in [*plain[0], *plain[1]]:
        for name in ("train_runtime", "step_time"):
            line.pop(name, None)
    assert plain[0] == plain[1]
    assert [line["step"] for line in lines[0]] == [2, 3]


def test_sampling_has_noise_of_its_own_that_is_the_same_every_time(tokenizer, tmp_path):
    reward = Seen()
    callback = AccuracyCallback(problems(4), reward, eval_steps=1, greedy=False)
    build(tokenizer, tmp_path, callback, max_steps=2, learning_rate=0.0).train()
    texts = [completions for _, completions, _ in reward.calls]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != [greedy(make_model(), tokenizer, prompt, 12) for prompt in PROMPTS[:4]]


def test_rewards_that_are_no_zeros_and_ones_have_a_bootstrap_interval(tokenizer, tmp_path):
    values = [0.25, 0.5, 0.75, 1.0]
    trainer = build(tokenizer, tmp_path, AccuracyCallback(problems(4), Seen(values)), max_steps=1)
    trainer.train()
    line = accuracy_lines(trainer)[0]
    mean, interval = mean_interval(values, seed=7)
    assert line["eval_accuracy"] == mean == 0.625
    assert (line["eval_accuracy_ci95_low"], line["eval_accuracy_ci95_high"]) == interval
    assert 0.25 < interval[0] < 0.5 < 0.7 < interval[1] < 1.0


def test_rewards_that_are_all_equal_have_no_interval(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, AccuracyCallback(problems(3), Seen([0.5] * 3)), max_steps=1)
    trainer.train()
    assert not any("ci95" in name for line in accuracy_lines(trainer) for name in line)
    assert mean_interval([1.0, 1.0], seed=0)[1] is not None


@pytest.mark.slow
def test_without_a_number_it_evaluates_ten_times(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, AccuracyCallback(problems(2), Seen()), max_steps=20, logging_steps=50)
    trainer.train()
    assert [line["step"] for line in accuracy_lines(trainer)] == list(range(0, 21, 2))


def test_two_callbacks_have_figures_of_their_own(tokenizer, tmp_path):
    callbacks = [AccuracyCallback(problems(2), Seen([0.0, 1.0]), name=name) for name in ("sums", "words")]
    trainer = build(tokenizer, tmp_path, *callbacks, max_steps=1)
    trainer.train()
    names = {name for line in trainer.state.log_history for name in line}
    assert {"eval_sums", "eval_words", "eval_sums_ci95_low"} <= names


class Logged(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_what_report_to_names_gets_accuracy_repetition_truncation_and_length(tokenizer, tmp_path):
    logged = Logged()
    build(tokenizer, tmp_path, AccuracyCallback(problems(2), Seen()), logged, max_steps=1).train()
    names = {name for logs in logged.seen for name in logs}
    wanted = {"completions/repetition", "completions/clipped_ratio", "completions/mean_length", "eval_accuracy"}
    assert wanted <= names
    assert json.dumps(logged.seen)  # plain numbers, as every backend takes them


def test_ids_that_the_teacher_lacks_are_never_answered(tokenizer, tmp_path):
    student = make_model(rows=310)
    with torch.no_grad():
        student.lm_head.weight[300:] = 10 * student.lm_head.weight[:10]
    tokenizer_path = tmp_path / "teacher"
    tokenizer.save_pretrained(tokenizer_path)
    reward = Seen()
    trainer = build(
        tokenizer,
        tmp_path,
        AccuracyCallback(problems(4), reward),
        student=student,
        max_steps=1,
        teacher_tokenizer_name_or_path=str(tokenizer_path),
    )
    seen = []
    decode = trainer._tokenizer.batch_decode
    trainer._tokenizer.batch_decode = lambda rows, **kwargs: seen.extend(rows) or decode(rows, **kwargs)
    try:
        trainer.train()
    finally:
        del trainer._tokenizer.batch_decode
    assert seen
    assert max(max(ids) for ids in seen if isinstance(ids, list)) < 300


@pytest.mark.parametrize(
    ("dataset", "reward", "settings", "message"),
    [
        (Dataset.from_dict({"question": ["a"]}), Seen(), {}, "no column 'prompt'"),
        (Dataset.from_dict({"prompt": []}), Seen(), {}, "The dataset of problems is empty"),
        ([], Seen(), {}, "at least one problem"),
        (problems(2), "exact", {}, "takes a reward function, got 'exact'"),
        (problems(2), Seen(), {"eval_steps": 0}, "eval_steps must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_the_training(dataset, reward, settings, message):
    with pytest.raises(ValueError, match=message):
        AccuracyCallback(dataset, reward, **settings)


@pytest.mark.parametrize(
    ("values", "message"), [([None, 1.0], "problem 0 is None"), ([1.0], "1 numbers for 2 completions")]
)
def test_a_reward_that_fails_is_named_with_its_problem(tokenizer, tmp_path, values, message):
    trainer = build(tokenizer, tmp_path, AccuracyCallback(problems(2), Seen(values)), max_steps=1)
    with pytest.raises(ValueError, match=message):
        trainer.train()
