"""Logits that are not finite: in one rollout, in one entry of the vocabulary, in half precision, in every command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from trl_opd.cli import main

from tests.helpers import trainers
from tests.helpers.command_line import flags
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import AS_TRL, make_model, make_tokenizer
from tests.helpers.trainers import GREEDY, assert_same_weights, broken

NAN, INF = float("nan"), float("inf")
BATCHED = {"use_transformers_continuous_batching": True}
# Only the third prompt has a Q, and no rollout has one.
RARE = "Q"
PROMPTS = ["Add 3", "so it", "Q it", "we add"]
ADVICE = {
    "student": "lower learning_rate or max_grad_norm, use bf16 instead of fp16, and check the checkpoint.",
    "teacher": "load it in bfloat16 or float32 instead of float16, and check its weights and its quantisation.",
}


def broken_row(seed: int, value: float = NAN) -> torch.nn.Module:
    """Return a model whose logits are broken only after the rare token."""
    model = make_model(seed=seed)
    (rare,) = make_tokenizer()(RARE)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = value
    return model


def broken_entry(seed: int, value: float) -> torch.nn.Module:
    """Return a model whose logit of id 50 is this number at every position."""
    model = make_model("phi", seed=seed)
    with torch.no_grad():
        model.lm_head.bias[50] = value
    return model


def healthy_and(culprit: str, make_broken: Callable[[int], torch.nn.Module], family: str = "qwen3") -> dict:
    """Return student and teacher by name, of which the culprit is broken."""
    models = {"student": make_model(family, seed=0), "teacher": make_model(family, seed=1)}
    return models | {culprit: make_broken(list(models).index(culprit))}


def overflowing(scale: float, dtype: torch.dtype) -> torch.nn.Module:
    """Return a teacher whose last hidden states are finite in float32, with numbers of about `scale`."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    return model.to(dtype)


def build(path, *, student=None, teacher=None, rows=PROMPTS, eval_rows=PROMPTS, **changes):
    unwritten = {"suppress_tokens": make_tokenizer()(RARE)["input_ids"], **changes.pop("generation_kwargs", {})}
    fixed = {"shuffle_dataset": False, "max_completion_length": 4, "generation_kwargs": unwritten}
    data, evaluation = (Dataset.from_dict({"prompt": prompts}) for prompts in (rows, eval_rows))
    return trainers.build(path, student, teacher, train_dataset=data, eval_dataset=evaluation, **fixed, **changes)


def stops(run, culprit: str, step: int = 1) -> None:
    """Run, and expect the error that names model and step."""
    with pytest.raises(ValueError, match=f"^Step {step}: the {culprit}'s logits are not finite") as error:
        run()
    assert str(error.value).endswith(ADVICE[culprit])


# One rollout, one entry


@pytest.mark.parametrize("settings", [{}, AS_TRL, {"num_generations": 2}], ids=["ours", "as TRL", "groups"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_one_broken_rollout_of_the_teacher_stops_the_step_before_the_update(tmp_path, value, settings):
    trainer = build(tmp_path, teacher=broken_row(1, value), **settings)
    groups = "num_generations" in settings  # the third prompt is drawn in the second step
    stops(trainer.train, "teacher", step=2 if groups else 1)
    if not groups:
        assert_same_weights(trainer.model, make_model(seed=0))


@pytest.mark.parametrize("settings", [{}, {"generation_kwargs": GREEDY}, BATCHED])
def test_one_broken_rollout_of_the_student_stops_the_step(tmp_path, settings):
    stops(build(tmp_path, student=broken_row(0), **settings).train, "student")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("settings", [{}, AS_TRL], ids=["ours", "as TRL"])
@pytest.mark.parametrize("culprit", ["student", "teacher"])
def test_one_broken_entry_of_the_vocabulary_stops_the_run(tmp_path, culprit, value, settings, beta):
    models = healthy_and(culprit, lambda seed: broken_entry(seed, value), family="phi")
    stops(build(tmp_path, **models, beta=beta, **settings).train, culprit)


@pytest.mark.parametrize("settings", [{}, AS_TRL], ids=["ours", "as TRL"])
@pytest.mark.parametrize("where", ["nan", "inf", "everywhere"])
@pytest.mark.parametrize("culprit", ["student", "teacher"])
@pytest.mark.slow
def test_broken_weights_stop_evaluation_prediction_and_training(tmp_path, culprit, where, settings):
    models = healthy_and(culprit, lambda seed: broken(make_model(seed=seed), where))
    trainer = build(tmp_path, **models, generation_kwargs=GREEDY, **settings)
    stops(trainer.evaluate, culprit, step=0)
    stops(lambda: trainer.predict(trainer.eval_dataset), culprit, step=0)
    stops(trainer.train, culprit)


def test_broken_token_that_no_rollout_contains_does_not_stop_the_run(tmp_path):
    trainer = build(tmp_path, teacher=broken_row(1), rows=[*PROMPTS[:2], *PROMPTS[3:]] * 4)
    trainer.train()
    assert trainer.state.global_step == 2


# Evaluation


@pytest.mark.parametrize(("culprit", "step"), [("student", 1), ("teacher", 0)])
def test_one_broken_rollout_stops_an_evaluation(tmp_path, culprit, step):
    trainer = build(tmp_path, **healthy_and(culprit, broken_row))
    stops(trainer.evaluate, culprit, step=step)


def test_one_broken_rollout_in_an_evaluation_stops_the_training(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "rows": [PROMPTS[0]] * 8}
    stops(build(tmp_path, teacher=broken_row(1), **settings).train, "teacher")


# Half precision


@pytest.mark.parametrize("settings", [{}, AS_TRL], ids=["ours", "as TRL"])
@pytest.mark.slow
def test_float16_teacher_that_overflows_is_an_error_and_bfloat16_trains(tmp_path, settings):
    stops(build(tmp_path, teacher=overflowing(1e5, torch.float16), **settings).train, "teacher")
    trainer = build(tmp_path, teacher=overflowing(1e5, torch.bfloat16), **settings)
    with pytest.warns(UserWarning, match="as between unrelated models"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_teacher_whose_logits_overflow_only_in_float16_is_compared_in_float32(tmp_path):
    teacher = overflowing(1.0, torch.float16)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(5e4)
    assert torch.isfinite(teacher.lm_head.weight).all()
    assert not torch.isfinite(teacher(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    trainer = build(tmp_path, teacher=teacher)
    with pytest.warns(UserWarning, match="as between unrelated models"):
        trainer.train()
    assert trainer.state.log_history[0]["kl/mean"] > 1e3


# Commands


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Healthy models, models that are broken in one rollout, prompts, a collection and a rock set."""
    folder = tmp_path_factory.mktemp("world")
    models = {"student": make_model(seed=0), "teacher": make_model(seed=1)}
    models |= {"bad_student": broken_row(0), "bad_teacher": broken_row(1)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": prompt, "answer": "7"} for prompt in PROMPTS]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rock_file(folder / "rocks.json", range(60, 90))
    assert main(["collect", *flags(folder, folder / "rollouts")]) == 0
    return folder


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_healthy_models_pass_collect(world, tmp_path):
    assert main(["collect", *flags(world, tmp_path / "out", reference_model_name_or_path=world / "student")]) == 0


@pytest.mark.parametrize(
    ("role", "more", "said"),
    [
        ("student", [], "Step 1: the student's logits are not finite"),
        ("student", ["--greedy"], "The logits of student or teacher are not finite"),
        ("teacher", [], "The logits of student or teacher are not finite"),
        ("reference", [], "The logits of reference student or teacher are not finite"),
    ],
)
def test_one_broken_rollout_stops_collect(world, tmp_path, capsys, role, more, said):
    name = {"student": "", "teacher": "teacher_", "reference": "reference_"}[role] + "model_name_or_path"
    bad = world / ("bad_teacher" if role == "teacher" else "bad_student")
    assert main(["collect", *flags(world, tmp_path / "out", **{name: bad}), *more]) == 1
    assert last_line(capsys).startswith(f"trl-opd collect: error: {said}")
    assert not (tmp_path / "out" / "occurrences.parquet").exists()


@pytest.mark.parametrize("more", [["--greedy"], ["--temperature", "0.7"]])
def test_probe_names_the_problem_whose_logits_are_broken(world, tmp_path, capsys, more):
    given = ["--model_name_or_path", world / "bad_student", "--dataset_name", world / "chats.jsonl", "--use_cpu"]
    given += ["--candidates", "all", "--max_completion_length", 4, "--output", tmp_path / "k.json", *more]
    assert main(["probe", *map(str, given)]) == 1
    assert "Problem 2, arm 'baseline': the student's logits are not finite:" in last_line(capsys)
    assert not (tmp_path / "k.json").exists()


@pytest.mark.parametrize(
    ("changes", "bad"),
    [
        ({}, None),
        ({"model_name_or_path": "bad_student"}, "student"),
        ({"teacher_model_name_or_path": "bad_teacher"}, "teacher"),
    ],
)
@pytest.mark.slow
def test_one_broken_rollout_stops_gradients(world, tmp_path, capsys, changes, bad):
    changes = {name: world / folder for name, folder in changes.items()}
    run = flags(world, tmp_path / "out", dataset_name=None, rock_set=world / "rocks.json", **changes)
    table = tmp_path / "gradients.parquet"
    given = [str(world / "rollouts" / "occurrences.parquet"), "--output", str(table), *run]
    assert main(["gradients", *given]) == (bad is not None)
    assert table.exists() == (bad is None)
    if bad is not None:
        assert f"error: The {bad}'s logits are not finite (NaN or infinite)" in last_line(capsys)
