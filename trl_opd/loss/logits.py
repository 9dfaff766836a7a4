"""Logits of rows of hidden states, and what two rows say of each other: the plain formulas beside the fused op."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .lm_head import LMHead

ROWS = 32  # of a chunk of logits


def logit_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return the gradient of KL(student ‖ teacher) with respect to the student's logits, float32, shape `(N, V)`."""
    log_p, log_q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    p, ratio = log_p.exp(), log_p - log_q
    return p * (ratio - (p * ratio).sum(-1, keepdim=True))


def head_logits(hidden: torch.Tensor, head: LMHead, vocab_size: int) -> torch.Tensor:
    """Return the logits of rows of hidden states over the first entries of a head, float32, shape `(N, vocab_size)`."""
    head = head.first(vocab_size)
    bias = None if head.bias is None else head.bias.to(head.weight.dtype)
    logits = linear(hidden.to(head.weight.dtype), head.weight, bias).float() * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
