"""Token statistics of a run: the window since the last checkpoint, and the sum of all windows before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..artefacts.run_files import TOKEN_STATS_FILE
from ..artefacts.token_stats import COUNTS, SUMS, TokenStats
from ..loss.signals import TokenSignals


class TokenSums:
    """Token statistics of this process, kept on the device without synchronisation between logs.

    Each checkpoint closes a window and the next one starts at zero, so a resumed run writes the same windows as an
    uninterrupted one.

    Args:
        vocab_size (`int`): The range of ids that student and teacher share.
        measure (`dict`): What is measured (see [`TokenStats`]).
        device (`torch.device`): Device of the signals.
        enabled (`bool`, *optional*, defaults to `True`): Whether to keep statistics at all.
    """

    def __init__(self, vocab_size: int, measure: dict[str, Any], device: torch.device, *, enabled: bool = True):
        self._enabled = enabled
        vocab_size = vocab_size if enabled else 1
        # MPS has no float64: signals wait on the device until a log, and are then added up on the CPU.
        self._waits = device.type == "mps"
        self._new = lambda: TokenStats(vocab_size, measure, "cpu" if self._waits else device)

        self._waiting: list[TokenSignals] = []
        self._folder: str | None = None
        self._written: TokenStats | None = None  # the window as it was last written into `_folder`
        self._closed = self._new()
        self._window = self._new()

    def start(self, *, resumed: bool) -> None:
        """Begin a run: on resume, drop all sums; otherwise open a new window."""
        self.close_window()
        self._folder = None
        self._written = None
        if resumed:
            self._closed = self._new()

    def update(self, signals: TokenSignals) -> None:
        """Add the signals of a micro-batch."""
        if not self._enabled:
            return
        if self._waits:
            self._waiting.append(signals)
        else:
            self._window.update(signals)

    def flush(self) -> None:
        """Add the signals that wait on a device without float64."""
        for signals in self._waiting:
            on_cpu = TokenSignals(
                token_ids=signals.token_ids.cpu(),
                divergence=signals.divergence.cpu(),
                entropy=signals.entropy.cpu(),
                weights=signals.weights.cpu(),
            )
            self._window.update(on_cpu)
        self._waiting.clear()

    def total(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> TokenStats | None:
        """Return the statistics of all windows, on the CPU; `None` when they are off.

        Args:
            reduce (`Callable`, *optional*): Sums over processes, a collective; without it, only this process counts.
        """
        if not self._enabled:
            return None
        self.flush()
        stats = self._new().merge(self._closed).merge(self._window)
        if reduce is not None:
            stats = _reduced(stats, reduce)
        return stats.copy()

    def close_window(self) -> TokenStats:
        """Return the statistics since the last call, and start a new window."""
        self.flush()
        window = self._window
        self._window = self._new()
        self._closed.merge(window)
        return window

    def write_window(self, folder: str, reduce: Callable[[torch.Tensor], torch.Tensor], *, is_main: bool) -> None:
        """Close the window and write it, summed over processes, into the folder of a checkpoint. A collective."""
        if not self._enabled:
            return
        window = self.close_window()
        if folder == self._folder:  # a callback or a shutdown saves the checkpoint again, with what came since
            window = self._new().merge(self._written).merge(window)
        self._folder = folder
        self._written = window
        total = _reduced(window, reduce)
        if is_main:
            os.makedirs(folder, exist_ok=True)  # FSDP saves a sharded model elsewhere, so the folder may be missing
            total.save(os.path.join(folder, TOKEN_STATS_FILE))


def _reduced(stats: TokenStats, reduce: Callable[[torch.Tensor], torch.Tensor]) -> TokenStats:
    """Return statistics summed over processes, on the device of `stats`. A collective."""
    device = stats.seen.device
    total = TokenStats(stats.vocab_size, stats.measure, device)
    for names in (COUNTS, SUMS):
        sums = reduce(torch.stack([getattr(stats, name) for name in names]))
        for name, row in zip(names, sums, strict=True):
            getattr(total, name).copy_(row)
    return total
