"""Writes the rollouts of every N-th training step, token by token, to `output_dir/occurrences/step-S.parquet`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerState

from ..artefacts.occurrences import write_occurrences
from ..artefacts.run_files import OCCURRENCES_FOLDER, find_step_parts, step_part
from ..loss.signals import TokenSignals
from ..opd_config import OPDConfig


class OccurrenceWriter:
    """Writer of the tokens and their divergences in every `save_occurrences`-th optimizer step.

    Args:
        args (`OPDConfig`): The configuration.
        metadata (`dict`): Models and measure, written into every file (`ModelPair.occurrence_metadata`).
        accelerator (`accelerate.Accelerator`): Gathers over processes.
    """

    def __init__(self, args: OPDConfig, metadata: dict[str, Any], accelerator: Accelerator):
        self._every = args.save_occurrences
        self._folder = Path(args.output_dir) / OCCURRENCES_FOLDER
        self._generations = args.num_generations
        self._metadata = metadata
        self._accelerator = accelerator
        self._kept: list[list[np.ndarray]] = []
        self._step_of_kept: int | None = None
        self._last_step: int | None = None

    def number_rollouts(self, batch: dict[str, torch.Tensor]) -> None:
        """Add the index of each rollout of a generation batch, counted over all processes, int64, `(B,)`."""
        if not self._every:
            return
        ids = batch["completion_ids"]
        first = self._accelerator.process_index * len(ids)
        batch["rollout"] = torch.arange(first, first + len(ids), device=ids.device)

    def add(self, inputs: dict[str, torch.Tensor], signals: TokenSignals, state: TrainerState) -> None:
        """Keep the signals of a micro-batch if its step is to be written."""
        if not self._every or (state.global_step + 1) % self._every:
            return
        if self._step_of_kept != state.global_step:
            self._kept = []  # an interrupted step may have left some
            self._step_of_kept = state.global_step

        width = inputs["completion_ids"].shape[1]
        positions = inputs["positions"]
        columns = (
            inputs["rollout"][positions // width],
            positions % width,
            signals.token_ids,
            signals.divergence,
            signals.entropy,
            signals.weights,
        )
        self._kept.append([column.detach().cpu().numpy() for column in columns])

    def end_step(self, step: int) -> None:
        """Write the signals that were kept in a step. A collective: every process calls it."""
        if not self._every:
            return
        run_begins = self._last_step is None or step != self._last_step + 1  # perhaps from a checkpoint
        if run_begins:
            self._drop_after(step - 1)
        self._last_step = step
        if step % self._every:
            return

        kept = self._gather(self._kept)
        self._kept = []
        if self._accelerator.is_main_process:
            self._write(step, kept)

    def _write(self, step: int, kept: list[list[np.ndarray]]) -> None:
        rollout, position, token_id, kl, entropy, weight = map(np.concatenate, zip(*kept, strict=True))
        order = np.lexsort((position, rollout))
        columns = {
            "rollout": rollout,
            "position": position,
            "token_id": token_id,
            "kl": kl,
            "entropy": entropy,
            "prompt": rollout // self._generations,
            "weight": weight,
        }
        columns = {name: column[order] for name, column in columns.items()}
        metadata = self._metadata | {"step": step, "num_rollouts": len(np.unique(rollout))}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_occurrences(step_part(self._folder, step), columns, metadata)

    def _gather(self, kept: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        """Return the columns that all processes kept. A collective."""
        if self._accelerator.num_processes == 1:
            return kept
        # float64 represents every column exactly, so one table carries them all. Shorter processes are padded with rows
        # of rollout -1.
        table = np.concatenate([np.stack(columns, axis=1, dtype=np.float64) for columns in kept])
        rows = torch.from_numpy(table).to(self._accelerator.device)
        padded = self._accelerator.pad_across_processes(rows, pad_index=-1)
        rows = self._accelerator.gather(padded).cpu().numpy()
        rows = rows[rows[:, 0] >= 0]
        return [list(rows.T)]

    def _drop_after(self, step: int) -> None:
        """Remove the files of steps that a resumed run repeats, or that an earlier run left."""
        if not self._accelerator.is_main_process:
            return
        for part_step, path in find_step_parts(self._folder):
            if part_step > step:
                path.unlink()
