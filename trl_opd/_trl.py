"""The only file that imports or copies from TRL's non-public modules.

TRL 1.16's seams are private: `tests/test_trl_contract.py` pins the signature and the source of each one that is used,
overridden or copied, so a new TRL is a failing test and never a silent change.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .records import LMHead

TRL_RANGE = (Version("1.16"), Version("1.17"))


def require_supported_trl(installed: str) -> None:
    """Raise `ImportError` when TRL `installed` (a version string) is outside the range of this package."""
    low, high = TRL_RANGE
    if not SpecifierSet(f">={low},<{high}").contains(installed, prereleases=True):
        raise ImportError(
            f"trl_opd is built on TRL {low} (its seams are private), but TRL {installed} is installed: "
            f'install the other one with `pip install "trl>={low},<{high}"`.',
            name="trl",
        )


try:
    require_supported_trl(version("trl"))
except PackageNotFoundError:
    raise ImportError('TRL is not installed: `pip install "trl>=1.16,<1.17"`.', name="trl") from None

from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    RepeatSampler,
    create_model_from_path,
    repeat_iterable_dataset,
)

__all__ = [
    "ChunkedDivergenceFunction",
    "RepeatSampler",
    "create_model_from_path",
    "distillation_paper",
    "lm_head",
    "logit_scale",
    "output_rows",
    "prepare_deepspeed",
    "repeat_iterable_dataset",
    "unwrap_model_for_generation",
]


def distillation_paper() -> dict[str, str]:
    """Return what TRL cites for its trainer: `title`, `id` and `citation`."""
    from trl import DistillationTrainer

    return dict(DistillationTrainer._paper)


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
