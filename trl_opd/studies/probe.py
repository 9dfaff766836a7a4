"""The causal probe: forbid a token at every step of decoding and measure how the rewards change."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artefacts.atomic import complete_file, room_errors
from ..artefacts.run_files import KNOCKOUT_FORMAT, KNOCKOUT_VERSION
from ..loss.lm_head import output_rows
from ..loss.logits import entropy
from ..models.model_check import generates_padded
from ..models.shape import context_length
from ..rocks.rock_set import RockSet
from ..rollouts.prompts import require_fit, tokenize_prompts
from .effects import evaluate_arms, make_arms
from .knockout import BASELINE, Job, Sampling, baseline_jobs, decode, knockout_jobs
from .rewards import reward_completions

UNSTABLE_PROBLEMS = 64  # problems decoded a second time to measure how many completions depend on the batch
# Arguments that change no completion, so an interrupted probe may be resumed with other values of them.
FREE_ARGUMENTS = ("output", "batch_size", "reward", "effect")


def run_probe(
    probe: Probe,
    rock_set: RockSet | None,
    *,
    candidates: str,
    top_n: int,
    seed: int,
    is_exact: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of knockout.json: the effects of forbidding each candidate, all rocks, and all controls.

    Args:
        probe (`Probe`): Decodes and rewards.
        rock_set (`RockSet`, *optional*): Rocks and controls.
        candidates (`str`): "rocks" for rocks and controls, "all" for every token type of the baseline's completions.
        top_n (`int`): Number of rocks to probe, highest ranked first.
        seed (`int`): Seed of resamples and draws.
        is_exact (`bool`): Whether completions do not depend on the batch; if they may, the share that does is measured.
        settings (`dict`): Arguments of the command, for the record.

    Raises:
        `ValueError`: if no candidate occurs in the baseline's completions.
    """
    rocks = [] if rock_set is None else rock_set.rocks
    rock_ids = [rock.id for rock in rocks[:top_n]]
    control_ids = _control_ids(rock_set)

    # Forbidding a token that the baseline never chose has no effect.
    counts = Counter(id for completion in probe.baseline for id in completion)
    single = sorted(counts) if candidates == "all" else rock_ids + control_ids
    if counts.keys().isdisjoint(single):
        raise ValueError(
            "None of the candidates occurs in the baseline's completions, so forbidding them changes nothing: check "
            "that the rock set was made from this student's rollouts, or pass `--candidates all`."
        )
    arms = make_arms(rock_ids, control_ids, single)
    forbidden = {arm: ids for arm, (_, ids) in arms.items()}
    rewards = probe.rewards_of(forbidden)

    log_counts = {id: math.log(count) for id, count in counts.items()}
    mean_kl = {rock.id: rock.mean_kl for rock in rocks}
    measures = {"entropy": probe.entropies(), "log_count": log_counts, "mean_kl": mean_kl}
    result = {"format": KNOCKOUT_FORMAT, "version": KNOCKOUT_VERSION, "settings": settings}
    result |= evaluate_arms(arms, rewards, measures, seed=seed)
    result["exact_reuse"] = probe.sampling.reuses
    result["decoded_tokens"] = probe.decoded
    result["naive_tokens"] = probe.naive_tokens(forbidden)
    result["unstable_share"] = None if is_exact else probe.unstable_share()
    for arm in result["arms"]:
        arm["texts"] = [probe.tokenizer.decode([id]) for id in arm["ids"]]
    return result


def _control_ids(rock_set: RockSet | None) -> list[int]:
    if rock_set is None or rock_set.controls is None:
        return []
    return list(rock_set.controls.ids)


def journal_settings(arguments: Mapping[str, Any], rock_set: RockSet | None) -> dict[str, Any]:
    """Return the settings that determine the completions of a probe; the first line of its journal records them.

    Args:
        arguments (`Mapping`): Arguments of the command.
        rock_set (`RockSet`, *optional*): Rocks and controls; their ids are recorded, because the file may change.
    """
    settings = {name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS}
    if rock_set is not None:
        settings["ids"] = [rock_set.ids.tolist(), _control_ids(rock_set)]
    return settings


class Probe:
    """Decodes and rewards the completions of a probe; completions in the journal are not decoded again.

    Args:
        model (`transformers.PreTrainedModel`): The student, in eval mode.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        rows (`Sequence[Mapping]`): Problems with a `prompt` and the columns that the reward uses.
        reward (`Callable`): Reward function with TRL's signature.
        sampling (`Sampling`): How to decode.
        journal (`Path`): File of the completions decoded so far; an interrupted probe resumes from it.
        settings (`dict`): Settings that determine the completions ([`journal_settings`]).

    Attributes:
        decoded (`int`): Number of decoded tokens, including those decoded before an interruption.
        baseline (`list[list[int]]`): Token ids of the completions with nothing forbidden.

    Raises:
        `ValueError`: if the journal is damaged or belongs to a probe with other settings.
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
        if not generates_padded(model):
            sampling = replace(sampling, batch_size=1)
        self.tokenizer = tokenizer
        self.sampling = sampling
        self._model = model
        self._rows = rows
        self._reward = reward
        self._journal = journal
        self._prompts = [tokenize(row["prompt"], tokenizer) for row in rows]

        ends = {tokenizer.eos_token_id}
        own_ends = model.generation_config.eos_token_id
        if isinstance(own_ends, list):
            ends.update(own_ends)
        else:
            ends.add(own_ends)
        self._eos = sorted(ends - {None})

        self._pad = tokenizer.pad_token_id
        if self._pad is None:
            self._pad = self._eos[0]

        # First line of the journal.
        self._head = json.dumps(settings)
        self._known = self._read_journal()
        self.decoded = 0
        completions = self._complete(baseline_jobs(self._prompts, sampling), "baseline")
        self.baseline = [completions[BASELINE, problem] for problem in range(len(rows))]

    def rewards_of(self, arms: Mapping[str, frozenset[int]]) -> dict[str, list[float]]:
        """Return the rewards of all problems for each arm, and for the baseline."""
        jobs = knockout_jobs(self._prompts, self.baseline, arms, self.sampling)
        completions = self._complete(jobs, "knockouts")
        baseline_rewards = self._reward_all(dict(enumerate(self.baseline)))
        rewards = {BASELINE: list(baseline_rewards.values())}

        # A completion equal to the baseline's has the baseline's reward.
        changed: dict[str, dict[int, list[int]]] = {arm: {} for arm in arms}
        for (arm, problem), ids in completions.items():
            if ids != self.baseline[problem]:
                changed[arm][problem] = ids

        for arm, completions_of_arm in changed.items():
            arm_rewards = baseline_rewards | self._reward_all(completions_of_arm)
            rewards[arm] = list(arm_rewards.values())
        return rewards

    def naive_tokens(self, arms: Mapping[str, frozenset[int]]) -> int:
        """Return how many tokens baseline and arms would take without reuse; call it after `rewards_of`."""
        total = sum(map(len, self.baseline))
        for arm in arms:
            for problem, completion in enumerate(self.baseline):
                total += len(self._known.get((arm, problem), completion))
        return total

    def unstable_share(self) -> float:
        """Return the share of the first 64 problems whose completion changes when it is decoded alone.

        In half precision, logits depend on the shape of the batch, so a suffix decoded from a prefix may differ from
        the end of a completion decoded from scratch.
        """
        jobs = baseline_jobs(self._prompts[:UNSTABLE_PROBLEMS], self.sampling)
        alone = replace(self.sampling, batch_size=1)
        batches = decode(self._model, jobs, alone, pad_id=self._pad, eos_ids=self._eos)
        changed = []
        for batch in batches:
            changed += [ids != self.baseline[job.problem] for job, ids in batch]
        return float(np.mean(changed))

    @torch.no_grad()
    def entropies(self) -> dict[int, float]:
        """Return the student's mean entropy where the baseline chose each token, in nats, at temperature 1."""
        entropies: dict[int, list[float]] = {}
        device = self._model.get_input_embeddings().weight.device
        pairs = list(zip(self._prompts, self.baseline, strict=True))
        for prompt, completion in tqdm(pairs, unit="completion", desc="entropy", leave=False):
            length = len(completion)
            ids = list(prompt) + completion[:-1]
            output = self._model(input_ids=torch.tensor([ids], device=device), logits_to_keep=length)
            values = entropy(output.logits[0, -length:]).tolist()
            for id, value in zip(completion, values, strict=True):
                entropies.setdefault(id, []).append(value)
        return {id: sum(values) / len(values) for id, values in entropies.items()}

    def close(self) -> None:
        """Remove the journal, once the probe is complete."""
        self._journal.unlink(missing_ok=True)

    def _reward_all(self, completions: Mapping[int, list[int]]) -> dict[int, float]:
        """Return the reward of completions by the index of their problem."""
        problems = list(completions)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions.values()]
        rows = [self._rows[problem] for problem in problems]
        rewards = reward_completions(self._reward, rows, texts, problems)
        return dict(zip(problems, rewards, strict=True))

    def _complete(self, jobs: Sequence[Job], description: str) -> dict[tuple[str, int], list[int]]:
        """Return the completions of jobs by arm and problem; those that are not in the journal are decoded."""
        missing = [job for job in jobs if (job.arm, job.problem) not in self._known]
        with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="completion", desc=description) as bar:
            for batch in decode(self._model, missing, self.sampling, pad_id=self._pad, eos_ids=self._eos):
                for job, ids in batch:
                    self._known[job.arm, job.problem] = ids
                self._append_to_journal(batch)
                bar.update(len(batch))

        completions = {}
        for job in jobs:
            key = (job.arm, job.problem)
            completions[key] = self._known[key]
            self.decoded += len(completions[key]) - len(job.prefix)
        return completions

    def _append_to_journal(self, batch: Sequence[tuple[Job, list[int]]]) -> None:
        lines = [json.dumps([job.arm, job.problem, ids]) for job, ids in batch]
        if not self._journal.is_file():
            lines.insert(0, self._head)
        with room_errors(self._journal), self._journal.open("a", encoding="utf-8") as file:
            file.write(_join_lines(lines))

    def _read_journal(self) -> dict[tuple[str, int], list[int]]:
        """Return the completions of the journal by arm and problem; no completions if there is no journal."""
        if not self._journal.is_file():
            return {}
        # Text after the last line break is a line whose writing was interrupted, so it is dropped.
        *lines, _ = self._journal.read_bytes().decode(errors="replace").split("\n")
        if not lines:
            self._journal.unlink()
            return {}
        if lines[0] != self._head:
            raise ValueError(
                f"{self._journal} belongs to an interrupted probe with other settings: finish that one, or "
                "remove the file."
            )
        known = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                arm, problem, ids = json.loads(line)
                known[arm, problem] = ids
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self._journal} is damaged in line {number}: remove the file.") from error
        with complete_file(self._journal) as part:
            part.write_text(_join_lines(lines), encoding="utf-8")
        return known


def _join_lines(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


def require_rock_set_fits(rock_set: RockSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless the ids of a rock set mean the same tokens for a student and its tokenizer."""
    rock_set.check(tokenizer, output_rows(model))


def require_prompts_fit(
    rows: Sequence[Mapping[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> None:
    """Raise `ValueError` for a prompt without tokens, or one that leaves no room in the context for its completion.

    Args:
        rows (`Sequence[Mapping]`): Problems with a `prompt`.
        model (`transformers.PreTrainedModel`): The student.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        max_new_tokens (`int`): Maximum length of a completion.
    """
    prompts = [row["prompt"] for row in rows]
    prompt_ids = tokenize_prompts(lambda given: [tokenize(prompt, tokenizer) for prompt in given], prompts)
    require_fit(prompts, prompt_ids, max_new_tokens, context_length(model), dataset=None)


def tokenize(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids of a prompt, a text or a conversation, as TRL's trainers do."""
    if isinstance(prompt, str):
        encoding = tokenizer(prompt)
    else:
        encoding = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return tuple(encoding["input_ids"])
