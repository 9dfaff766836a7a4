"""The causal probe: forbid a token at every step of decoding and see what that does to the rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artefacts.atomic import complete_file, room_errors
from .knockout import BASELINE, Job, Sampling, baseline_jobs, decode, knockout_jobs
from .rewards import reward_completions

VERSION = 1
UNSTABLE_PROBLEMS = 64


class Probe:
    """Decodes the arms of a probe, resumes what was decoded before, and rewards them.

    Args:
        model (`transformers.PreTrainedModel`): The student, in eval mode.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        rows (`Sequence[Mapping]`): Problems with a `prompt` and whatever the reward takes.
        reward (`Callable`): With TRL's signature.
        sampling (`Sampling`): How to decode.
        journal (`Path`): Completions as they come; an interrupted probe goes on from them.
        settings (`dict`): What makes the completions what they are.

    Attributes:
        decoded (`int`): Tokens that were decoded, those of an interrupted probe included.
        baseline (`list[list[int]]`): Completions with nothing forbidden.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Mapping[str, Any]],
        reward: Callable,
        sampling: Sampling,
        *,
        journal: Path,
        settings: dict[str, Any],
    ):
        self._model, self._tokenizer, self._rows, self._reward = model, tokenizer, rows, reward
        self._sampling, self._journal = sampling, journal
        self._prompts = [tokenize(row["prompt"], tokenizer) for row in rows]
        own = model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        self._eos = sorted({id for id in (*own, tokenizer.eos_token_id) if id is not None})
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._eos[0]
        self._known = self._read(settings)
        self.decoded = 0
        found = self._complete(baseline_jobs(self._prompts, sampling), "baseline")
        self.baseline = [found[BASELINE, problem] for problem in range(len(rows))]

    def rewards_of(self, arms: Mapping[str, frozenset[int]]) -> dict[str, list[float]]:
        """Return the rewards of all problems for each arm, and for the baseline."""
        jobs = knockout_jobs(self._prompts, self.baseline, arms, self._sampling)
        found = self._complete(jobs, "knockouts")
        base = self._reward_all(dict(enumerate(self.baseline)))
        rewards = {BASELINE: [base[problem] for problem in range(len(self._rows))]}
        for arm in arms:
            changed = {job.problem: found[arm, job.problem] for job in jobs if job.arm == arm}
            new = self._reward_all({p: ids for p, ids in changed.items() if ids != self.baseline[p]})
            rewards[arm] = [new.get(problem, value) for problem, value in enumerate(rewards[BASELINE])]
        return rewards

    def naive_tokens(self, arms: Mapping[str, frozenset[int]]) -> int:
        """Return how many tokens the arms would take from scratch, after `rewards_of`."""
        lengths = [len(ids) for ids in self.baseline]
        total = sum(lengths)
        for arm in arms:
            total += sum(len(self._known.get((arm, p), self.baseline[p])) for p in range(len(lengths)))
        return total

    def unstable_share(self) -> float:
        """Return the share of the first 64 problems whose completion is another one when decoded alone.

        In half precision the shape of a batch moves logits, so suffixes are not exactly those of whole completions.
        """
        jobs = baseline_jobs(self._prompts[:UNSTABLE_PROBLEMS], self._sampling)
        alone = replace(self._sampling, batch_size=1)
        batches = decode(self._model, jobs, alone, pad_id=self._pad, eos_ids=self._eos)
        return float(np.mean([ids != self.baseline[job.problem] for batch in batches for job, ids in batch]))

    @torch.no_grad()
    def entropies(self) -> dict[int, float]:
        """Return the student's mean entropy where it chose each token of the baseline, nats, at temperature 1."""
        found: dict[int, list[float]] = {}
        device = self._model.get_input_embeddings().weight.device
        pairs = list(zip(self._prompts, self.baseline, strict=True))
        for prompt, completion in tqdm(pairs, unit="completion", desc="entropy", leave=False):
            ids = torch.tensor([[*prompt, *completion[:-1]]], device=device)
            logits = self._model(input_ids=ids, logits_to_keep=len(completion)).logits[0, -len(completion) :]
            logs = logits.float().log_softmax(-1)
            for id, entropy in zip(completion, (-(logs.exp() * logs).sum(-1)).tolist(), strict=True):
                found.setdefault(id, []).append(entropy)
        return {id: sum(values) / len(values) for id, values in found.items()}

    def close(self) -> None:
        """Forget the journal: the probe is complete."""
        self._journal.unlink(missing_ok=True)

    def _reward_all(self, completions: Mapping[int, list[int]]) -> dict[int, float]:
        problems = list(completions)
        texts = [self._tokenizer.decode(completions[problem], skip_special_tokens=True) for problem in problems]
        rows = [self._rows[problem] for problem in problems]
        return dict(zip(problems, reward_completions(self._reward, rows, texts, problems), strict=True))

    def _complete(self, jobs: Sequence[Job], what: str) -> dict[tuple[str, int], list[int]]:
        missing = [job for job in jobs if (job.arm, job.problem) not in self._known]
        self.decoded += sum(
            len(self._known[job.arm, job.problem]) - len(job.prefix)
            for job in jobs
            if (job.arm, job.problem) in self._known
        )
        with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="completion", desc=what) as bar:
            for batch in decode(self._model, missing, self._sampling, pad_id=self._pad, eos_ids=self._eos):
                lines = []
                for job, ids in batch:
                    self._known[job.arm, job.problem] = ids
                    self.decoded += len(ids) - len(job.prefix)
                    lines.append(json.dumps([job.arm, job.problem, ids]) + "\n")
                begun = self._journal.is_file()
                with room_errors(self._journal), self._journal.open("a", encoding="utf-8") as file:
                    file.write(("" if begun else self._head) + "".join(lines))
                bar.update(len(batch))
        return {(job.arm, job.problem): self._known[job.arm, job.problem] for job in jobs}

    def _read(self, settings: dict[str, Any]) -> dict[tuple[str, int], list[int]]:
        """Return the completions of the journal, if there is one."""
        self._head = json.dumps(settings) + "\n"
        if not self._journal.is_file():
            return {}
        # What follows the last line break was cut while it was written.
        *lines, _ = self._journal.read_bytes().decode(errors="replace").split("\n")
        if not lines:
            self._journal.unlink()
            return {}
        if lines[0] != json.dumps(settings):
            raise ValueError(
                f"{self._journal} is of an interrupted probe with other settings: finish that one, or remove the file."
            )
        known = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                arm, problem, ids = json.loads(line)
                known[arm, problem] = ids
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self._journal} is damaged in line {number}: remove the file.") from error
        with complete_file(self._journal) as part:
            part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return known


def tokenize(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids of a prompt, a text or a conversation, as TRL's trainers do."""
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return tuple(found["input_ids"])
