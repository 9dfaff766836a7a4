"""Sums behind the metrics of the log, kept on the device, and the times of a step.

Sums travel, means are for display.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager

import torch

from ..loss.signals import TokenSignals

OTHER, ROCK, CONTROL = range(3)
N_GRAM = 4


class MetricSums:
    """Sums over the positions and forwards since the last log, one small float64 vector.

    Adding needs no synchronisation with the device; reading needs one.

    Args:
        groups (`torch.Tensor`, *optional*):
            Group of each vocabulary entry (OTHER, ROCK or CONTROL), int64, shape `(V,)`; `None` without a rock set.
        device (`torch.device`): Where the sums are kept.
    """

    # Places in the vector: three divergence sums and three counts by group, then the rest.
    _DIVERGENCE, _MEASURED = slice(0, 3), slice(3, 6)
    _ZERO_WEIGHT, _WEIGHTED, _PADDING, _FORWARDED, _ENTROPY, _PROJECTED_KL, _PROJECTED = range(6, 13)
    _REPETITION, _COMPLETIONS, _SIZE = range(13, 16)

    def __init__(self, groups: torch.Tensor | None, device: torch.device):
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._groups = None if groups is None else groups.to(device)
        self._has_controls = groups is not None and bool((groups == CONTROL).any())
        self._sums = torch.zeros(self._SIZE, dtype=dtype, device=device)

    def add_signals(self, signals: TokenSignals, all_measured: bool) -> None:
        """Count the weights of a micro-batch and, when `all_measured`, add its divergences."""
        self._sums[self._ZERO_WEIGHT] += (signals.weights == 0).sum()
        self._sums[self._WEIGHTED] += signals.weights.numel()
        projected = ~signals.entropy.isnan()
        self._sums[self._ENTROPY] += signals.entropy.where(projected, 0.0).sum()
        self._sums[self._PROJECTED_KL] += signals.divergence.where(projected, 0.0).sum()
        self._sums[self._PROJECTED] += projected.sum()
        if not all_measured:
            return
        divergence = signals.divergence.to(self._sums)
        group = torch.zeros_like(signals.token_ids) if self._groups is None else self._groups[signals.token_ids]
        self._sums[self._DIVERGENCE].index_add_(0, group, divergence)
        self._sums[self._MEASURED].index_add_(0, group, torch.ones_like(divergence))

    def add_totals(self, divergence_sum: torch.Tensor, entropy_sum: torch.Tensor, positions: torch.Tensor) -> None:
        """Add sums over positions of weight 1 that are not told apart (scalars)."""
        self._sums[self._ENTROPY] += entropy_sum
        self._sums[self._PROJECTED_KL] += divergence_sum
        self._sums[self._PROJECTED] += positions
        self._sums[OTHER] += divergence_sum
        self._sums[3 + OTHER] += positions
        self._sums[self._WEIGHTED] += positions

    def add_forward(self, *attention_masks: torch.Tensor) -> None:
        """Count the positions of a student forward and the padding among them, masks of shape `(B, L)`."""
        for mask in attention_masks:
            self._sums[self._PADDING] += (mask == 0).sum()
            self._sums[self._FORWARDED] += mask.numel()

    def add_completions(self, completions: Iterable[Sequence[int]]) -> None:
        """Count the repetition of completions, token ids each; one without a 4-gram has none, and does not count."""
        shares = [share for ids in completions if (share := repetition(ids)) is not None]
        self._sums[self._REPETITION] += sum(shares)
        self._sums[self._COMPLETIONS] += len(shares)

    def clear(self) -> None:
        """Forget every sum."""
        self._sums.zero_()

    def mean_divergence(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
        """Return the mean divergence over the projected positions of all processes so far, and keep the sums.

        In nats; `None` without positions. In a step that does not measure frozen positions it is that of the others.
        """
        sums = reduce(self._sums.clone()).tolist()
        return sums[self._PROJECTED_KL] / sums[self._PROJECTED] if sums[self._PROJECTED] else None

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the metrics of all processes by name, in nats and shares, and reset the sums.

        A metric without positions is absent.

        Args:
            reduce (`Callable`): Sums the vector over processes; every process calls it.
        """
        sums = reduce(self._sums).tolist()
        self.clear()
        divergence, measured = sums[self._DIVERGENCE], sums[self._MEASURED]
        total, positions = sum(divergence), sum(measured)
        metrics = {
            "entropy": (sums[self._ENTROPY], sums[self._PROJECTED]),
            "kl/mean": (total, positions),
            "weight/zero_share": (sums[self._ZERO_WEIGHT], sums[self._WEIGHTED]),
            "batch/padding_share": (sums[self._PADDING], sums[self._FORWARDED]),
            "completions/repetition": (sums[self._REPETITION], sums[self._COMPLETIONS]),
        }
        if self._groups is not None:
            metrics |= {
                "rock/token_share": (measured[ROCK], positions),
                "rock/kl_share": (divergence[ROCK], total),
                "rock/mean_kl": (divergence[ROCK], measured[ROCK]),
                "other/mean_kl": (divergence[OTHER], measured[OTHER]),
            }
            if self._has_controls:
                metrics |= {
                    "control/token_share": (measured[CONTROL], positions),
                    "control/mean_kl": (divergence[CONTROL], measured[CONTROL]),
                }
        return {name: part / whole for name, (part, whole) in metrics.items() if whole > 0}


def repetition(token_ids: Sequence[int]) -> float | None:
    """Return the share of the 4-grams of a completion that occurred before in it; `None` where it has none.

    Collapse shows here first: rollouts that run up to the length limit repeat themselves.
    """
    grams = list(zip(*(token_ids[shift:] for shift in range(N_GRAM)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else None


def token_groups(rock_ids: torch.Tensor, control_ids: list[int], vocab_size: int) -> torch.Tensor:
    """Return the group of each vocabulary entry (OTHER, ROCK or CONTROL), int64, shape `(vocab_size,)`."""
    groups = torch.full((vocab_size,), OTHER, dtype=torch.long)
    groups[torch.tensor(control_ids, dtype=torch.long)] = CONTROL
    groups[rock_ids] = ROCK
    return groups


class StepTimer:
    """Adds up how long generation, the teacher and the student (forward, divergence and backward) take.

    On CUDA by events in the stream, so nothing waits for the device before the log.

    Phases are "generate", "teacher" and "student"; one that never ran has no time: a teacher that runs in each
    micro-batch is part of the student's.

    Args:
        device (`torch.device`): Where the phases run.
    """

    def __init__(self, device: torch.device):
        self._device, self._steps, self._events = device, 0, []

    @contextmanager
    def time(self, phase: str, *, on: bool = True):
        """Time what happens inside, if `on`."""
        start = self._now()
        try:
            yield
        finally:
            if on:
                self._events.append((phase, start, self._now()))

    def end_step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    def take(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the seconds of an optimizer step by phase, of the slowest process, and reset the timer. A collective.

        Args:
            gather (`Callable`): Puts the tensors of all processes one after the other.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = defaultdict(float)
        for phase, start, end in self._events:
            seconds[phase] += start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
        # The student's time is that of whole training steps, in the first of which rollouts are made and scored.
        seconds["student"] -= seconds["generate"] + seconds.get("teacher", 0.0)
        slowest = gather(torch.tensor([[*seconds.values()]], device=self._device)).amax(0).tolist()
        steps, self._steps = self._steps, 0
        self._events.clear()
        return {f"phase/{name}_s": value / steps for name, value in zip(seconds, slowest, strict=True) if steps}

    def _now(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
