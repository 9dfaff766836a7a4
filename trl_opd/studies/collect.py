"""Rollouts of a student, scored by its teacher and, where asked, by the student before the distillation.

Everything is the trainer's own: its sampling, its scoring, in eval mode. The rows go to a part file for each batch of
prompts, so memory does not grow with their number, and a run that was killed goes on with the next batch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from tqdm import tqdm

from ..artefacts.atomic import complete_file, write_json
from ..artefacts.occurrences import PROMPT_SCHEMA, Occurrences, join_files, write_occurrences
from ..artefacts.run_files import OCCURRENCES_FILE, PROMPTS_FILE
from ..loss.divergence import loss_and_signals
from ..rollouts.sampling import own_random_stream
from ..training.model_pair import ModelPair

ADAPTER_OFF = "adapter_off"
# Of an unfinished collection, in its folder.
PARTS = "parts"
SETTINGS = "settings.json"


class Collector:
    """Collects rollouts with their divergences into a folder.

    Args:
        pair (`ModelPair`): Student and teacher.
        sample_rollouts (`Callable`): Samples a rollout for each of some dataset rows ([`OPDTrainer.sample_rollouts`]).
        dataset (`datasets.Dataset`): Rows with a `prompt`, all of which are used, in order.
        folder (`Path`): Where `occurrences.parquet` and `prompts.parquet` go.
        num_generations (`int`): Rollouts per prompt.
        batch_size (`int`): Rollouts of a batch.
        seed (`int`): Seed of the rollouts.
        chunk_bytes (`int`): Memory for the rows of the vocabulary, as [`weighted_divergence`] takes it.
        reference (`transformers.PreTrainedModel` or `str`, *optional*):
            The student before the distillation, or "adapter_off" for a LoRA student without its adapter.
        settings (`dict`): What makes the rows what they are; a folder that was begun with others is refused.
    """

    def __init__(
        self,
        pair: ModelPair,
        sample_rollouts: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        dataset: Dataset,
        folder: Path,
        *,
        num_generations: int,
        batch_size: int,
        seed: int,
        chunk_bytes: int,
        reference: torch.nn.Module | str | None,
        settings: dict[str, Any],
    ):
        if reference == ADAPTER_OFF and not is_peft_model(pair.student):
            raise ValueError("adapter_off is for a student with a LoRA adapter, and this one has none: name a model.")
        self._pair = pair
        self._sample_rollouts = sample_rollouts
        self._dataset = dataset
        self._folder = folder
        self._generations = num_generations
        self._step = max(1, batch_size // num_generations)
        self._seed = seed
        self._chunk_bytes = chunk_bytes
        self._reference = reference
        self._settings = settings

    def collect(self) -> None:
        """Collect what is missing, and join it."""
        self._begin()
        starts = range(0, len(self._dataset), self._step)
        done = [start for start in starts if self._part(start).is_file()]
        tokens, began = 0, time.monotonic()
        with tqdm(
            total=len(self._dataset), initial=self._prompts_in(done), unit="prompt", desc="collect", delay=0
        ) as bar:
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
        write_json(path, self._settings)

    def _collect_batch(self, start: int) -> int:
        """Sample and score the rollouts of some prompts, write their part, and return how many tokens they have."""
        places = range(start, min(start + self._step, len(self._dataset)))
        rows = [self._dataset[place] for place in places for _ in range(self._generations)]
        seed = int(np.random.SeedSequence([self._seed, start]).generate_state(1)[0])
        with torch.no_grad(), own_random_stream(seed), self._pair.teacher_resident():
            inputs = self._sample_rollouts(rows)
            columns = self._measure(inputs)

        width = inputs["completion_ids"].shape[1]
        positions = inputs["positions"].cpu().numpy()
        rollout = start * self._generations + positions // width
        columns["rollout"] = rollout
        columns["position"] = positions % width
        columns["prompt"] = rollout // self._generations
        columns["token_id"] = inputs["completion_ids"].flatten()[inputs["positions"]].cpu().numpy()
        self._write_prompts(start, places, inputs)
        write_occurrences(self._part(start), columns, {})  # last: it says that the batch is complete
        return len(rollout)

    def _write_prompts(self, start: int, places: range, inputs: dict[str, torch.Tensor]) -> None:
        """Write the token ids of the prompts of a batch."""
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        ]
        arrays = [
            pa.array(list(places), pa.int32()),
            pa.array(prompts[:: self._generations], PROMPT_SCHEMA.field("token_ids").type),
            pa.array(list(places), pa.int64()),
        ]
        with complete_file(self._part(start, "prompts")) as part:
            pq.write_table(pa.Table.from_arrays(arrays, schema=PROMPT_SCHEMA), part)

    def _measure(self, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return divergence and entropy of a batch's positions, and the divergence under the reference student."""
        student = self._pair.student
        if "teacher_hidden" not in inputs:
            inputs["teacher_hidden"] = self._pair.teacher_states.compute_states(inputs)
        kl, entropy = self._kl_and_entropy(student, inputs, "student or teacher")
        columns = {"kl": kl, "entropy": entropy}
        if self._reference == ADAPTER_OFF:
            with student.disable_adapter():
                columns["kl_pre"], _ = self._kl_and_entropy(student, inputs, "reference student or teacher")
        elif self._reference is not None:
            columns["kl_pre"], _ = self._kl_and_entropy(self._reference, inputs, "reference student or teacher")
        return columns

    def _kl_and_entropy(
        self, student: torch.nn.Module, inputs: dict[str, torch.Tensor], who: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return KL(student ‖ teacher) and the student's entropy at the positions of a batch, nats, `(N,)` each."""
        positions = inputs["positions"]
        _, signals = loss_and_signals(
            self._pair.hidden_states(inputs, student=student),
            inputs["completion_ids"].flatten()[positions],
            torch.ones(len(positions)),
            1.0,
            measure_frozen=False,
            beta=1.0,  # the format's divergence is KL(student ‖ teacher)
            temperature=self._pair.temperature,
            chunk_bytes=self._chunk_bytes,
        )
        kl = signals.divergence.cpu().numpy()
        entropy = signals.entropy.cpu().numpy()
        if not (np.isfinite(kl).all() and np.isfinite(entropy).all()):
            raise ValueError(f"The logits of {who} are not finite: another dtype (bfloat16, float32) may help.")
        return kl, entropy

    def _join(self, starts: range) -> None:
        measure = self._pair.measure
        reference = self._settings.get("reference_model_name_or_path")
        metadata = {
            "vocab_size": self._pair.vocab_size,
            **{name: measure[name] for name in ("tokenizer", "teacher", "temperature")},
            "student": self._settings.get("model_name_or_path") or measure["student"],
            "reference": reference,
            "beta": 1.0,
            "num_rollouts": len(self._dataset) * self._generations,
            "num_generations": self._generations,
            "settings": self._settings,
        }
        join_files([self._part(start, "prompts") for start in starts], self._folder / PROMPTS_FILE)
        join_files([self._part(start) for start in starts], self._folder / OCCURRENCES_FILE, metadata)
        shutil.rmtree(self._folder / PARTS)


def is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a folder holds this collection already.

    Raises:
        `ValueError`: if it holds another one, or part of another one.
    """
    path = folder / OCCURRENCES_FILE
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


class CollectionSummary(NamedTuple):
    """Size and mean divergence of a collection.

    Args:
        rollouts (`int`): Rollouts.
        prompts (`int`): Prompts.
        tokens (`int`): Tokens of all rollouts.
        mean_kl (`float`): Mean divergence over tokens, nats.
        mean_kl_pre (`float`, *optional*): The same under the reference student, where there is one.
    """

    rollouts: int
    prompts: int
    tokens: int
    mean_kl: float
    mean_kl_pre: float | None


def summarise_collection(folder: Path) -> CollectionSummary:
    """Return size and mean divergence of the collection in a folder."""
    file = Occurrences(folder / OCCURRENCES_FILE)
    kl_sum = 0.0
    kl_pre_sum = 0.0
    last_prompt = 0
    for batch in file.batches():
        last_prompt = int(batch["unit"][-1])
        kl_sum += float(batch["kl"].sum(dtype="float64"))
        if file.has_pre:
            kl_pre_sum += float(batch["kl_pre"].sum(dtype="float64"))
    return CollectionSummary(
        rollouts=file.metadata["num_rollouts"],
        prompts=last_prompt + 1,
        tokens=file.rows,
        mean_kl=kl_sum / file.rows,
        mean_kl_pre=kl_pre_sum / file.rows if file.has_pre else None,
    )
