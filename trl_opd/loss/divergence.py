"""Hidden states of two models -> weighted divergence, and divergence and entropy per token.

The directions follow TRL: `beta = 0` is the forward KL(teacher ‖ student), `beta = 1` the reverse KL(student ‖
teacher), anything between the generalised Jensen-Shannon divergence with mixture `(1 - beta) student + beta teacher`
(Agarwal et al., arXiv:2306.13649). All in nats, over the vocabulary range that both heads share.
"""

from contextlib import nullcontext

import torch

from .._trl import ChunkedDivergenceFunction
from .fused import FusedDivergence
from .lm_head import LMHead
from .signals import HiddenStates, TokenSignals

CHUNK_BYTES = 512 * 2**20


def weighted_divergence(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_head: LMHead,
    weights: torch.Tensor,
    denominator: torch.Tensor | float,
    *,
    beta: float,
    temperature: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted divergence `sum_n weights_n * D_n / denominator`, and `D_n` and the entropy, each `(N,)`.

    Only rows of weight other than 0 are projected through the two heads; the others hold NaN in both per-token results
    and have neither value nor gradient. Heads of unequal rows are compared over the first `min(rows)` of both, each
    renormalised there. A denominator of 0 (nothing to train) gives loss 0. There is a first derivative only.

    Args:
        student_hidden (`torch.Tensor`): Last hidden states that predict the tokens, shape `(N, H_student)`.
        teacher_hidden (`torch.Tensor`): The teacher's at the same positions, shape `(N, H_teacher)`.
        student_head (`LMHead`): Head of the student; its gradient is formed when it requires one.
        teacher_head (`LMHead`): Head of the teacher; never receives a gradient.
        weights (`torch.Tensor`): Weight of each position, shape `(N,)`; from the host without a synchronisation.
        denominator (`torch.Tensor` or `float`): What the weighted sum is divided by.
        beta (`float`): Direction of the divergence, in [0, 1].
        temperature (`float`): Softmax temperature of both distributions.
        chunk_bytes (`int`, *optional*, defaults to 512 MiB):
            Memory for the rows of the vocabulary, at least one; not on CUDA, where TRL's kernels go over tiles.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the loss (scalar, float32, the only one with a gradient), the
        divergence per position (nats, float32, shape `(N,)`) and the student's entropy (nats, float32, shape `(N,)`).

    Raises:
        `ValueError`: if the shapes do not belong together, or `beta` or `temperature` is out of range.
    """
    _check(student_hidden, teacher_hidden, student_head, teacher_head, weights, beta, temperature)
    vocab, device = min(len(student_head.weight), len(teacher_head.weight)), student_hidden.device
    heads = student_head.first(vocab), teacher_head.first(vocab)
    projected = weights.nonzero().squeeze(-1).to(device, non_blocking=True)
    if len(projected) < len(weights):
        student_hidden, teacher_hidden = student_hidden[projected], teacher_hidden[projected]
    row_weights = _shares(weights.to(device, non_blocking=True)[projected], denominator)
    # On CUDA TRL's kernels serve until ours measures faster there.
    divergence_of = _divergence_by_trl if student_hidden.is_cuda else _divergence_fused
    loss, *of_rows = divergence_of(student_hidden, teacher_hidden, heads, row_weights, beta, temperature, chunk_bytes)
    divergence, entropy = torch.full((2, len(weights)), torch.nan, dtype=torch.float32, device=device)
    divergence[projected], entropy[projected] = of_rows
    return loss, divergence, entropy


def loss_and_signals(
    states: HiddenStates,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    denominator: torch.Tensor | float,
    *,
    measure_frozen: bool,
    beta: float,
    temperature: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, TokenSignals]:
    """Return the weighted divergence (scalar) and what it says of each position, `(N,)`.

    Args:
        states (`HiddenStates`): Hidden states and heads of both models.
        token_ids (`torch.Tensor`): Tokens emitted at the positions, int64, shape `(N,)`.
        weights (`torch.Tensor`): Weight of each position, shape `(N,)`.
        denominator (`torch.Tensor` or `float`): What the weighted sum is divided by.
        measure_frozen (`bool`): Whether rows of weight 0 are measured too, without gradient, or hold NaN.
        beta (`float`): Direction of the divergence, in [0, 1].
        temperature (`float`): Softmax temperature of both distributions.
        chunk_bytes (`int`, *optional*, defaults to 512 MiB): As [`weighted_divergence`] takes it.
    """
    settings = {"beta": beta, "temperature": temperature, "chunk_bytes": chunk_bytes}
    loss, divergence, entropy = weighted_divergence(*states, weights, denominator, **settings)
    frozen = weights == 0
    if measure_frozen and (frozen.is_cuda or frozen.any()):
        with torch.no_grad():
            _, frozen_divergence, frozen_entropy = weighted_divergence(*states, frozen.float(), 1.0, **settings)
        frozen = frozen.to(divergence.device, non_blocking=True)
        divergence = torch.where(frozen, frozen_divergence, divergence)
        entropy = torch.where(frozen, frozen_entropy, entropy)
    return loss, TokenSignals(token_ids, divergence, entropy, weights)


def _shares(weights: torch.Tensor, denominator: torch.Tensor | float) -> torch.Tensor:
    denominator = torch.as_tensor(denominator, dtype=torch.float32, device=weights.device)
    # Nothing to train is a loss of 0, not NaN, and the backward of 0 / 0 must not be formed either.
    return weights.float() / denominator.where(denominator > 0, torch.inf)


def _divergence_fused(student_hidden, teacher_hidden, heads, row_weights, beta, temperature, chunk_bytes):
    device, student_head = student_hidden.device.type, heads[0]
    castable = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if castable else nullcontext():
        return FusedDivergence.apply(
            student_hidden,
            student_head.weight,
            student_head.bias,
            teacher_hidden,
            heads,
            row_weights,
            beta,
            temperature,
            chunk_bytes,
            torch.is_grad_enabled(),
        )


def _divergence_by_trl(student_hidden, teacher_hidden, heads, row_weights, beta, temperature, _):
    student_head, teacher_head = heads
    divergence, entropy = ChunkedDivergenceFunction.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        teacher_hidden.detach(),
        teacher_head.weight.detach(),
        None if teacher_head.bias is None else teacher_head.bias.detach(),
        beta,
        temperature,
        student_head.logit_scale,
        student_head.softcap,
        teacher_head.logit_scale,
        teacher_head.softcap,
    )
    return (divergence * row_weights).sum(), divergence.detach(), entropy


def _check(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_head: LMHead,
    weights: torch.Tensor,
    beta: float,
    temperature: float,
) -> None:
    positions = weights.shape[0] if weights.ndim == 1 else None
    if student_hidden.ndim != 2 or teacher_hidden.ndim != 2 or positions is None:
        raise ValueError(
            "weighted_divergence takes hidden states of shape (N, H) and weights of shape (N,); got "
            f"{tuple(student_hidden.shape)}, {tuple(teacher_hidden.shape)} and {tuple(weights.shape)}."
        )
    if not positions == student_hidden.shape[0] == teacher_hidden.shape[0]:
        raise ValueError(
            "Student, teacher and weights must describe the same N positions; got "
            f"{student_hidden.shape[0]}, {teacher_hidden.shape[0]} and {positions}."
        )
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.shape[1] != head.weight.shape[1]:
            raise ValueError(
                f"The {name}'s hidden states have width {hidden.shape[1]}, its LM head {head.weight.shape[1]}."
            )
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1] (0 = forward KL, 1 = reverse KL), got {beta}.")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
