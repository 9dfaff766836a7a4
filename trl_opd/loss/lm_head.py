"""LMHead, the layer that turns hidden states into logits, and functions that read it from a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Names of the soft-capping in configurations: Gemma's, which TRL reads, RecurrentGemma's and xLSTM's.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LMHead:
    """A language-modelling head: hidden states `(N, H)` -> logits `(N, V)`.

    `logits = cap(logit_scale * (hidden @ weight.T + bias))` with `cap(x) = softcap * tanh(x / softcap)` when `softcap`
    is set, else the identity. The temperature is not part of the head.

    Args:
        weight (`torch.Tensor`): Rows of the vocabulary, shape `(V, H)`.
        bias (`torch.Tensor`, *optional*): Shape `(V,)`.
        logit_scale (`float`, *optional*, defaults to `1.0`): Multiplier of the logits (Cohere, Granite, Falcon-H1).
        softcap (`float`, *optional*): Soft-capping of the logits after the scale (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def first(self, rows: int) -> LMHead:
        """Return the head of the first `rows` vocabulary entries, shape `(rows, H)`, sharing its storage."""
        if rows == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:rows]
        return LMHead(self.weight[:rows], bias, self.logit_scale, self.softcap)


def lm_head(model: torch.nn.Module) -> LMHead:
    """Return the LM head of an unwrapped causal language model, weight of shape `(V, H)`.

    A head that FSDP2 has sharded is gathered once. Copied from TRL's `DistillationTrainer._compute_loss` and
    `_chunked_divergence_loss`, and extended by what those do not read: other names of the soft-capping, Inkling's
    multiplier, and a head with more rows than the model gives logits. [`check_student`] and [`check_teacher`] compare
    the result with the model's own logits.
    """
    head = model.get_output_embeddings()
    weight = head.weight
    bias = getattr(head, "bias", None)
    if isinstance(weight, torch.distributed.tensor.DTensor):
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()

    config = model.config.get_text_config()
    read = LMHead(weight, bias, logit_scale(config), softcap(config))
    return read.first(min(len(weight), getattr(config, "unpadded_vocab_size", None) or len(weight)))


def logit_scale(config) -> float:
    """Return the multiplier of a model's logits, 1.0 if its configuration names none."""
    if config.model_type == "mpt":  # transformers ignores its `logit_scale`
        return 1.0
    width = getattr(config, "logits_mup_width_multiplier", None)  # Inkling divides the states, and its head has no bias
    return trl_logit_scale(config) if width is None else 1 / width


def trl_logit_scale(config) -> float:
    """Return the multiplier of the logits that TRL's loss reads from a configuration; copied from TRL."""
    # Configurations name it in four ways: Cohere's, Muse Glimmer's, Falcon-H1's, and Granite's, which is a divisor.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale

    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def softcap(config) -> float | None:
    """Return the soft-capping of a model's logits, `None` if its configuration names none."""
    for name in SOFTCAPS:
        cap = getattr(config, name, None)
        if cap is not None:
            return cap
    return None


def is_read_by_trl(model: torch.nn.Module) -> bool:
    """Return whether TRL's loss reads the same multiplier, soft-capping and rows of the head as [`lm_head`]."""
    config = model.config.get_text_config()
    trl_softcap = getattr(config, SOFTCAPS[0], None)
    same_logits = logit_scale(config) == trl_logit_scale(config) and softcap(config) == trl_softcap
    return same_logits and getattr(config, "unpadded_vocab_size", None) is None


def output_rows(model: torch.nn.Module) -> int:
    """Return the number of vocabulary entries for which an unwrapped model gives logits."""
    head = model.get_output_embeddings()
    # The shape of a quantised weight is that of its packed form, so we ask the layer. ZeRO-3 leaves an empty weight,
    # whose full shape DeepSpeed keeps in `ds_shape`.
    if not head.weight.is_floating_point():
        return head.out_features
    rows = getattr(head.weight, "ds_shape", head.weight.shape)[0]
    return min(rows, getattr(model.config.get_text_config(), "unpadded_vocab_size", None) or rows)
