"""Divergence, entropy and gradient of rows of hidden states in one pass: each head projects every row once.

TRL's op goes over the vocabulary in tiles and so has to project both heads again in its backward, when the normalisers
are known. Here a chunk is a number of rows over the whole vocabulary, few enough of them to fit in memory.
With `p` and `q` the distributions of student and teacher and `m = (1 - beta) p + beta q`, the gradients with respect to
the student's logits are `p (log p - log q - KL(p ‖ q))` for the reverse KL, `p - q` for the forward KL and
`(1 - beta) p (log p - log m - KL(p ‖ m))` for a beta between 0 and 1.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch.autograd import Function

from .lm_head import LMHead

# Largest number of rows in a chunk. With fewer rows the heads are read more often; with more rows nothing is gained. At
# 32 768 and 151 936 vocabulary entries, 160 rows were as fast as 256 and faster than 16 to 128.
MAX_ROWS = 160
# If a head or the hidden states are not in float32, the head is converted in tiles of this many entries, because a
# float32 copy of a whole head can take gigabytes.
TILE = 32768


class Scale(NamedTuple):
    """Scaling of a head's product to logits: `factor * product`, or `top * tanh(factor * product)` if `top` is set."""

    factor: float
    top: float | None


class FusedDivergence(Function):
    """Sum of `row_weights * divergence` over rows, with a gradient, and the divergence and entropy of each row."""

    @staticmethod
    def forward(
        ctx,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        student_bias: torch.Tensor | None,
        teacher_hidden: torch.Tensor,
        heads: tuple[LMHead, LMHead],
        row_weights: torch.Tensor,
        beta: float,
        temperature: float,
        chunk_bytes: int,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The student's weight and bias are arguments besides its head, because autograd tracks tensors only if they are
        # arguments themselves.
        inputs = (student_hidden, student_weight, student_bias)
        needs = [with_gradient and need for need in ctx.needs_input_grad[:3]]
        gradients = _Gradients(inputs, needs)
        needs_gradient = any(needs)

        student_head, teacher_head = heads
        student_scale = _scale(student_head, temperature)
        teacher_scale = _scale(teacher_head, temperature)

        # Logits of both models and one distribution; between the two KLs both distributions; with a soft-capped
        # student also the derivative of the cap.
        capped = student_scale.top is not None
        buffers = 3 + (0.0 < beta < 1.0) + capped
        count = len(student_hidden)
        vocab = len(student_weight)
        rows = _rows_of_a_chunk(count, chunk_bytes // (4 * buffers * vocab))
        storage = _row_buffers((buffers, rows, vocab), student_hidden.device, chunk_bytes)

        divergence, entropy = student_hidden.new_empty((2, count), dtype=torch.float32)
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            chunk = slice(start, stop)
            student, teacher, *spare = storage[:, : stop - start]
            _project(student_hidden[chunk], student_head, student_scale.factor, out=student)
            _project(teacher_hidden[chunk], teacher_head, teacher_scale.factor, out=teacher)
            slope = _cap(student, student_scale.top, spare.pop() if capped else None)
            _cap(teacher, teacher_scale.top, None)

            values = _values_of_rows(student, teacher, spare, beta=beta)
            divergence[chunk] = values.divergence
            entropy[chunk] = values.entropy
            if needs_gradient:
                of_logits = values.gradient
                if slope is not None:
                    of_logits.mul_(slope)
                logit_weights = row_weights[chunk] * student_scale.factor
                gradients.add(chunk, of_logits, logit_weights, student_hidden, student_weight)

        ctx.gradients = gradients
        ctx.mark_non_differentiable(divergence, entropy)
        return (divergence * row_weights).sum(), divergence, entropy

    @staticmethod
    def backward(ctx, incoming: torch.Tensor, *_) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The gradient of weighted_divergence cannot be differentiated again: call backward (or "
                "torch.autograd.grad) without create_graph=True."
            )
        hidden, weight, bias = ctx.gradients.scaled(incoming)
        return hidden, weight, bias, None, None, None, None, None, None, None


class _RowValues(NamedTuple):
    """Divergence and entropy of rows, `(n,)`, and the gradient of the divergence, `(n, V)`, in one of the buffers."""

    divergence: torch.Tensor
    entropy: torch.Tensor
    gradient: torch.Tensor


def _values_of_rows(
    student: torch.Tensor, teacher: torch.Tensor, spare: list[torch.Tensor], *, beta: float
) -> _RowValues:
    """Return what two blocks of logits `(n, V)` have between them; the logits and `spare` are overwritten.

    Logits are taken relative to their row's maximum, so the sums of exponentials lie in [1, V] and the logarithm of
    their ratio is exact where the distributions are near.
    """
    student.sub_(student.amax(-1, keepdim=True))
    teacher.sub_(teacher.amax(-1, keepdim=True))
    if beta == 0.0:
        return _forward_kl(student, teacher, spare[0])
    if beta == 1.0:
        return _reverse_kl(student, teacher, spare[0])
    return _jensen_shannon(student, teacher, p=spare[0], q=spare[1], beta=beta)


def _reverse_kl(student: torch.Tensor, teacher: torch.Tensor, p: torch.Tensor) -> _RowValues:
    teacher_sum = torch.exp(teacher, out=p).sum(-1, keepdim=True)
    student_sum = torch.exp(student, out=p).sum(-1, keepdim=True)
    p.div_(student_sum)
    entropy = student_sum.log() - _dot(p, student)
    log_ratio = student.sub_(teacher)  # the constant log(teacher_sum / student_sum) is added to the mean below
    mean = _dot(p, log_ratio)
    divergence = mean + (teacher_sum / student_sum).log()
    return _RowValues(divergence[:, 0], entropy[:, 0], log_ratio.sub_(mean).mul_(p))


def _forward_kl(student: torch.Tensor, teacher: torch.Tensor, q: torch.Tensor) -> _RowValues:
    teacher_sum = torch.exp(teacher, out=q).sum(-1, keepdim=True)
    q.div_(teacher_sum)
    mean = _dot(q, teacher.sub_(student))
    p = torch.exp(student, out=teacher)
    student_sum = p.sum(-1, keepdim=True)
    p.div_(student_sum)
    divergence = mean + (student_sum / teacher_sum).log()
    entropy = student_sum.log() - _dot(p, student)
    return _RowValues(divergence[:, 0], entropy[:, 0], p.sub_(q))


def _jensen_shannon(
    student: torch.Tensor, teacher: torch.Tensor, *, p: torch.Tensor, q: torch.Tensor, beta: float
) -> _RowValues:
    teacher_sum = torch.exp(teacher, out=q).sum(-1, keepdim=True)
    student_sum = torch.exp(student, out=p).sum(-1, keepdim=True)
    q.div_(teacher_sum)
    p.div_(student_sum)
    entropy = student_sum.log() - _dot(p, student)
    # log q - log p; with it, log(m / p) = log((1 - beta) + beta q / p) without forming an underflowing m.
    log_ratio = teacher.sub_(student).add_((student_sum / teacher_sum).log())
    weights = log_ratio.new_tensor([math.log(1 - beta), math.log(beta)])
    to_mixture = torch.add(log_ratio, weights[1], out=student)
    to_mixture = torch.logaddexp(to_mixture, weights[0], out=student).neg_()  # log p - log m
    of_student = _dot(p, to_mixture)
    of_teacher = _dot(q, log_ratio.add_(to_mixture))
    divergence = beta * of_teacher + (1 - beta) * of_student
    return _RowValues(divergence[:, 0], entropy[:, 0], to_mixture.sub_(of_student).mul_(p).mul_(1 - beta))


class _Gradients:
    """Gradients of the student's hidden states, weight and bias, kept in float32 until the incoming scalar is known."""

    def __init__(self, inputs: tuple[torch.Tensor | None, ...], needs: list[bool]):
        self._dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        self._hidden, self._weight, self._bias = (
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) if need else None
            for tensor, need in zip(inputs, needs, strict=True)
        )
        self._trains_head = self._weight is not None

    def add(
        self,
        chunk: slice,
        of_logits: torch.Tensor,
        row_weights: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        """Add the gradients of a chunk, given the gradient of its logits `(n, V)` and its rows' weights `(n,)`."""
        column = row_weights[:, None]
        for tile in _tiles(weight, hidden):
            block = of_logits[:, tile]
            if self._hidden is not None:
                self._hidden[chunk].addmm_(block, weight[tile].to(hidden.dtype).float())
            if self._weight is not None:
                self._weight[tile].addmm_(block.t(), hidden[chunk].float() * column)
        if self._hidden is not None:
            self._hidden[chunk].mul_(column)
        if self._bias is not None:
            self._bias.addmv_(of_logits.t(), row_weights)

    def scaled(self, incoming: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients times a scalar, each in the dtype of its tensor; the head's only once."""
        found = [
            None if gradient is None else (gradient * incoming).to(dtype)
            for gradient, dtype in zip((self._hidden, None, self._bias), self._dtypes, strict=True)
        ]
        if self._trains_head:
            if self._weight is None:
                raise RuntimeError(
                    "backward was called twice on one loss of weighted_divergence, but the first call gave away the "
                    "gradient of the LM head without a copy: compute the loss again before another backward."
                )
            # Scaled in place and given away, because a float32 copy can take gigabytes.
            found[1] = self._weight.mul_(incoming).to(self._dtypes[1])
            self._weight = None
        return found


_kept = threading.local()


def _row_buffers(shape: tuple[int, int, int], device: torch.device, most: int) -> torch.Tensor:
    """Return uninitialised float32 memory of a shape; on a CPU, reuse the last call's if that has a suitable size.

    It is suitable if it is large enough and, unless this call needs more, within `most` bytes. A CPU gets
    fresh memory from the system page by page and zeroed, which took up to a sixth of the time of a call.
    """
    size = math.prod(shape)
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.float32, device=device)
    kept = 0 if getattr(_kept, "memory", None) is None else _kept.memory.numel()
    if not size <= kept <= max(size, most // 4):
        _kept.memory = None  # the old memory is freed before the new is allocated
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            _kept.memory = torch.empty(size, dtype=torch.float32)
    return _kept.memory[:size].view(shape)


def _rows_of_a_chunk(count: int, fit: int) -> int:
    """Return the rows of each chunk if `fit` rows fit in memory, about equal so that no chunk has only a few."""
    most = max(1, min(MAX_ROWS, fit))
    chunks = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / chunks))


def _scale(head: LMHead, temperature: float) -> Scale:
    if head.softcap is None:
        return Scale(head.logit_scale / temperature, None)
    return Scale(head.logit_scale / head.softcap, head.softcap / temperature)


def _project(hidden: torch.Tensor, head: LMHead, factor: float, *, out: torch.Tensor) -> None:
    """Write `factor * (hidden @ weight.T + bias)` into `out`, `(n, V)` float32, with the weight in hidden's dtype."""
    scaled = hidden.float() * factor
    for tile in _tiles(head.weight, hidden):
        torch.mm(scaled, head.weight[tile].to(hidden.dtype).float().t(), out=out[:, tile])
    if head.bias is not None:
        out.add_(head.bias.float(), alpha=factor)


def _cap(logits: torch.Tensor, top: float | None, slope: torch.Tensor | None) -> torch.Tensor | None:
    """Cap logits in place to `top * tanh(logits)`; write the derivative into `slope` if given, and return it."""
    if top is None:
        return None
    logits.tanh_()
    if slope is not None:
        torch.square(logits, out=slope).neg_().add_(1.0).mul_(top)
    logits.mul_(top)
    return slope


def _tiles(weight: torch.Tensor, hidden: torch.Tensor) -> list[slice]:
    vocab = len(weight)
    in_float32 = weight.dtype == hidden.dtype == torch.float32
    width = vocab if in_float32 else TILE
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(first, second)[:, None]
