"""Measurements have the arithmetic of the loss, and the logged entropy is a mean over tokens."""

import pytest
import torch

from trl_opd.loss.divergence import weighted_divergence
from trl_opd.loss.lm_head import LMHead, logit_scale
from trl_opd.loss.logits import logit_chunks, reverse_kl_gradient
from trl_opd.loss.signals import HiddenStates
from trl_opd.training.rollout_samples import describe_tokens

from tests.helpers.families import make_family
from tests.helpers.rock_sets import rock_file
from tests.helpers.trainers import GREEDY, build

ROWS = 40


def make_states() -> HiddenStates:
    """Return hidden states and heads in bfloat16, of two models that differ a little."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 64, generator=generator)
    weight = torch.randn(200, 64, generator=generator)
    student = hidden.bfloat16(), LMHead(weight.bfloat16())
    teacher = (hidden + 0.05 * torch.randn(ROWS, 64, generator=generator)).bfloat16(), LMHead(weight.bfloat16())
    return HiddenStates(student[0], teacher[0], student[1], teacher[1])


def test_samples_in_bfloat16_have_the_divergence_and_entropy_of_the_loss():
    states = make_states()
    weights = torch.ones(ROWS)
    _, divergence, entropy = weighted_divergence(
        states.student, states.teacher, states.student_head, states.teacher_head, weights, 1.0, beta=1.0, temperature=1
    )
    found = describe_tokens(states, torch.zeros(ROWS, dtype=torch.long), temperature=1.0)
    torch.testing.assert_close(torch.tensor(found["kl"]), divergence, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["entropy"]), entropy, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_study_in_bfloat16_has_the_logits_of_the_loss(autocast):
    states = make_states()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chunks = [
            reverse_kl_gradient(student, teacher) for _, student, teacher in logit_chunks(states, temperature=1.0)
        ]
    student = states.student.double() @ states.student_head.weight.double().T
    teacher = states.teacher.double() @ states.teacher_head.weight.double().T
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, ratio = log_p.exp(), log_p - log_q
    expected = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(torch.cat(chunks).double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_entropy_of_frozen_positions_is_in_the_mean_or_no_mean_is_logged(tmp_path):
    """With frozen positions skipped in steps 1 and 2, the log of step 3 has the mean of step 3 alone."""
    rocks = {"token_weighting": "rock", "rock_set": rock_file(tmp_path / "rocks.json", range(3, 200))}
    settings = {"generation_kwargs": GREEDY, "learning_rate": 0.0, "max_steps": 3, "logging_steps": 3}
    lines = []
    for name, changes in (("all", {}), ("rocks", rocks)):
        trainer = build(tmp_path / name, **settings, **changes)
        trainer.train()
        lines.append(trainer.state.log_history[0])
    last = build(tmp_path / "last", **{**settings, "logging_steps": 1})
    last.train()
    assert lines[1]["entropy"] == pytest.approx(last.state.log_history[2]["entropy"], rel=1e-5)
    assert lines[1]["kl/mean"] == pytest.approx(last.state.log_history[2]["kl/mean"], rel=1e-5)
    mean_of_three = sum(line["entropy"] for line in last.state.log_history[:3]) / 3
    assert lines[0]["entropy"] == pytest.approx(mean_of_three, rel=0.02)


@pytest.mark.parametrize(
    ("family", "field", "value", "multiplier"),
    [
        ("falcon_h1", "lm_head_multiplier", 0.3, 0.3),
        ("hyperclovax", "logits_scaling", 0.3, 0.3),
        ("granite", "logits_scaling", 4.0, 0.25),
        ("cohere", "logit_scale", 0.3, 0.3),
        ("inkling_text", "logits_mup_width_multiplier", 4.0, 0.25),
        ("mpt", "logit_scale", 0.3, 1.0),
    ],
)
def test_multiplier_of_the_logits_is_read_as_the_family_uses_it(family, field, value, multiplier):
    assert logit_scale(make_family(family, **{field: value}).config.get_text_config()) == pytest.approx(multiplier)


def test_rollout_that_ends_in_padding_is_complete(tmp_path):
    """TRL's rule: a rollout whose last token is padding is not truncated."""
    padding = 0
    others = [token for token in range(300) if token != padding]
    trainer = build(
        tmp_path, mask_truncated_completions=True, max_steps=1, generation_kwargs={"suppress_tokens": others}
    )
    trainer.train()
    assert trainer.token_stats.seen.nonzero().flatten().tolist() == [padding]
