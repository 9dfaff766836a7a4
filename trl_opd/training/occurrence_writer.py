"""The rollouts of a training run, token by token, every few steps: `output_dir/occurrences/step-S.parquet`."""

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
    """Keeps what is measured in the steps that `save_occurrences` names, and writes it when the step ends.

    Args:
        args (`OPDConfig`): The configuration.
        metadata (`dict`): What a file of this run's rollouts says of its models (`ModelPair.occurrence_metadata`).
        accelerator (`accelerate.Accelerator`): Gathers over processes.
    """

    def __init__(self, args: OPDConfig, metadata: dict[str, Any], accelerator: Accelerator):
        self._every, self._accelerator = args.save_occurrences, accelerator
        self._folder, self._generations = Path(args.output_dir) / OCCURRENCES_FOLDER, args.num_generations
        self._metadata = metadata
        self._kept: list[list[np.ndarray]] = []
        self._step_of_kept, self._last = None, None

    def number_rollouts(self, batch: dict[str, torch.Tensor]) -> None:
        """Add the places of a generation batch's rollouts among those of all processes, `(B,)`."""
        if self._every:
            count = len(batch["completion_ids"])
            first = self._accelerator.process_index * count
            batch["rollout"] = torch.arange(first, first + count, device=batch["completion_ids"].device)

    def add(self, inputs: dict[str, torch.Tensor], signals: TokenSignals, state: TrainerState) -> None:
        """Keep the signals of a micro-batch, when its step is to be written."""
        if not self._every or (state.global_step + 1) % self._every:
            return
        if self._step_of_kept != state.global_step:  # what is there is of a step that broke off
            self._kept, self._step_of_kept = [], state.global_step
        rows, places = inputs["positions"] // inputs["completion_ids"].shape[1], inputs["positions"]
        columns = inputs["rollout"][rows], places % inputs["completion_ids"].shape[1], signals.token_ids
        columns += signals.divergence, signals.entropy, signals.weights
        self._kept.append([column.detach().cpu().numpy() for column in columns])

    def end_step(self, step: int) -> None:
        """Write what was kept in a step. A collective: every process calls it."""
        if not self._every:
            return
        if self._last is None or step != self._last + 1:  # a run begins, perhaps from a checkpoint
            self._drop_after(step - 1)
        self._last = step
        if step % self._every:
            return
        kept, self._kept = self._gathered(self._kept), []
        if not self._accelerator.is_main_process:
            return
        rollout, position, token_id, kl, entropy, weight = (
            np.concatenate(column) for column in zip(*kept, strict=True)
        )
        order = np.lexsort((position, rollout))
        columns = {"rollout": rollout, "position": position, "token_id": token_id, "kl": kl, "entropy": entropy}
        columns |= {"prompt": rollout // self._generations, "weight": weight}
        self._folder.mkdir(parents=True, exist_ok=True)
        metadata = {**self._metadata, "step": step, "num_rollouts": len(np.unique(rollout))}
        write_occurrences(
            step_part(self._folder, step), {name: column[order] for name, column in columns.items()}, metadata
        )

    def _gathered(self, kept: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        """Return what all processes kept. A collective."""
        if self._accelerator.num_processes == 1:
            return kept
        # One table of numbers that float64 holds exactly; rows of rollout -1 fill it up to the longest process's.
        table = np.concatenate([np.stack(columns, axis=1, dtype=np.float64) for columns in kept])
        rows = torch.from_numpy(table).to(self._accelerator.device)
        rows = self._accelerator.gather(self._accelerator.pad_across_processes(rows, pad_index=-1)).cpu().numpy()
        return [list(rows[rows[:, 0] >= 0].T)]

    def _drop_after(self, step: int) -> None:
        """Remove the files of steps that a resumed run does again, or that an earlier run left."""
        if self._accelerator.is_main_process:
            for part_step, path in find_step_parts(self._folder):
                if part_step > step:
                    path.unlink()
