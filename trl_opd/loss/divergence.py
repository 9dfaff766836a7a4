"""The weighted divergence of two models from their hidden states, with the divergence and entropy of each token.

The directions follow TRL: `beta = 0` is the forward KL(teacher ‖ student), `beta = 1` the reverse KL(student ‖
teacher), anything between the generalised Jensen-Shannon divergence with mixture `(1 - beta) student + beta teacher`
(Agarwal et al., arXiv:2306.13649). All in nats, over the vocabulary range that both heads share.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from .._trl import ChunkedDivergenceFunction
from .fused import FusedDivergence
from .lm_head import LMHead
from .signals import HiddenStates, TokenSignals

# Default memory for float32 logits of a chunk.
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

    Only positions whose weight is not 0 are projected through the two heads. The others are NaN in both per-token
    results and add nothing to the loss or its gradient. If the heads have different numbers of rows, both are cut to
    the first `min(rows)` entries and renormalised there. A denominator of 0 (nothing to train) gives loss 0. The loss
    can be differentiated once, not twice.

    Args:
        student_hidden (`torch.Tensor`): The student's last hidden states at the positions that predict the
            tokens, shape `(N, H_student)`.
        teacher_hidden (`torch.Tensor`): The teacher's at the same positions, shape `(N, H_teacher)`.
        student_head (`LMHead`): Head of the student; it receives a gradient if its weight or bias requires one.
        teacher_head (`LMHead`): Head of the teacher; never receives a gradient.
        weights (`torch.Tensor`): Weight of each position, shape `(N,)`. If it is on the CPU, a CUDA call does
            not synchronise to read it.
        denominator (`torch.Tensor` or `float`): Number by which the weighted sum is divided.
        beta (`float`): Direction of the divergence, in [0, 1].
        temperature (`float`): Softmax temperature of both distributions.
        chunk_bytes (`int`, *optional*, defaults to 512 MiB):
            Upper limit in bytes for the float32 logits held at once; at least one row is always held. Ignored on CUDA,
            which uses TRL's tiled kernel.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: The loss (scalar, float32, the only one with a gradient), the
        divergence per position (nats, float32, shape `(N,)`) and the student's entropy (nats, float32, shape `(N,)`).

    Raises:
        `ValueError`: if the shapes do not fit each other, or `beta` or `temperature` is out of range.
    """
    _check(student_hidden, teacher_hidden, student_head, teacher_head, weights, beta, temperature)
    device = student_hidden.device
    vocab = min(len(student_head.weight), len(teacher_head.weight))
    heads = (student_head.first(vocab), teacher_head.first(vocab))

    projected = weights.nonzero().squeeze(-1).to(device, non_blocking=True)
    if len(projected) < len(weights):
        student_hidden = student_hidden[projected]
        teacher_hidden = teacher_hidden[projected]
    projected_weights = weights.to(device, non_blocking=True)[projected]
    row_weights = _shares(projected_weights, denominator)

    loss, row_divergence, row_entropy = way_on(device)(
        student_hidden, teacher_hidden, heads, row_weights, beta, temperature, chunk_bytes
    )

    divergence, entropy = torch.full((2, len(weights)), torch.nan, dtype=torch.float32, device=device)
    divergence[projected] = row_divergence
    entropy[projected] = row_entropy
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
    """Return the weighted divergence (scalar) and the divergence and entropy of each position, `(N,)`.

    Args:
        states (`HiddenStates`): Hidden states and heads of both models.
        token_ids (`torch.Tensor`): Tokens emitted at the positions, int64, shape `(N,)`.
        weights (`torch.Tensor`): Weight of each position, shape `(N,)`.
        denominator (`torch.Tensor` or `float`): Number by which the weighted sum is divided.
        measure_frozen (`bool`):
            If true, positions of weight 0 are measured as well, without gradient; if false, they are NaN.
        beta (`float`): Direction of the divergence, in [0, 1].
        temperature (`float`): Softmax temperature of both distributions.
        chunk_bytes (`int`, *optional*, defaults to 512 MiB): See [`weighted_divergence`].

    Raises:
        `ValueError`: as in [`weighted_divergence`].
    """
    measure = partial(
        weighted_divergence,
        student_hidden=states.student,
        teacher_hidden=states.teacher,
        student_head=states.student_head,
        teacher_head=states.teacher_head,
        beta=beta,
        temperature=temperature,
        chunk_bytes=chunk_bytes,
    )
    loss, divergence, entropy = measure(weights=weights, denominator=denominator)

    frozen = weights == 0
    # `any` would make CUDA synchronise, so there the second call is made in any case.
    if measure_frozen and (frozen.is_cuda or frozen.any()):
        with torch.no_grad():
            _, frozen_divergence, frozen_entropy = measure(weights=frozen.float(), denominator=1.0)
        frozen = frozen.to(divergence.device, non_blocking=True)
        divergence = torch.where(frozen, frozen_divergence, divergence)
        entropy = torch.where(frozen, frozen_entropy, entropy)
    return loss, TokenSignals(token_ids, divergence, entropy, weights)


def _shares(weights: torch.Tensor, denominator: torch.Tensor | float) -> torch.Tensor:
    denominator = torch.as_tensor(denominator, dtype=torch.float32, device=weights.device)
    # With nothing to train the loss must be 0, not NaN. Dividing by infinity also keeps 0 / 0 out of the backward.
    return weights.float() / denominator.where(denominator > 0, torch.inf)


def way_on(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return the function that computes the divergence on a device.

    On CUDA it calls TRL's kernels, until ours is measured to be faster there.
    """
    return divergence_by_trl if device.type == "cuda" else divergence_fused


def divergence_fused(student_hidden, teacher_hidden, heads, row_weights, beta, temperature, chunk_bytes):
    """Return loss, divergence and entropy of rows by our own op ([`weighted_divergence`] has the arguments)."""
    student_head = heads[0]
    device = student_hidden.device.type
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


def divergence_by_trl(student_hidden, teacher_hidden, heads, row_weights, beta, temperature, _):
    """Return loss, divergence and entropy of rows by TRL's op, whose kernels project tiles of the vocabulary."""
    student_head, teacher_head = heads
    teacher_bias = None if teacher_head.bias is None else teacher_head.bias.detach()
    divergence, entropy = ChunkedDivergenceFunction.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        teacher_hidden.detach(),
        teacher_head.weight.detach(),
        teacher_bias,
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
                f"The {name}'s hidden states have width {hidden.shape[1]}, its LM head {head.weight.shape[1]}, so they "
                "cannot be multiplied: pass the hidden states and the head of the same model."
            )
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1] (0 = forward KL, 1 = reverse KL), got {beta}.")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
