"""Rollouts of a student, scored by its teacher and, where asked, by the student before the distillation.

Everything is the trainer's own: its sampling, its scoring, in eval mode. The rows go to a part file for each batch of
prompts, so memory does not grow with their number, and a run that was killed goes on with the next batch.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from tqdm import tqdm

from ..artefacts.atomic import complete_file
from ..artefacts.occurrences import PROMPT_SCHEMA, Occurrences, join_files, write_occurrences
from ..loss.divergence import score
from ..opd_trainer import OPDTrainer
from ..rollouts.batches import locate
from ..rollouts.sampling import own_random_stream
from ..training.model_pair import compared, describe_measure

ADAPTER_OFF = "adapter_off"
OCCURRENCES, PROMPTS, PARTS, SETTINGS = "occurrences.parquet", "prompts.parquet", "parts", "settings.json"


class Collector:
    """Collects rollouts with their divergences into a folder.

    Args:
        trainer (`OPDTrainer`): Holds student, teacher and tokenizer, and samples.
        dataset (`datasets.Dataset`): Rows with a `prompt`, all of which are used, in order.
        folder (`Path`): Where `occurrences.parquet` and `prompts.parquet` go.
        num_generations (`int`): Rollouts per prompt.
        reference (`transformers.PreTrainedModel` or `str`, *optional*):
            The student before the distillation, or "adapter_off" for a LoRA student without its adapter.
        settings (`dict`): What makes the rows what they are; a folder that was begun with others is refused.
    """

    def __init__(
        self,
        trainer: OPDTrainer,
        dataset: Dataset,
        folder: Path,
        *,
        num_generations: int,
        reference: torch.nn.Module | str | None,
        settings: dict[str, Any],
    ):
        if reference == ADAPTER_OFF and not is_peft_model(trainer.model):
            raise ValueError("adapter_off is for a student with a LoRA adapter, and this one has none: name a model.")
        self._trainer, self._dataset, self._folder = trainer, dataset, folder
        self._generations, self._reference, self._settings = num_generations, reference, settings
        self._step = max(1, trainer.args.per_device_eval_batch_size // num_generations)

    def collect(self) -> None:
        """Collect what is missing, and join it."""
        self._begin()
        starts = range(0, len(self._dataset), self._step)
        done = [start for start in starts if self._part(start).is_file()]
        tokens, began = 0, time.monotonic()
        with tqdm(total=len(self._dataset), initial=self._prompts_in(done), unit="prompt", desc="collect") as bar:
            for start in starts:
                if self._part(start).is_file():
                    continue
                tokens += self._collect_batch(start)
                bar.update(self._prompts_in([start]))
                bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.0f} tokens/s")
        self._join(starts)

    def _prompts_in(self, starts: list[int]) -> int:
        return sum(min(self._step, len(self._dataset) - start) for start in starts)

    def _part(self, start: int, kind: str = "rows") -> Path:
        return self._folder / PARTS / f"{kind}-{start:08d}.parquet"

    def _begin(self) -> None:
        """Make the folder of parts, or raise `ValueError` where another collection was begun there."""
        parts = self._folder / PARTS
        parts.mkdir(parents=True, exist_ok=True)
        path = parts / SETTINGS
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        require_same_settings(self._folder, known, self._settings)
        with complete_file(path) as part:
            part.write_text(json.dumps(self._settings, indent=1), encoding="utf-8")

    def _collect_batch(self, start: int) -> int:
        """Sample and score the rollouts of some prompts, write their part, and return how many tokens they have."""
        trainer = self._trainer
        places = range(start, min(start + self._step, len(self._dataset)))
        rows = [self._dataset[place] for place in places for _ in range(self._generations)]
        seed = int(np.random.SeedSequence([trainer.args.seed, start]).generate_state(1)[0])
        trainer.model.eval()
        with torch.no_grad(), own_random_stream(seed), trainer._teacher_phase.resident():
            inputs = locate(trainer._prepare_inputs(rows))
            columns = self._measure(inputs)
        width = inputs["completion_ids"].shape[1]
        places_of = inputs["positions"].cpu().numpy()
        rollout = start * self._generations + places_of // width
        columns |= {"rollout": rollout, "position": places_of % width, "prompt": rollout // self._generations}
        columns["token_id"] = inputs["completion_ids"].flatten()[inputs["positions"]].cpu().numpy()
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        ]
        table = [
            pa.array(list(places), pa.int32()),
            pa.array(prompts[:: self._generations], PROMPT_SCHEMA.field(1).type),
        ]
        with complete_file(self._part(start, "prompts")) as part:
            pq.write_table(
                pa.Table.from_arrays([*table, pa.array(list(places), pa.int64())], schema=PROMPT_SCHEMA), part
            )
        write_occurrences(self._part(start), columns, {})  # last: it says that the batch is complete
        return len(rollout)

    def _measure(self, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return divergence and entropy of a batch's positions, and the divergence under the reference student."""
        trainer = self._trainer
        student = trainer.accelerator.unwrap_model(trainer.model)
        kl, entropy = self._score(student, inputs, "student or teacher")
        found = {"kl": kl, "entropy": entropy}
        if self._reference is not None:
            off = self._reference == ADAPTER_OFF
            with student.disable_adapter() if off else nullcontext():
                found["kl_pre"], _ = self._score(
                    student if off else self._reference, inputs, "reference student or teacher"
                )
        return found

    def _score(
        self, student: torch.nn.Module, inputs: dict[str, torch.Tensor], who: str
    ) -> tuple[np.ndarray, np.ndarray]:
        trainer, positions = self._trainer, inputs["positions"]
        if "teacher_hidden" not in inputs:
            inputs["teacher_hidden"] = trainer._teacher_phase.score(inputs)
        _, signals = score(
            *compared(trainer, student, inputs, positions),
            inputs["completion_ids"].flatten()[positions],
            torch.ones(len(positions)),
            1.0,
            measure_frozen=False,
            beta=1.0,  # the format's divergence is KL(student ‖ teacher)
            temperature=trainer.temperature,
            chunk_bytes=trainer.args.divergence_chunk_bytes,
        )
        figures = [values.cpu().numpy() for values in (signals.divergence, signals.entropy)]
        if not all(np.isfinite(values).all() for values in figures):
            raise ValueError(f"The logits of {who} are not finite: another dtype (bfloat16, float32) may help.")
        return figures[0], figures[1]

    def _join(self, starts: range) -> None:
        trainer = self._trainer
        measure = describe_measure(trainer.args, trainer.model, trainer.teacher_model, trainer._tokenizer)
        reference = self._settings.get("reference_model_name_or_path")
        metadata = {
            "vocab_size": trainer._vocab_size,
            **{name: measure[name] for name in ("tokenizer", "teacher", "temperature")},
            "student": self._settings.get("model_name_or_path") or measure["student"],
            "reference": reference,
            "beta": 1.0,
            "num_rollouts": len(self._dataset) * self._generations,
            "num_generations": self._generations,
            "settings": self._settings,
        }
        join_files([self._part(start, "prompts") for start in starts], self._folder / PROMPTS)
        join_files([self._part(start) for start in starts], self._folder / OCCURRENCES, metadata)
        shutil.rmtree(self._folder / PARTS)


def is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a folder holds this collection already.

    Raises:
        `ValueError`: if it holds another one, or part of another one.
    """
    path = folder / OCCURRENCES
    if path.is_file():
        require_same_settings(folder, Occurrences(path).metadata.get("settings"), settings)
        return True
    begun = folder / PARTS / SETTINGS
    if begun.is_file():
        require_same_settings(folder, json.loads(begun.read_text(encoding="utf-8")), settings)
    return False


def require_same_settings(folder: Path, known: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """Raise `ValueError` where a folder belongs to a collection of other settings, with the first that differs."""
    if known is None or known == settings:
        return
    name = next(name for name in (*settings, *known) if known.get(name) != settings.get(name))
    raise ValueError(
        f"{folder} holds a collection with {name} {known.get(name)!r}, and this is {settings.get(name)!r}: choose "
        "another --output_dir, or remove it."
    )
