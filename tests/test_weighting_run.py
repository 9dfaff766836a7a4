"""Weighted runs: metrics computed by hand, projected positions, measured steps and the first step's warning."""

import re
import warnings

import pytest
import torch
from transformers import TrainerState

from trl_opd import Controls, OPDTrainer

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import AS_TRL, make_dataset, make_model
from tests.helpers.trainers import (
    ROCKS,
    Recorder,
    broken,
    build,
    ending_student,
    loss_positions,
    measured,
    record,
)

CONTROLS = Controls(ids=list(range(200, 240)), mass_ratio=1.0, matched=True)
GROUPS = ("rock/", "control/", "other/")
CHOSEN = {"rock": ROCKS, "control": CONTROLS.ids}


def far_teacher(factor: float = 60.0):
    teacher = make_model(seed=1)
    with torch.no_grad():
        teacher.lm_head.weight *= factor
    return teacher


def rocks_with_controls(path) -> str:
    corpus = {"rollouts": 4, "tokens": 4000, "kl_sum": 30.0}  # 120 rocks of count 10: a share of 0.3
    return rock_file(path / "rocks.json", ROCKS, controls=CONTROLS, corpus=corpus)


def expected_metrics(trainer, batches) -> dict[str, float]:
    """Return the metrics of these batches, computed by hand over all their tokens."""
    parts = [measured(trainer, batch) for batch in batches]
    ids, divergences = (torch.cat(part) for part in zip(*parts, strict=True))
    rock = torch.isin(ids, torch.tensor(ROCKS))
    control = torch.isin(ids, torch.tensor(CONTROLS.ids))
    masks = [torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1) for batch in batches]
    return {
        "kl/mean": divergences.mean().item(),
        "weight/zero_share": 0.0,
        "batch/padding_share": 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks),
        "rock/mean_kl": divergences[rock].mean().item(),
        "rock/token_share": rock.double().mean().item(),
        "rock/kl_share": (divergences[rock].sum() / divergences.sum()).item(),
        "control/mean_kl": divergences[control].mean().item(),
        "control/token_share": control.double().mean().item(),
        "other/mean_kl": divergences[~rock & ~control].mean().item(),
    }


# Metrics


@pytest.mark.parametrize("own_path", [False, True])
def test_metrics_between_two_logs_are_means_over_the_tokens_of_all_steps(tokenizer, tmp_path, own_path):
    rocks = {"rock_set": rocks_with_controls(tmp_path)} if own_path else AS_TRL
    changes = {"max_completion_length": 24, "learning_rate": 0.0, "logging_steps": 2, "max_steps": 4}
    changes |= {**rocks, "micro_batching": "trl"}
    trainer = record(tokenizer, tmp_path, student=ending_student(), **changes)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    batches = [batch for *_, batch in trainer.batches]
    for line, window in zip(lines, (batches[:2], batches[2:]), strict=True):
        assert len({loss_positions(batch).sum().item() for batch in window}) == 2  # a mean of means would differ
        expected = expected_metrics(trainer, window)
        shown = {name: line[name] for name in expected.keys() & line.keys()}
        if not own_path:
            expected = {name: value for name, value in expected.items() if not name.startswith(GROUPS)}
        assert shown == pytest.approx(expected, rel=1e-5)


def test_metrics_of_an_evaluation_equal_those_computed_by_hand(tmp_path):
    weighting = {"token_weighting": "rock", "rock_window": 1, "mask_truncated_completions": True}
    weighting["rock_set"] = rocks_with_controls(tmp_path)
    trainer = build(tmp_path, cls=Recorder, eval_dataset=make_dataset(3), per_device_eval_batch_size=2, **weighting)
    line = trainer.evaluate()
    batches = [batch for *_, batch in trainer.batches]
    assert [len(batch["completion_ids"]) for batch in batches] == [2, 1]
    assert all(torch.equal(loss_positions(b), b["completion_mask"].bool()) for b in batches)  # cut rollouts included
    expected = expected_metrics(trainer, batches)
    expected["loss"] = expected["kl/mean"]
    assert {name: line[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_metrics_of_a_weighted_step_are_unweighted(tokenizer, tmp_path):
    changes = {"token_weighting": "rock", "rock_weight": 0.5, "rock_set": rocks_with_controls(tmp_path)}
    trainer = record(tokenizer, tmp_path, micro_batching="trl", max_steps=1, learning_rate=0.0, **changes)
    (*_, batch), line = trainer.batches[0], trainer.state.log_history[0]
    expected = expected_metrics(trainer, [batch])
    ids, divergences = measured(trainer, batch)
    expected["loss"] = (divergences * torch.where(torch.isin(ids, torch.tensor(ROCKS)), 0.5, 1.0)).mean().item()
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalization", [None, "tokens", "weights"])
def test_step_with_only_cut_rollouts_trains_and_projects_nothing(tokenizer, tmp_path, projections, normalization):
    before = make_model(seed=0).state_dict()
    changes = {"max_completion_length": 1, "mask_truncated_completions": True, "max_steps": 1}
    if normalization is not None:
        changes |= {"token_weighting": "rock", "rock_set": rocks_with_controls(tmp_path)}
        changes |= {"weight_normalization": normalization}
    message = r"Step 1: every rollout was cut at max_completion_length=1, .* nothing is trained"
    with pytest.warns(UserWarning, match=message):
        trainer = record(tokenizer, tmp_path, **changes)
    assert sum(projections) == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    line = trainer.state.log_history[0]
    assert line["loss"] == 0.0
    assert not [name for name in line if name.startswith(("entropy", "kl/", "weight/", *GROUPS))]


# Measured steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"logging_steps": 3}, [3, 6, 9, 12]),
        ({"logging_steps": 5, "logging_first_step": True}, [1, 5, 10]),
        ({"logging_steps": 0.25, "max_steps": 20}, [5, 10]),
        ({"logging_strategy": "epoch"}, [10]),
        ({"logging_strategy": "no", "logging_first_step": True}, [10]),
    ],
)
def test_frozen_positions_are_measured_in_steps_that_log_or_in_every_tenth(tokenizer, tmp_path, changes, expected):
    trainer = build(tmp_path, token_weighting="rock", rock_set=rocks_with_controls(tmp_path), **changes)
    state = TrainerState()
    state.compute_steps(trainer.args, trainer.args.max_steps)  # turns a share of the run into steps, as `train` does
    found = []
    for state.global_step in range(12):
        if trainer._position_weights.measures_all(state):
            found.append(state.global_step + 1)
    assert found == expected


def test_every_step_is_measured_if_nothing_is_frozen(tokenizer, tmp_path):
    rocks, state = rocks_with_controls(tmp_path), TrainerState(global_step=3, logging_steps=100)
    for weighting in ({}, {"token_weighting": "rock", "rock_weight": 0.01}):
        assert build(tmp_path, rock_set=rocks, **weighting)._position_weights.measures_all(state)
    assert not build(tmp_path, rock_set=rocks, token_weighting="control")._position_weights.measures_all(state)


def test_run_that_logs_by_epoch_has_no_divergence_of_frozen_steps(tokenizer, tmp_path):
    changes = {"token_weighting": "rock", "rock_set": rocks_with_controls(tmp_path), "logging_strategy": "epoch"}
    line = record(tokenizer, tmp_path, **changes).state.log_history[0]
    assert 0 < line["weight/zero_share"] < 1
    assert not [name for name in line if name.startswith(("kl/", *GROUPS))]


@pytest.mark.parametrize("arm", ["uniform", "rock", "control", "random"])
def test_masked_and_frozen_positions_are_not_projected(tokenizer, tmp_path, projections, arm):
    changes = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 2}
    cut = {"max_completion_length": 24, "mask_truncated_completions": True}
    weighting = {"token_weighting": arm, "rock_set": rocks_with_controls(tmp_path)}
    trainer = record(tokenizer, tmp_path, student=ending_student(), **changes, **cut, **weighting)
    for _, step, _, batch in trainer.batches:
        mask = loss_positions(batch)
        assert 0 < mask.sum() < batch["completion_mask"].sum() < mask.numel()
        trained = int((batch["weights"][mask] != 0).sum()) if "weights" in batch else int(mask.sum())
        frozen = int(mask.sum()) - trained
        assert (frozen > 0) == (arm != "uniform")
        if arm in CHOSEN:
            chosen = torch.isin(batch["completion_ids"], torch.tensor(CHOSEN[arm]))
            assert torch.equal(batch["weights"], torch.where(chosen, 0.0, 1.0) * mask)
        # Each head once; in the step that logs, each once more for the frozen rows.
        expected = [trained] * 2 + ([frozen] * 2 if frozen and step == 1 else [])
        assert projections[: len(expected)] == expected
        del projections[: len(expected)]
    assert projections == []
    trainer.evaluate(make_dataset(3))
    batch = trainer.batches[-1][3]
    assert projections == [int(batch["completion_mask"].sum())] * 2  # every row once, whatever the arm


# Numbers that are not finite


@pytest.mark.parametrize("own_path", [False, True])
@pytest.mark.slow
def test_error_names_the_step_with_broken_logits_and_the_next_run_is_clean(tmp_path, own_path):
    class BreaksInStep3(OPDTrainer):
        breaks = True

        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and self.breaks:
                broken(self.teacher_model, "nan")
            return super().training_step(*args, **kwargs)

    rocks = {"rock_set": rocks_with_controls(tmp_path)} if own_path else AS_TRL
    trainer = build(tmp_path, cls=BreaksInStep3, max_steps=5, logging_steps=5, **rocks)
    with pytest.raises(ValueError, match="Step 3: the teacher's logits"):
        trainer.train()
    assert trainer.state.global_step == 2
    trainer.breaks = False
    trainer.teacher_model.load_state_dict(make_model(seed=1).state_dict())
    trainer.train()  # and the next run shows nothing of the broken one
    assert trainer.state.log_history[0]["step"] == 5
    assert 0.1 < trainer.state.log_history[0]["kl/mean"] < 5


# The divergence of the first step


def warned_divergences(trainer) -> list[str]:
    """Train, and return the mean divergences that warnings of the first step contain, in nats per token."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(warning.message) for warning in caught]
    return [re.search(r"is (\S+) nats per token", text)[1] for text in texts if "divergence of the first step" in text]


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_warning_contains_the_mean_divergence_of_the_first_step(tmp_path, batch, accumulation):
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = build(tmp_path, teacher=far_teacher(), **split)
    assert warned_divergences(trainer) == [f"{trainer.state.log_history[0]['kl/mean']:.1f}"]


def test_second_run_checks_only_its_own_first_step(tmp_path):
    trainer = build(tmp_path, teacher=far_teacher(3.5), max_steps=1, learning_rate=0.0)
    assert warned_divergences(trainer) + warned_divergences(trainer) == []
    assert 5 < trainer.state.log_history[0]["kl/mean"] < 10


def test_warning_uses_the_unweighted_divergence_of_the_first_step(tmp_path):
    weighting = {"token_weighting": "rock", "rock_weight": 0.01, "max_steps": 1}
    rocks = rock_file(tmp_path / "rocks.json", range(3, 300))
    (found,) = warned_divergences(build(tmp_path, teacher=far_teacher(), rock_set=rocks, **weighting))
    assert float(found) > 10


def test_warning_uses_the_trained_positions_if_frozen_ones_are_not_measured(tmp_path):
    weighting = {"token_weighting": "rock", "rock_set": rocks_with_controls(tmp_path), "logging_steps": 2}
    trainer = build(tmp_path, teacher=far_teacher(), cls=Recorder, learning_rate=0.0, **weighting)
    found = warned_divergences(trainer)
    *_, batch = trainer.batches[0]
    ids, divergences = measured(trainer, batch, teacher=far_teacher())
    assert found == [f"{divergences[~torch.isin(ids, torch.tensor(ROCKS))].mean().item():.1f}"]
