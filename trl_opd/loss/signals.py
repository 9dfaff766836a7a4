"""Records that modules exchange: hidden states of both models, and the measurements of each completion token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from .lm_head import LMHead


class HiddenStates(NamedTuple):
    """The last hidden states of both models that predict the same `N` tokens, and the heads that project them.

    Args:
        student (`torch.Tensor`): Shape `(N, H_student)`.
        teacher (`torch.Tensor`): Shape `(N, H_teacher)`, on the student's device.
        student_head (`LMHead`): Head of the student.
        teacher_head (`LMHead`): Head of the teacher, on the student's device.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    student_head: LMHead
    teacher_head: LMHead


@dataclass(frozen=True)
class TokenSignals:
    """Token, divergence, entropy and weight of each of the `N` positions of a loss mask.

    Entry n belongs to the token *emitted* at n.

    A rollout "A B B" of token ids `[7, 9, 9]` whose `B`s are frozen gives `token_ids = [7, 9, 9]`,
    `weights = [1, 0, 0]` and, in a step that does not measure frozen positions, `divergence = [0.31, nan, nan]`.

    Args:
        token_ids (`torch.Tensor`): Emitted tokens, int64, shape `(N,)`.
        divergence (`torch.Tensor`):
            Divergence of the two distributions that predicted the token, nats, float32, shape `(N,)`; NaN where the
            position was not measured.
        entropy (`torch.Tensor`): Entropy of the student's distribution there, nats, float32, shape `(N,)`.
        weights (`torch.Tensor`): Weight of the position in the loss, float32, shape `(N,)`.
    """

    token_ids: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor
    weights: torch.Tensor
