"""Plain formulas per position: logits of a head, reverse KL and its gradient, and entropy.

Tests compare `fused.py` with them, and the studies use them, because they look at few positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from .lm_head import LMHead
from .signals import HiddenStates

# Number of rows whose logits are in memory at once. With a vocabulary of 150 000, one row of both models is 1.2 MB.
CHUNK_ROWS = 32
# Vocabulary entries whose weights are in float32 at once.
TILE = 32768


def head_logits(hidden: torch.Tensor, head: LMHead, vocab_size: int) -> torch.Tensor:
    """Return the logits of rows of hidden states over the first entries of a head, float32, shape `(N, vocab_size)`.

    The precision is that of the loss: the weight is rounded to the dtype of the hidden states, and multiplied and added
    up in float32. Logits in bfloat16 would change the divergence of a token by a tenth.
    """
    head = head.first(vocab_size)
    device = hidden.device.type
    castable = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if castable else nullcontext():
        # A float32 copy of a whole head can take gigabytes.
        products = [hidden.float() @ rows.to(hidden.dtype).float().T for rows in head.weight.split(TILE)]
        logits = torch.cat(products, dim=-1)
    if head.bias is not None:
        logits += head.bias.float()
    logits *= head.logit_scale
    if head.softcap is None:
        return logits
    return head.softcap * torch.tanh(logits / head.softcap)


def logit_chunks(states: HiddenStates, *, temperature: float) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield chunks: their rows, and the logits of student and teacher divided by the temperature, `(n, V)` each.

    V is the number of vocabulary entries that both heads share. If there are no positions, one empty chunk is yielded.

    Args:
        states (`HiddenStates`): Hidden states and heads of N positions.
        temperature (`float`): Softmax temperature of both distributions.
    """
    positions = len(states.student)
    vocab_size = min(len(states.student_head.weight), len(states.teacher_head.weight))
    for start in range(0, max(positions, 1), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        student_logits = head_logits(states.student[rows], states.student_head, vocab_size) / temperature
        teacher_logits = head_logits(states.teacher[rows], states.teacher_head, vocab_size) / temperature
        yield rows, student_logits, teacher_logits


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return KL(student ‖ teacher), nats, float32, `(N, V) -> (N,)`."""
    student_log_p = student_logits.float().log_softmax(-1)
    teacher_log_p = teacher_logits.float().log_softmax(-1)
    return (student_log_p.exp() * (student_log_p - teacher_log_p)).sum(-1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the softmax of logits, nats, float32, `(N, V) -> (N,)`."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def reverse_kl_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return the gradient of KL(student ‖ teacher) with respect to the student's logits, float32, shape `(N, V)`.

    With p the student and q the teacher, `g_u = p_u (log p_u - log q_u - KL)` (arXiv:2605.09253).
    """
    student_log_p = student_logits.float().log_softmax(-1)
    teacher_log_p = teacher_logits.float().log_softmax(-1)
    p = student_log_p.exp()
    log_ratio = student_log_p - teacher_log_p
    divergence = (p * log_ratio).sum(-1, keepdim=True)
    return p * (log_ratio - divergence)
