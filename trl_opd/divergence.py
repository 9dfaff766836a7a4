"""Hidden states of two models -> weighted divergence, and divergence and entropy per token.

The directions follow TRL: `beta = 0` is the forward KL(teacher ‖ student), `beta = 1` the reverse KL(student ‖
teacher), anything between the generalised Jensen-Shannon divergence with mixture `(1 - beta) student + beta teacher`
(Agarwal et al., arXiv:2306.13649). All in nats, over the vocabulary range that both heads share.
"""

import torch

from ._trl import ChunkedDivergenceFunction
from .records import LMHead


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted divergence `sum_n weights_n * D_n / denominator`, and `D_n` and the entropy, each `(N,)`.

    Only rows of weight other than 0 are projected through the two heads; the others hold NaN in both per-token results
    and have neither value nor gradient. Heads of unequal rows are compared over the first `min(rows)` of both, each
    renormalised there. A denominator of 0 (nothing to train) gives loss 0.

    Args:
        student_hidden (`torch.Tensor`): Last hidden states that predict the tokens, shape `(N, H_student)`.
        teacher_hidden (`torch.Tensor`): The teacher's at the same positions, shape `(N, H_teacher)`.
        student_head (`LMHead`): Head of the student; its gradient is formed when it requires one.
        teacher_head (`LMHead`): Head of the teacher; never receives a gradient.
        weights (`torch.Tensor`): Weight of each position, shape `(N,)`.
        denominator (`torch.Tensor` or `float`): What the weighted sum is divided by.
        beta (`float`): Direction of the divergence, in [0, 1].
        temperature (`float`): Softmax temperature of both distributions.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the loss (scalar, float32, the only one with a gradient), the
        divergence per position (nats, float32, shape `(N,)`) and the student's entropy (nats, float32, shape `(N,)`).

    Raises:
        `ValueError`: if the shapes do not belong together, or `beta` or `temperature` is out of range.
    """
    _check(student_hidden, teacher_hidden, student_head, teacher_head, weights, beta, temperature)
    rows = min(student_head.weight.shape[0], teacher_head.weight.shape[0])
    student_head, teacher_head = student_head.first(rows), teacher_head.first(rows)
    projected = weights.nonzero().squeeze(-1)
    row_divergence, row_entropy = _row_divergences(
        student_hidden[projected], teacher_hidden[projected], student_head, teacher_head, beta, temperature
    )
    total = (row_divergence * weights[projected].float()).sum()
    denominator = torch.as_tensor(denominator, dtype=torch.float32, device=total.device)
    # Nothing to train is a loss of 0, not NaN, and the backward of 0 / 0 must not be formed either.
    loss = total / denominator.where(denominator > 0, 1.0) * (denominator > 0)
    divergence = torch.full_like(weights, float("nan"), dtype=torch.float32)
    entropy = divergence.clone()
    divergence[projected] = row_divergence.detach()
    entropy[projected] = row_entropy.detach()
    return loss, divergence, entropy


def measure_frozen(
    divergence: torch.Tensor,
    entropy: torch.Tensor,
    *compared: torch.Tensor | LMHead,
    beta: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return divergence and entropy with the rows of weight 0 filled in, without gradient, `(N,)` each.

    Args:
        divergence (`torch.Tensor`): Of [`weighted_divergence`], NaN in the rows of weight 0, shape `(N,)`.
        entropy (`torch.Tensor`): Likewise.
        compared: Hidden states, heads and weights, as [`weighted_divergence`] takes them.
        beta, temperature: As there.
    """
    *models, weights = compared
    frozen = weights == 0
    with torch.no_grad():
        _, *of_frozen = weighted_divergence(*models, frozen.float(), 1.0, beta=beta, temperature=temperature)
    return torch.where(frozen, of_frozen[0], divergence), torch.where(frozen, of_frozen[1], entropy)


def _row_divergences(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_head: LMHead,
    beta: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return ChunkedDivergenceFunction.apply(
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
