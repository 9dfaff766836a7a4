"""Metrics of the log: sums of a training or evaluation, kept on the device, and the seconds of an optimizer step.

Processes add up their sums; means are computed only when a log is written.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..loss.signals import TokenSignals

OTHER, ROCK, CONTROL = range(3)
N_GRAM = 4


@dataclass
class Sums:
    """Sums of one process or of all, as scalar tensors or as numbers; the two sums by group have three entries.

    Args:
        divergence (`torch.Tensor`): Divergence of the measured positions in nats, by group, shape `(3,)`.
        measured (`torch.Tensor`): Measured positions, by group, shape `(3,)`.
        zero_weight (`torch.Tensor`): Positions with weight 0.
        weighted (`torch.Tensor`): Positions with any weight, 0 included.
        padding (`torch.Tensor`): Padding positions in the student's forwards.
        forwarded (`torch.Tensor`): All positions in the student's forwards.
        entropy (`torch.Tensor`): The student's entropy at the measured positions, in nats.
        projected_divergence (`torch.Tensor`): Divergence at the projected positions, in nats.
        projected (`torch.Tensor`): Positions whose logits were computed.
        repetition (`torch.Tensor`): Shares of repeated 4-grams, over completions.
        completions (`torch.Tensor`): Completions that have a 4-gram.
    """

    divergence: torch.Tensor | list[float]
    measured: torch.Tensor | list[float]
    zero_weight: torch.Tensor | float
    weighted: torch.Tensor | float
    padding: torch.Tensor | float
    forwarded: torch.Tensor | float
    entropy: torch.Tensor | float
    projected_divergence: torch.Tensor | float
    projected: torch.Tensor | float
    repetition: torch.Tensor | float
    completions: torch.Tensor | float

    @classmethod
    def unpack(cls, packed: torch.Tensor | list[float]) -> Sums:
        """Return the sums of a vector of 15 entries by name; those of a tensor are views of it."""
        return cls(packed[:3], packed[3:6], *packed[6:])


class MetricSums:
    """Sums over the positions, forwards and completions since the last log.

    Adding needs no synchronisation with the device; reading needs one.

    Args:
        groups (`torch.Tensor`, *optional*):
            Group of each vocabulary entry (OTHER, ROCK or CONTROL), int64, shape `(V,)`; `None` without a rock set.
        device (`torch.device`): Where the sums are kept.
    """

    def __init__(self, groups: torch.Tensor | None, device: torch.device):
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._groups = None if groups is None else groups.to(device)
        self._has_controls = groups is not None and CONTROL in groups
        # One vector holds all sums, so that processes need only one reduction.
        self._packed = torch.zeros(15, dtype=dtype, device=device)
        self._sums = Sums.unpack(self._packed)

    def add_signals(self, signals: TokenSignals, all_measured: bool) -> None:
        """Count the weights of a micro-batch and, when `all_measured`, add its divergences and entropies.

        A mean over the positions with a weight alone would not be a mean over tokens.
        """
        sums = self._sums
        sums.zero_weight += (signals.weights == 0).sum()
        sums.weighted += signals.weights.numel()

        projected = ~signals.entropy.isnan()
        sums.projected_divergence += signals.divergence.where(projected, 0.0).sum()
        sums.projected += projected.sum()

        if not all_measured:
            return
        sums.entropy += signals.entropy.sum()
        divergence = signals.divergence.to(self._packed)
        group = torch.zeros_like(signals.token_ids) if self._groups is None else self._groups[signals.token_ids]
        sums.divergence.index_add_(0, group, divergence)
        sums.measured.index_add_(0, group, torch.ones_like(divergence))

    def add_totals(self, divergence_sum: torch.Tensor, entropy_sum: torch.Tensor, positions: torch.Tensor) -> None:
        """Add the sums of a micro-batch whose positions all have weight 1 and belong to no group (scalars)."""
        sums = self._sums
        sums.entropy += entropy_sum
        sums.projected_divergence += divergence_sum
        sums.projected += positions
        sums.divergence[OTHER] += divergence_sum
        sums.measured[OTHER] += positions
        sums.weighted += positions

    def add_forward(self, *attention_masks: torch.Tensor) -> None:
        """Count the positions of a student forward and the padding among them, masks of shape `(B, L)`."""
        for mask in attention_masks:
            self._sums.padding += (mask == 0).sum()
            self._sums.forwarded += mask.numel()

    def add_completions(self, completions: Iterable[Sequence[int]]) -> None:
        """Add the repetition of completions, token ids each; a completion without a 4-gram does not count."""
        shares = [repetition(ids) for ids in completions]
        shares = [share for share in shares if share is not None]
        self._sums.repetition += sum(shares)
        self._sums.completions += len(shares)

    def clear(self) -> None:
        """Set every sum to zero."""
        self._packed.zero_()

    def mean_divergence(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
        """Return the mean divergence over the projected positions of all processes so far, and keep the sums.

        In nats; `None` without positions. A step that does not measure frozen positions leaves them out of this mean.
        """
        sums = Sums.unpack(reduce(self._packed.clone()).tolist())
        return sums.projected_divergence / sums.projected if sums.projected else None

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the metrics of all processes by name, in nats and shares, and reset the sums.

        A metric without positions is absent.

        Args:
            reduce (`Callable`): Sums the vector over processes; every process calls it.
        """
        sums = Sums.unpack(reduce(self._packed).tolist())
        self.clear()
        divergence = sums.divergence
        measured = sums.measured
        total = sum(divergence)
        positions = sum(measured)

        metrics = {
            "entropy": (sums.entropy, positions),
            "kl/mean": (total, positions),
            "weight/zero_share": (sums.zero_weight, sums.weighted),
            "batch/padding_share": (sums.padding, sums.forwarded),
            "completions/repetition": (sums.repetition, sums.completions),
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
    """Return the share of a completion's 4-grams that repeat an earlier one; `None` if it is shorter than a 4-gram.

    A collapse shows here first: rollouts that run up to the length limit repeat themselves.
    """
    count = len(token_ids) - N_GRAM + 1
    if count < 1:
        return None
    grams = {tuple(token_ids[start : start + N_GRAM]) for start in range(count)}
    return 1.0 - len(grams) / count


def token_groups(rock_ids: torch.Tensor, control_ids: list[int], vocab_size: int) -> torch.Tensor:
    """Return the group of each vocabulary entry (OTHER, ROCK or CONTROL), int64, shape `(vocab_size,)`."""
    groups = torch.full((vocab_size,), OTHER, dtype=torch.long)
    groups[torch.tensor(control_ids, dtype=torch.long)] = CONTROL
    groups[rock_ids] = ROCK
    return groups


class StepTimer:
    """Measures the seconds that generation, the teacher and the student take in an optimizer step.

    The student's phase is its forward, the divergence and the backward. On CUDA, events in the stream measure the time,
    so nothing waits for the device before the log.

    The phases are "generate", "teacher" and "student". A phase that never ran is absent: a teacher that runs once in
    each micro-batch is part of the student's phase.

    Args:
        device (`torch.device`): Where the phases run.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._steps = 0
        self._phases: list[tuple[str, Any, Any]] = []  # name, start and end of each

    @contextmanager
    def time(self, phase: str, *, on: bool = True):
        """Time the code inside the block, if `on`."""
        start = self._now()
        try:
            yield
        finally:
            if on:
                self._phases.append((phase, start, self._now()))

    def end_step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    def take(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the seconds of an optimizer step by phase, of the slowest process, and reset the timer. A collective.

        Args:
            gather (`Callable`): Concatenates the tensors of all processes.
        """
        seconds = self._seconds()
        # A training step is timed as the student's, and the first one of a batch also generates and scores rollouts.
        seconds["student"] -= seconds["generate"] + seconds.get("teacher", 0.0)
        slowest = gather(torch.tensor([list(seconds.values())], device=self._device)).amax(0).tolist()

        steps = self._steps
        self._steps = 0
        self._phases.clear()
        if steps == 0:
            return {}
        return {f"phase/{phase}_s": value / steps for phase, value in zip(seconds, slowest, strict=True)}

    def _seconds(self) -> defaultdict[str, float]:
        seconds = defaultdict(float)
        if self._device.type != "cuda":
            for phase, start, end in self._phases:
                seconds[phase] += end - start
            return seconds

        torch.cuda.synchronize(self._device)
        for phase, start, end in self._phases:
            seconds[phase] += start.elapsed_time(end) / 1000
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
