"""Both ways to the divergence, our op (CPU) and TRL's (CUDA), against plain formulas in float64.

TRL's op runs on a CPU by tiles in torch. Its Triton kernels run there too, in Triton's interpreter, where Triton is
installed.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from trl.kernels import chunked_divergence

from trl_opd.loss import divergence
from trl_opd.loss.divergence import divergence_by_trl, divergence_fused, weighted_divergence
from trl_opd.loss.lm_head import LMHead

from tests.helpers import reference
from tests.helpers.paths import ROOT

ROWS, WIDTHS, VOCAB = 7, (12, 20), (41, 53)


@pytest.fixture(params=[divergence_fused, divergence_by_trl], ids=["ours", "TRL's"])
def way(request, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":  # TRL takes Triton on a GPU only
        monkeypatch.setattr(chunked_divergence, "_use_triton", lambda device: True)
    monkeypatch.setattr(divergence, "way_on", lambda device: request.param)


def make_heads(*, dtype=torch.float32, bias: bool = True) -> tuple[LMHead, LMHead]:
    """Return heads of two widths and vocabularies, with a multiplier and a cap of their own."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, width, generator=generator) for rows, width in zip(VOCAB, WIDTHS, strict=True)]
    biases = [torch.randn(rows, generator=generator) if bias else None for rows in VOCAB]
    student = LMHead(weights[0].to(dtype).requires_grad_(), biases[0], 0.7, 6.0)
    teacher = LMHead(weights[1].to(dtype), biases[1], 1.3, None)
    if bias:
        student.bias.requires_grad_()
    return student, teacher


def make_states(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(ROWS, width, generator=generator).to(dtype) for width in WIDTHS)
    return student.requires_grad_(), teacher


def by_reference(states, heads, weights, denominator, beta, temperature):
    """Return loss, divergences and entropies in float64, with a graph to the student's tensors."""
    vocab = min(VOCAB)
    values, entropies = [], []
    for student_row, teacher_row in zip(*states, strict=True):
        student = reference.head_logits(student_row, heads[0])[:vocab] / temperature
        teacher = reference.head_logits(teacher_row, heads[1])[:vocab] / temperature
        values.append(reference.divergence(student, teacher, beta))
        entropies.append(reference.entropy(student))
    values = torch.stack(values)
    return (values * weights).sum() / denominator, values, torch.stack(entropies)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_value_gradient_and_entropy_are_those_of_the_formulas(way, beta, bias):
    heads, states = make_heads(bias=bias), make_states()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 3.0])
    leaves = [states[0], heads[0].weight, *([heads[0].bias] if bias else [])]

    loss, values, entropies = weighted_divergence(*states, *heads, weights, 4.0, beta=beta, temperature=1.7)
    found = torch.autograd.grad(loss, leaves)
    expected_loss, expected_values, expected_entropies = by_reference(states, heads, weights, 4.0, beta, 1.7)
    expected = torch.autograd.grad(expected_loss, leaves)

    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    projected = weights != 0
    torch.testing.assert_close(values[projected].double(), expected_values[projected], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropies[projected].double(), expected_entropies[projected], rtol=1e-4, atol=1e-6)
    assert values[~projected].isnan().all()
    assert entropies[~projected].isnan().all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_weight_scales_the_gradient_of_its_row_alone(way):
    heads, states = make_heads(), make_states()
    gradients = []
    for first in (1.0, 3.0):
        weights = torch.ones(ROWS)
        weights[0] = first
        loss, _, _ = weighted_divergence(*states, *heads, weights, 1.0, beta=1.0, temperature=1.0)
        gradients.append(torch.autograd.grad(loss, states[0])[0])
    torch.testing.assert_close(gradients[1][0], 3 * gradients[0][0])
    torch.testing.assert_close(gradients[1][1:], gradients[0][1:])


def test_equal_models_have_no_divergence_and_the_teacher_no_gradient(way):
    head, _ = make_heads()
    states = make_states()[0]
    twin = states.detach().clone().requires_grad_()
    teacher = LMHead(head.weight.detach().clone().requires_grad_(), head.bias.detach(), head.logit_scale, head.softcap)
    loss, values, _ = weighted_divergence(states, twin, head, teacher, torch.ones(ROWS), 1.0, beta=1.0, temperature=1.0)
    assert values.abs().max() < 1e-6
    loss.backward()
    assert twin.grad is None
    assert teacher.weight.grad is None


def test_denominator_of_zero_gives_loss_and_gradient_of_zero(way):
    heads, states = make_heads(), make_states()
    loss, _, _ = weighted_divergence(*states, *heads, torch.zeros(ROWS), 0.0, beta=1.0, temperature=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert not states[0].grad.any()


def test_both_ways_agree_in_bfloat16(monkeypatch):
    heads, states = make_heads(dtype=torch.bfloat16), make_states(torch.bfloat16)
    found = []
    for function in (divergence_fused, divergence_by_trl):
        monkeypatch.setattr(divergence, "way_on", lambda device, function=function: function)
        loss, values, _ = weighted_divergence(*states, *heads, torch.ones(ROWS), 1.0, beta=1.0, temperature=1.0)
        found.append((values, *torch.autograd.grad(loss, [states[0], heads[0].weight])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_trls_triton_kernels_give_the_same_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "TRL and formulas"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:]
