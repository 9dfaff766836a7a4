"""On-policy distillation with TRL that finds rock tokens: frequent token types that keep diverging from the teacher.

Public names are imported on first use, so that `import trl_opd` and `trl-opd --help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AccuracyCallback": "studies.accuracy",
    "Controls": "rocks.rock_set",
    "LMHead": "loss.lm_head",
    "OPDConfig": "opd_config",
    "OPDTrainer": "opd_trainer",
    "Rock": "rocks.rock_set",
    "RockSet": "rocks.rock_set",
    "RolloutSamples": "training.rollout_samples",
    "TokenSignals": "loss.signals",
    "TokenStats": "artefacts.token_stats",
    "detect_rocks": "rocks.from_statistics",
    "mass_matched_controls": "rocks.controls",
    "token_weights": "loss.weights",
    "weighted_divergence": "loss.divergence",
}
__all__ = [
    "AccuracyCallback",
    "Controls",
    "LMHead",
    "OPDConfig",
    "OPDTrainer",
    "Rock",
    "RockSet",
    "RolloutSamples",
    "TokenSignals",
    "TokenStats",
    "detect_rocks",
    "mass_matched_controls",
    "token_weights",
    "weighted_divergence",
]

if TYPE_CHECKING:
    from .artefacts.token_stats import TokenStats
    from .loss.divergence import weighted_divergence
    from .loss.lm_head import LMHead
    from .loss.signals import TokenSignals
    from .loss.weights import token_weights
    from .opd_config import OPDConfig
    from .opd_trainer import OPDTrainer
    from .rocks.controls import mass_matched_controls
    from .rocks.from_statistics import detect_rocks
    from .rocks.rock_set import Controls, Rock, RockSet
    from .studies.accuracy import AccuracyCallback
    from .training.rollout_samples import RolloutSamples


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
