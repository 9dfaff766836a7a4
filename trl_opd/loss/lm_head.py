"""LMHead: what turns hidden states into logits, and where a model keeps it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    Copied from TRL's `DistillationTrainer._compute_loss` and `_chunked_divergence_loss`: where the scale and the
    soft-capping are found, and the single gather of a head that FSDP2 has sharded.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, torch.distributed.tensor.DTensor):
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    config = model.config.get_text_config()
    return LMHead(weight, bias, logit_scale(config), getattr(config, "final_logit_softcapping", None))


def logit_scale(config) -> float:
    """Return the multiplier of a model's logits, 1.0 where its configuration names none; copied from TRL."""
    # The same quantity has four names: Cohere, Muse Glimmer, Falcon-H1, and one that Granite divides by.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def output_rows(model: torch.nn.Module) -> int:
    """Return the number of vocabulary entries that the LM head of an unwrapped model has."""
    head = model.get_output_embeddings()
    # A quantised weight is packed, and ZeRO-3 leaves an empty one: then the layer or DeepSpeed knows the shape.
    if not head.weight.is_floating_point():
        return head.out_features
    return getattr(head.weight, "ds_shape", head.weight.shape)[0]
