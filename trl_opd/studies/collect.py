"""Collect a student's rollouts, scored by its teacher and optionally by the student before distillation.

The trainer's own code samples and scores, in eval mode. Each batch of prompts has its own part file, so memory does not
grow with the number of rollouts, and a run that was killed resumes with the next batch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
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
# Folder and file of an unfinished collection, inside its output folder.
PARTS = "parts"
SETTINGS = "settings.json"


class Collector:
    """Collects rollouts and the divergence at each of their tokens into a folder.

    Args:
        pair (`ModelPair`): Student and teacher.
        sample_rollouts (`Callable`): Samples one rollout for each given dataset row ([`OPDTrainer.sample_rollouts`]).
        dataset (`datasets.Dataset`): Rows with a `prompt`; all rows are used, in order.
        folder (`Path`): Folder for `occurrences.parquet` and `prompts.parquet`.
        num_generations (`int`): Rollouts per prompt.
        batch_size (`int`): Rollouts sampled and scored at once.
        seed (`int`): Seed of the rollouts.
        chunk_bytes (`int`): Upper limit in bytes for the logits held at once, as in [`weighted_divergence`].
        reference (`transformers.PreTrainedModel` or `str`, *optional*):
            The student before distillation, or "adapter_off" for a LoRA student without its adapter.
        settings (`dict`):
            Arguments that determine the rows; a folder with an unfinished collection of other settings is an error.

    Raises:
        `ValueError`: if `reference` is "adapter_off" and the student has no LoRA adapter.
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
            raise ValueError(
                "adapter_off is for a student with a LoRA adapter, and this one has none: give the name or path of a "
                "reference model."
            )
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
        """Collect the batches that are missing, and join all parts into the two files.

        Raises:
            `ValueError`: if the folder holds an unfinished collection of other settings, or logits are not finite.
        """
        self._begin()
        starts = range(0, len(self._dataset), self._step)
        missing = [start for start in starts if not self._part(start).is_file()]
        total = len(self._dataset)
        finished = total - sum(len(self._places(start)) for start in missing)
        tokens = 0
        began = time.monotonic()
        with tqdm(total=total, initial=finished, unit="prompt", desc="collect", delay=0) as bar:
            for start in missing:
                tokens += self._collect_batch(start)
                bar.update(len(self._places(start)))
                seconds = time.monotonic() - began
                bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s")
        self._join(starts)

    def _places(self, start: int) -> range:
        """Return the indices of the prompts of the batch with the given start; the last batch may be smaller."""
        return range(len(self._dataset))[start : start + self._step]

    def _part(self, start: int, kind: str = "rows") -> Path:
        return self._folder / PARTS / f"{kind}-{start:08d}.parquet"

    def _begin(self) -> None:
        """Make the folder of parts, or raise `ValueError` if it holds a collection of other settings."""
        parts = self._folder / PARTS
        parts.mkdir(parents=True, exist_ok=True)
        require_same_settings(self._folder, _unfinished_settings(self._folder), self._settings)
        write_json(parts / SETTINGS, self._settings)

    def _collect_batch(self, start: int) -> int:
        """Sample and score the rollouts of some prompts, write their part, and return the number of their tokens."""
        places = self._places(start)
        rows = []
        for place in places:
            rows += [self._dataset[place] for _ in range(self._generations)]
        seed = int(np.random.SeedSequence([self._seed, start]).generate_state(1)[0])
        with torch.no_grad(), own_random_stream(seed), self._pair.teacher_resident():
            inputs = self._sample_rollouts(rows)
            columns = self._measure(inputs)

        completion_ids = inputs["completion_ids"]
        positions = inputs["positions"]
        row, column = np.divmod(positions.cpu().numpy(), completion_ids.shape[1])
        rollout = start * self._generations + row
        columns["rollout"] = rollout
        columns["position"] = column
        columns["prompt"] = rollout // self._generations
        columns["token_id"] = completion_ids.flatten()[positions].cpu().numpy()
        self._write_prompts(start, places, inputs)
        # This file is written last, because its presence marks the batch as complete.
        write_occurrences(self._part(start), columns, {})
        return len(rollout)

    def _write_prompts(self, start: int, places: range, inputs: dict[str, torch.Tensor]) -> None:
        """Write the token ids of the prompts of a batch."""
        # Each prompt is in as many consecutive rows as it has rollouts.
        prompt_ids = inputs["prompt_ids"][:: self._generations]
        prompt_mask = inputs["prompt_mask"][:: self._generations].bool()
        token_ids = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        table = pa.table({"prompt": places, "token_ids": token_ids, "row": places}, schema=PROMPT_SCHEMA)
        with complete_file(self._part(start, "prompts")) as part:
            pq.write_table(table, part)

    def _measure(self, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return divergence and entropy at the positions of a batch, and the reference student's divergence if any."""
        student = self._pair.student
        if "teacher_hidden" not in inputs:
            inputs["teacher_hidden"] = self._pair.teacher_states.compute_states(inputs)
        kl, entropy = self._kl_and_entropy(student, inputs, "student or teacher")
        columns = {"kl": kl, "entropy": entropy}
        if self._reference is None:
            return columns

        if self._reference == ADAPTER_OFF:
            reference = student
            adapter_state = student.disable_adapter()
        else:
            reference = self._reference
            adapter_state = nullcontext()
        with adapter_state:
            columns["kl_pre"], _ = self._kl_and_entropy(reference, inputs, "reference student or teacher")
        return columns

    def _kl_and_entropy(
        self, student: torch.nn.Module, inputs: dict[str, torch.Tensor], who: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return KL(student ‖ teacher) and the student's entropy at the positions of a batch, nats, `(N,)` each."""
        positions = inputs["positions"]
        token_ids = inputs["completion_ids"].flatten()[positions]
        _, signals = loss_and_signals(
            self._pair.hidden_states(inputs, student=student),
            token_ids,
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
            raise ValueError(
                f"The logits of {who} are not finite: load the model in another dtype (bfloat16, float32), and check "
                "its weights."
            )
        return kl, entropy

    def _join(self, starts: range) -> None:
        """Join the parts into the two files, and remove the parts."""
        measure = self._pair.measure
        metadata = {
            "vocab_size": self._pair.vocab_size,
            "tokenizer": measure["tokenizer"],
            "teacher": measure["teacher"],
            "temperature": measure["temperature"],
            "student": self._settings.get("model_name_or_path") or measure["student"],
            "reference": self._settings.get("reference_model_name_or_path"),
            "beta": 1.0,
            "num_rollouts": len(self._dataset) * self._generations,
            "num_generations": self._generations,
            "settings": self._settings,
        }
        prompt_parts = [self._part(start, "prompts") for start in starts]
        row_parts = [self._part(start) for start in starts]
        join_files(prompt_parts, self._folder / PROMPTS_FILE)
        join_files(row_parts, self._folder / OCCURRENCES_FILE, metadata)
        shutil.rmtree(self._folder / PARTS)


def is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a folder already holds the complete collection with the given settings.

    Raises:
        `ValueError`: if it holds a collection, complete or not, of other settings.
    """
    path = folder / OCCURRENCES_FILE
    if path.is_file():
        require_same_settings(folder, Occurrences(path).metadata.get("settings"), settings)
        return True
    require_same_settings(folder, _unfinished_settings(folder), settings)
    return False


def _unfinished_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the unfinished collection in a folder, `None` if there is none."""
    path = folder / PARTS / SETTINGS
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def require_same_settings(folder: Path, known: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """Raise `ValueError` with the first setting that differs if a folder holds a collection of other settings.

    Args:
        folder (`Path`): Folder of the collection.
        known (`dict`, *optional*): Settings of the collection in it; if they are unknown, nothing is checked.
        settings (`dict`): Settings of this collection.
    """
    if known is None or known == settings:
        return
    name = next(name for name in settings | known if known.get(name) != settings.get(name))
    raise ValueError(
        f"{folder} holds a collection with {name} {known.get(name)!r}, and this one has {settings.get(name)!r}: "
        "choose another --output_dir, or remove the folder."
    )


class CollectionSummary(NamedTuple):
    """Size and mean divergence of a collection.

    Args:
        rollouts (`int`): Number of rollouts.
        prompts (`int`): Number of prompts.
        tokens (`int`): Number of tokens in all rollouts.
        mean_kl (`float`): Mean divergence over all tokens, nats.
        mean_kl_pre (`float`, *optional*): The same for the reference student, if there is one.
    """

    rollouts: int
    prompts: int
    tokens: int
    mean_kl: float
    mean_kl_pre: float | None


def summarise_collection(folder: Path) -> CollectionSummary:
    """Return the size and the mean divergence of the collection in a folder."""
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
