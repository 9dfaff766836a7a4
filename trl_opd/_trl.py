"""Imports and copies from TRL's non-public modules; no other file of this package does.

This package overrides and calls private methods of TRL 1.16. `tests/test_trl_contract.py` pins their signatures and
behaviour, and the source of whatever is copied, so a change in TRL makes a test fail.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

TRL_RANGE = (Version("1.16"), Version("1.17"))


def require_supported_trl(installed: str) -> None:
    """Raise `ImportError` if TRL `installed` (a version string) is outside the range that this package supports."""
    low, high = TRL_RANGE
    if not SpecifierSet(f">={low},<{high}").contains(installed, prereleases=True):
        raise ImportError(
            f"trl_opd overrides private methods of TRL {low}, but TRL {installed} is installed: "
            f'install the supported version with `pip install "trl>={low},<{high}"`.',
            name="trl",
        )


try:
    require_supported_trl(version("trl"))
except PackageNotFoundError:
    raise ImportError('TRL is not installed: `pip install "trl>=1.16,<1.17"`.', name="trl") from None

from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    RepeatSampler,
    create_model_from_path,
    repeat_iterable_dataset,
)

# Options of TRL's config that can be passed as JSON.
DICT_FIELDS = tuple(DistillationConfig._VALID_DICT_FIELDS)

__all__ = [
    "DICT_FIELDS",
    "ChunkedDivergenceFunction",
    "RepeatSampler",
    "create_model_from_path",
    "distillation_paper",
    "prepare_deepspeed",
    "repeat_iterable_dataset",
    "unwrap_model_for_generation",
]


def distillation_paper() -> dict[str, str]:
    """Return the paper that TRL cites for its trainer: `title`, `id` and `citation`."""
    return dict(DistillationTrainer._paper)
