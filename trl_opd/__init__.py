"""On-policy distillation with TRL that sees rock tokens.

Public names load on first use, so that `import trl_opd` and `trl-opd --help` stay free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AccuracyCallback": "accuracy",
    "Controls": "rock_set",
    "LMHead": "records",
    "OPDConfig": "opd_config",
    "OPDTrainer": "opd_trainer",
    "Rock": "rock_set",
    "RockSet": "rock_set",
    "RolloutSamples": "rollout_samples",
    "TokenSignals": "records",
    "TokenStats": "token_stats",
    "detect_rocks": "detection",
    "mass_matched_controls": "detection",
    "token_weights": "weighting",
    "weighted_divergence": "divergence",
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
    from .accuracy import AccuracyCallback
    from .detection import detect_rocks, mass_matched_controls
    from .divergence import weighted_divergence
    from .opd_config import OPDConfig
    from .opd_trainer import OPDTrainer
    from .records import LMHead, TokenSignals
    from .rock_set import Controls, Rock, RockSet
    from .rollout_samples import RolloutSamples
    from .token_stats import TokenStats
    from .weighting import token_weights


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
