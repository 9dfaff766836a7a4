"""The fused divergence: values and gradients against float64, chunks, precision, memory, and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opd import LMHead, weighted_divergence
from trl_opd.loss import fused
from trl_opd.loss.divergence import divergence_by_trl
from trl_opd.loss.fused import MAX_ROWS, FusedDivergence, _rows_of_a_chunk

from tests.helpers import reference

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
HEADS = [{}, {"logit_scale": 0.3}, {"softcap": 4.0}, {"logit_scale": 2.0, "softcap": 6.0}]
# Largest error of a gradient, relative to its norm: the cost of rounding it once to the dtype, and a little more.
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 2e-3}


def make_case(n=23, widths=(13, 17), rows=(401, 401), dtype=torch.float32, bias=True, **head):
    """Return hidden states, heads and weights; every tensor of the student requires a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden = [draw(n, width) for width in widths]
    heads = [
        LMHead(draw(v, width) * 0.4, draw(v) if bias else None, **head) for width, v in zip(widths, rows, strict=True)
    ]
    case = hidden, heads, torch.rand(n, generator=generator)
    for tensor in trained_tensors(case):
        tensor.requires_grad_()
    return case


def trained_tensors(case) -> list[torch.Tensor]:
    hidden, heads, _ = case
    return [tensor for tensor in (hidden[0], heads[0].weight, heads[0].bias) if tensor is not None]


def diverge(case, denominator=1.0, *, beta=1.0, temperature=1.0, **options):
    """Return the loss, the divergences and the entropies of a case."""
    hidden, heads, weights = case
    return weighted_divergence(*hidden, *heads, weights, denominator, beta=beta, temperature=temperature, **options)


def results(case, *arguments, **options) -> list[torch.Tensor]:
    """Return the loss, the divergences, the entropies and the gradients of the states, the weight and the bias."""
    found = diverge(case, *arguments, **options)
    found[0].backward()
    return [*found, *(tensor.grad for tensor in trained_tensors(case))]


def expected_results(case, denominator, *, beta=1.0, temperature=1.0) -> list[torch.Tensor]:
    """Return the same as `results`, in float64."""
    hidden, heads, weights = case
    vocab = min(len(head.weight) for head in heads)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden[0], heads[0].weight, heads[0].bias)]
    student = LMHead(leaves[1], leaves[2], heads[0].logit_scale, heads[0].softcap)
    rows = [
        (
            reference.head_logits(leaves[0][n], student)[:vocab] / temperature,
            reference.head_logits(hidden[1][n], heads[1])[:vocab] / temperature,
        )
        for n in range(len(weights))
    ]
    divergences = torch.stack([reference.divergence(*row, beta) for row in rows])
    entropies = torch.stack([reference.entropy(row[0]) for row in rows])
    loss = (divergences * weights.double()).sum() / denominator
    loss.backward()
    return [loss.detach(), divergences.detach(), entropies.detach(), *(leaf.grad for leaf in leaves)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_close(found: list, expected: list, *, rtol=1e-5, atol=1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def assert_equal(found: list, expected: list) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", HEADS)
def test_values_and_all_gradients_equal_the_reference(dtype, beta, head):
    case = make_case(rows=(401, 390), dtype=dtype, **head)
    # The small denominator keeps the gradients above the numbers that float16 cannot hold.
    loss, divergence, entropy, *gradients = results(case, 0.011, beta=beta, temperature=1.7)
    expected = expected_results(case, 0.011, beta=beta, temperature=1.7)
    assert loss.dtype == divergence.dtype == entropy.dtype == torch.float32
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    torch.testing.assert_close(divergence.double(), expected[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[2], rtol=1e-5, atol=1e-5)
    for gradient, right in zip(gradients, expected[3:], strict=True):
        assert gradient.dtype == dtype
        assert error(gradient, right) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_half_precision_is_no_worse_than_with_trl(dtype, beta):
    case = make_case(n=64, widths=(32, 32), rows=(1001, 1001), dtype=dtype)
    expected = expected_results(case, 1.0, beta=beta)[3:5]
    ours = [error(*pair) for pair in zip(results(case, beta=beta)[3:5], expected, strict=True)]
    hidden, heads, weights = case
    for tensor in trained_tensors(case):
        tensor.grad = None
    divergence_by_trl(*hidden, heads, weights, beta, 1.0, None)[0].backward()
    for mine, tensor, right in zip(ours, trained_tensors(case), expected, strict=False):
        assert mine < 1.01 * error(tensor.grad, right)


# Chunks


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunk_size_does_not_change_the_results(beta, softcap):
    whole = results(make_case(softcap=softcap), 3.0, beta=beta, chunk_bytes=2**29)
    for chunk_bytes in (1, 4 * 401 * 5 * 2, 4 * 401 * 5 * 7):
        assert_close(results(make_case(softcap=softcap), 3.0, beta=beta, chunk_bytes=chunk_bytes), whole)


@given(count=st.integers(0, 2000), fit=st.integers(-3, 5000))
def test_chunks_fit_in_memory_and_have_about_equal_rows(count, fit):
    rows = _rows_of_a_chunk(count, fit)
    most = max(1, min(MAX_ROWS, fit))
    assert 1 <= rows <= most
    if count:
        chunks = -(-count // rows)
        assert chunks == -(-count // most)
        assert count - (chunks - 1) * rows > rows - chunks  # the last lacks less than a row for each of the others


@pytest.mark.parametrize(
    ("beta", "softcap", "buffers"), [(1.0, None, 3), (0.0, None, 3), (0.5, None, 4), (0.5, 3.0, 5)]
)
def test_logits_held_at_once_stay_within_chunk_bytes(monkeypatch, beta, softcap, buffers):
    sizes, original = [], fused._values_of_rows

    def values_of_rows(student, *others, beta):
        sizes.append(buffers * student.numel() * 4)
        return original(student, *others, beta=beta)

    monkeypatch.setattr(fused, "_values_of_rows", values_of_rows)
    budget = 4 * 64 * buffers * 10 + 17
    diverge(make_case(n=200, rows=(64, 64), softcap=softcap), beta=beta, chunk_bytes=budget)
    assert len(sizes) == 20
    assert max(sizes) == 4 * 64 * buffers * 10 <= budget


@pytest.mark.parametrize(
    ("of_states", "of_heads"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
def test_head_is_converted_in_tiles_to_the_dtype_of_the_states(monkeypatch, of_states, of_heads):
    found = []
    for tile in (32768, 100):
        monkeypatch.setattr(fused, "TILE", tile)
        hidden, heads, weights = make_case()
        hidden = [states.detach().to(of_states).requires_grad_() for states in hidden]
        heads = [LMHead(head.weight.detach().to(of_heads).requires_grad_(), head.bias.detach()) for head in heads]
        loss, _, _, of_hidden, of_weight, _ = results((hidden, heads, weights))
        assert (of_hidden.dtype, of_weight.dtype) == (of_states, of_heads)
        found.append([loss, of_hidden.float(), of_weight.float()])
    assert_close(*found, rtol=1e-2, atol=1e-5)
    rounded = [LMHead(head.weight.detach().to(of_states).double(), head.bias.double()) for head in heads]
    expected = expected_results((hidden, rounded, weights), 1.0)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert error(of_hidden, expected[3]) < ROUNDING[of_states]


def test_reusing_memory_of_the_last_call_does_not_change_the_results():
    first = results(make_case(n=40), beta=0.5)
    with torch.inference_mode():  # a smaller call, whose tensors cannot be written to outside this mode
        diverge(make_case(n=7), beta=0.5)
    assert_equal(results(make_case(n=40), beta=0.5), first)


def test_kept_memory_is_freed_if_the_limit_is_far_lower():
    cpu = torch.device("cpu")
    large = fused._row_buffers((3, 100, 1000), cpu, 2**30)
    assert fused._row_buffers((3, 2, 1000), cpu, 2**30).data_ptr() == large.data_ptr()
    del large
    small = fused._row_buffers((3, 2, 1000), cpu, 24_000)
    assert small.untyped_storage().nbytes() == 24_000


# Work that is not done


def test_each_head_is_projected_once_per_row_and_not_again_in_the_backward(monkeypatch):
    rows, original = [], fused._project

    def project(hidden, *rest, out):
        rows.append(len(hidden))
        return original(hidden, *rest, out=out)

    monkeypatch.setattr(fused, "_project", project)
    case = make_case(n=40)
    case[2][::4] = 0.0
    results(case)
    assert rows == [30, 30]


@pytest.mark.parametrize("trained", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_only_required_gradients_are_computed(monkeypatch, trained):
    formed, original = [], fused._Gradients.__init__

    def init(self, inputs, needs):
        original(self, inputs, needs)
        formed.append([tensor is not None for tensor in (self._hidden, self._weight, self._bias)])

    monkeypatch.setattr(fused._Gradients, "__init__", init)
    case = make_case()
    tensors = trained_tensors(case)
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place in trained)
    loss = diverge(case)[0]
    assert formed == [[place in trained for place in range(3)]]
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.backward()
    assert [tensor.grad is not None for tensor in tensors] == formed[0]


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    monkeypatch.setattr(fused._Gradients, "add", None)  # a call would fail
    with torch.no_grad():
        assert not diverge(make_case())[0].requires_grad


def test_teacher_has_no_gradient_even_if_it_shares_the_head():
    hidden, heads, weights = make_case(widths=(13, 13), bias=False)
    hidden[1].requires_grad_()
    shared = heads[0]
    _, divergence, entropy, _, gradient = results((hidden, [shared, shared], weights))
    assert not divergence.requires_grad
    assert not entropy.requires_grad
    assert hidden[1].grad is None
    shared.weight.grad = None
    copy = LMHead(shared.weight.detach().clone())
    assert torch.equal(results((hidden, [shared, copy], weights))[4], gradient)


def test_tied_head_has_the_gradients_of_both_its_uses():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 8, generator=generator).requires_grad_()
    ids = torch.tensor([3, 7, 7, 41])
    teacher, head = torch.randn(4, 8, generator=generator), LMHead(torch.randn(50, 8, generator=generator))
    diverge(([table[ids], teacher], [LMHead(table), head], torch.ones(4)), 4)[0].backward()
    twin = table.detach().double().requires_grad_()
    rows = zip(twin[ids] @ twin.t(), teacher.double() @ head.weight.double().t(), strict=True)
    torch.stack([reference.divergence(*row, 1.0) for row in rows]).mean().backward()
    assert error(table.grad, twin.grad) < 1e-5


# Precision


def test_gradient_stays_in_float32_until_the_incoming_scalar_is_known():
    scale = 65536.0
    grads = []
    for dtype in (torch.float32, torch.float16):
        hidden, heads, weights = make_case(n=8)
        hidden = [states.detach().to(torch.float16).to(dtype) for states in hidden]
        heads = [LMHead(head.weight.detach().to(torch.float16).to(dtype)) for head in heads]
        hidden[0].requires_grad_()
        loss = diverge((hidden, heads, weights), 1e6)[0]
        (loss * scale).backward()
        grads.append(hidden[0].grad.double())
    assert (grads[0] / scale).abs().max() < 6e-7  # float16 would lose nearly all digits of such a number
    assert error(grads[1], grads[0]) < ROUNDING[torch.float16]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([0.01, 1.0, 30.0, 300.0]),
    noise=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2]),
    beta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_near_and_equal_distributions_never_have_a_negative_divergence(seed, size, noise, beta):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 8, generator=generator) * size
    other = hidden + noise * size * torch.randn(5, 8, generator=generator)
    head = LMHead(torch.randn(3001, 8, generator=generator))
    _, divergence, entropy = diverge(([hidden, other], [head, head], torch.ones(5)), 5, beta=beta)
    assert divergence.min() >= -1e-6
    assert entropy.min() >= -1e-5
    if noise == 0.0:
        assert divergence.abs().max() <= 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_autocast_around_the_call_does_not_change_the_results(beta):
    plain = results(make_case(), beta=beta)
    case = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        found = diverge(case, beta=beta)
    found[0].backward()
    assert_equal([*found, *(tensor.grad for tensor in trained_tensors(case))], plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nonfinite_row_is_visible_and_does_not_affect_other_rows(which, value):
    case = make_case()
    with torch.no_grad():
        case[0][which][3] = value
    _, divergence, entropy = diverge(case)
    assert divergence.isfinite().tolist() == [row != 3 for row in range(len(divergence))]
    assert entropy[3].isfinite() == (which == 1)


# Edge cases


def test_no_positions_have_loss_zero_and_gradients_of_zero():
    loss, divergence, entropy, of_hidden, of_weight, _ = results(make_case(n=0), 0.0)
    assert loss.item() == 0.0
    assert divergence.shape == entropy.shape == (0,)
    assert of_hidden.shape == (0, 13)
    assert of_weight.abs().sum() == 0


def test_noncontiguous_tensors_give_the_same_results():
    hidden, heads, weights = case = make_case(n=24)
    strided = [torch.stack([states, states * 9], dim=1)[:, 0] for states in hidden]
    turned = [LMHead(head.weight.t().contiguous().t(), head.bias) for head in heads]
    assert_close(diverge((strided, turned, weights)), diverge(case))


def test_second_derivative_raises():
    case = make_case()
    with pytest.raises(RuntimeError, match="cannot be differentiated again") as caught:
        torch.autograd.grad(diverge(case)[0], case[0][0], create_graph=True)
    assert "\n" not in str(caught.value)


def test_second_backward_works_with_a_frozen_head_and_raises_with_a_trained_one():
    hidden, heads, _ = case = make_case()
    loss = diverge(case)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice on one loss"):
        loss.backward()
    expected = hidden[0].grad.clone()
    heads[0].weight.requires_grad_(False)
    loss = diverge(case)[0]
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss, hidden[0], retain_graph=True)[0], expected)


def test_incoming_scalar_multiplies_every_gradient():
    plain = results(make_case(), beta=0.5)[3:]
    case = make_case()
    (diverge(case, beta=0.5)[0] * -2.5).backward()
    for tensor, gradient in zip(trained_tensors(case), plain, strict=True):
        torch.testing.assert_close(tensor.grad, gradient * -2.5)


def test_trl_kernels_are_used_only_on_cuda(monkeypatch):
    monkeypatch.setattr(FusedDivergence, "apply", lambda *_: pytest.fail("ours"))
    hidden, heads, weights = case = make_case()
    with pytest.raises(pytest.fail.Exception, match="ours"):
        diverge(case)
    if torch.cuda.is_available():
        moved = [states.cuda() for states in hidden]
        heads = [LMHead(head.weight.cuda(), head.bias.cuda()) for head in heads]
        assert diverge((moved, heads, weights))[0].isfinite()
