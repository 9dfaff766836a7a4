"""Seconds of the phases of an optimizer step, read when a log is due."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up how long generation, the teacher and the student (forward, divergence and backward) take.

    On CUDA by events in the stream, so nothing waits for the device before the log.

    Phases are "generate", "teacher" and "student"; one that never ran has no figure: a teacher that runs in each
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
        """Return the seconds of an optimizer step by figure, of the slowest process, and start anew. A collective.

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
