"""Random bits hashed from counters, so they are the same on every device, for every batch, and after a resume."""

from __future__ import annotations

import torch


def hash_counters(seed: int, *counters: torch.Tensor) -> torch.Tensor:
    """Return 64 hashed bits for each entry of the counters, int64, in the shape to which the counters broadcast.

    Args:
        seed (`int`): Hashed before the counters are added, so seed 0 at counter 1 differs from seed 1 at counter 0.
        *counters (`torch.Tensor`): For example step, rollout and position, int64.
    """
    key = _mix(torch.full_like(counters[0], seed))
    for counter in counters:
        key = _mix(key + counter)
    return key


def _mix(key: torch.Tensor) -> torch.Tensor:
    """Return the SplitMix64 finaliser of int64 keys (Steele, Lea and Flood 2014); int64 arithmetic wraps."""
    key = key + _int64(0x9E3779B97F4A7C15)
    key = (key ^ _shift(key, 30)) * _int64(0xBF58476D1CE4E5B9)
    key = (key ^ _shift(key, 27)) * _int64(0x94D049BB133111EB)
    return key ^ _shift(key, 31)


def _shift(key: torch.Tensor, bits: int) -> torch.Tensor:
    # torch's shift copies the sign bit into the upper bits; the mask clears them, as a logical shift would.
    mask = (1 << (64 - bits)) - 1
    return (key >> bits) & mask


def _int64(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
