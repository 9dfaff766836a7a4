"""Completions with tokens forbidden at every step, decoded again only where that can change anything.

Forbidding a token changes a completion only if the completion contains the token, and then only from its first
occurrence on. So we keep the prefix up to that occurrence and decode the rest. This holds for greedy decoding. It also
holds for sampling when the noise of every (position, token) is fixed: the sample is then the token with the largest
sum of logit and Gumbel noise, and removing a token that was not the largest changes nothing. It does not hold where
the absence of a token changes which other tokens may be drawn (top_p, top_k, min_p): there we decode everything again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..loss.hashing import hash_counters
from ..rollouts.batches import pad_token_ids

BASELINE = "baseline"  # the arm that forbids nothing


@dataclass(frozen=True)
class Sampling:
    """Settings of decoding.

    Args:
        max_new_tokens (`int`): Maximum length of a completion.
        greedy (`bool`): Whether to take the most likely token; the settings below except `batch_size` are for sampling.
        temperature, top_p, top_k, min_p: As in TRL's configuration; `top_k` 0 and `top_p` 1 exclude no token.
        seed (`int`): Seed of the noise.
        batch_size (`int`): Completions decoded at once.
    """

    max_new_tokens: int
    greedy: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    seed: int = 0
    batch_size: int = 64

    @property
    def reuses(self) -> bool:
        """Whether an arm can reuse the baseline's completion up to the first forbidden token."""
        if self.greedy:
            return True
        excludes_none = self.top_p == 1.0 and self.top_k == 0 and not self.min_p
        return excludes_none and self.temperature > 0


@dataclass(frozen=True)
class Job:
    """One completion to decode.

    Args:
        arm (`str`): Name of the arm.
        problem (`int`): Index of the problem.
        prompt (`tuple[int, ...]`): Token ids of the prompt.
        prefix (`tuple[int, ...]`): Token ids of the completion that are not decoded again.
        forbidden (`frozenset[int]`): Ids that may not be chosen.
        expected (`int`): Estimated number of tokens to decode; the longest jobs are decoded first.
    """

    arm: str
    problem: int
    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    forbidden: frozenset[int]
    expected: int


def baseline_jobs(prompts: Sequence[Sequence[int]], sampling: Sampling, *, forbidden: Iterable[int] = ()) -> list[Job]:
    """Return a job for each problem in the baseline.

    Args:
        prompts (`Sequence[Sequence[int]]`): Token ids of the prompts.
        sampling (`Sampling`): How to decode.
        forbidden (`Iterable[int]`): Ids that may not be chosen; by default all ids may be.
    """
    forbidden = frozenset(forbidden)
    jobs = []
    for problem, prompt in enumerate(prompts):
        job = Job(
            arm=BASELINE,
            problem=problem,
            prompt=tuple(prompt),
            prefix=(),
            forbidden=forbidden,
            expected=sampling.max_new_tokens,
        )
        jobs.append(job)
    return jobs


def knockout_jobs(
    prompts: Sequence[Sequence[int]],
    baseline: Sequence[Sequence[int]],
    arms: Mapping[str, frozenset[int]],
    sampling: Sampling,
) -> list[Job]:
    """Return the jobs of arms that forbid tokens.

    If the baseline's completions can be reused, only problems whose completion contains a forbidden token are decoded,
    from its first occurrence on; otherwise all problems are decoded from the start.

    Args:
        prompts (`Sequence[Sequence[int]]`): Token ids of the prompts.
        baseline (`Sequence[Sequence[int]]`): Token ids of the completions with nothing forbidden.
        arms (`Mapping[str, frozenset[int]]`): Forbidden ids of each arm.
        sampling (`Sampling`): How the baseline was decoded.
    """
    reuses = sampling.reuses
    first_places = [_first_places(completion) for completion in baseline]
    jobs = []
    for arm, forbidden in arms.items():
        for problem, places in enumerate(first_places):
            start = 0
            if reuses:
                chosen = forbidden & places.keys()
                if not chosen:
                    continue
                start = min(places[id] for id in chosen)

            prefix = tuple(baseline[problem][:start])
            job = Job(
                arm=arm,
                problem=problem,
                prompt=tuple(prompts[problem]),
                prefix=prefix,
                forbidden=forbidden,
                expected=len(baseline[problem]) - start,
            )
            jobs.append(job)
    return jobs


def _first_places(completion: Sequence[int]) -> dict[int, int]:
    """Return the position of the first occurrence of each token."""
    places: dict[int, int] = {}
    for place, id in enumerate(completion):
        places.setdefault(id, place)
    return places


@torch.no_grad()
def decode(
    model: PreTrainedModel, jobs: Sequence[Job], sampling: Sampling, *, pad_id: int, eos_ids: Sequence[int]
) -> Iterator[list[tuple[Job, list[int]]]]:
    """Yield batches of jobs with their whole completions, end token included, the longest jobs first.

    Args:
        model (`transformers.PreTrainedModel`): The student, in eval mode.
        jobs (`Sequence[Job]`): Completions to decode.
        sampling (`Sampling`): How to decode.
        pad_id (`int`): Id that fills shorter rows.
        eos_ids (`Sequence[int]`): Ids that end a completion.

    Raises:
        `ValueError`: if a step has no token left to choose, or logits that are not finite.
    """
    order = sorted(jobs, key=_sort_key)
    for start in range(0, len(order), sampling.batch_size):
        batch = order[start : start + sampling.batch_size]
        completions = _decode_batch(model, batch, sampling, pad_id=pad_id, eos_ids=eos_ids)
        yield list(zip(batch, completions, strict=True))


def _sort_key(job: Job) -> tuple[int, int, int, str]:
    return -job.expected, -len(job.prompt), job.problem, job.arm


def _decode_batch(
    model: PreTrainedModel, jobs: Sequence[Job], sampling: Sampling, *, pad_id: int, eos_ids: Sequence[int]
) -> list[list[int]]:
    device = model.get_input_embeddings().weight.device
    rows = [job.prompt + job.prefix for job in jobs]
    ids, mask = pad_token_ids(rows, pad_id, side="left", device=device)
    width = ids.shape[1]
    rooms = [sampling.max_new_tokens - len(job.prefix) for job in jobs]

    # `generate` decodes greedily also when we sample, because the noise that we add to the logits decides the sample.
    # Settings that are not given here (suppressed tokens, penalties) come from the student's own configuration.
    config = GenerationConfig(
        max_new_tokens=max(rooms), do_sample=False, pad_token_id=pad_id, eos_token_id=list(eos_ids), use_cache=True
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([_Knockout(jobs, sampling, width, device)]),
    )

    completions = []
    for job, room, row in zip(jobs, rooms, output[:, width:].tolist(), strict=True):
        completion = list(job.prefix)
        for id in row[:room]:
            completion.append(id)
            if id in eos_ids:
                break
        completions.append(completion)
    return completions


class _Knockout(LogitsProcessor):
    """Forbids each row's own ids, and adds each row's own noise."""

    def __init__(self, jobs: Sequence[Job], sampling: Sampling, width: int, device: torch.device):
        pairs = [(row, id) for row, job in enumerate(jobs) for id in sorted(job.forbidden)]
        # The reshape is for jobs that forbid nothing.
        self._rows, self._ids = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).T
        self._jobs = jobs
        self._sampling = sampling
        self._width = width
        self._problems = torch.tensor([job.problem for job in jobs], device=device)
        self._starts = torch.tensor([len(job.prefix) for job in jobs], device=device)
        self._cuts = []
        if not sampling.greedy:
            cuts = {
                TopKLogitsWarper: sampling.top_k,
                TopPLogitsWarper: sampling.top_p,
                MinPLogitsWarper: sampling.min_p,
            }
            self._cuts = [cut(value) for cut, value in cuts.items() if value and value != 1.0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float().clone()
        is_inside = self._ids < scores.shape[1]
        scores[self._rows[is_inside], self._ids[is_inside]] = -torch.inf
        self._require_finite(scores.max(dim=1).values)
        if self._sampling.greedy:
            return scores

        scores = scores / self._sampling.temperature
        for cut in self._cuts:
            scores = cut(input_ids, scores)
        places = self._starts + (input_ids.shape[1] - self._width)
        return scores + gumbel(self._sampling.seed, self._problems, places, scores.shape[1])

    def _require_finite(self, best: torch.Tensor) -> None:
        """Raise `ValueError` with the first row whose largest logit is not finite."""
        is_finite = best.isfinite()
        if is_finite.all():
            return
        row = int(is_finite.logical_not().nonzero()[0])
        job = self._jobs[row]
        if best[row] == -torch.inf:
            reason = (
                "no token is left to choose, because the arm and the generation config forbid all of them: forbid "
                "fewer tokens"
            )
        else:
            reason = (
                "the student's logits are not finite: load the student in another dtype (bfloat16, float32), and check "
                "its weights"
            )
        raise ValueError(f"Problem {job.problem}, arm {job.arm!r}: {reason}.")


def gumbel(seed: int, problems: torch.Tensor, places: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return Gumbel noise that depends only on (seed, problem, position, token), float32, `(B, vocab_size)`.

    Args:
        seed (`int`): Seed.
        problems (`torch.Tensor`): Indices of the problems, `(B,)`.
        places (`torch.Tensor`): Positions in the completion, `(B,)`.
        vocab_size (`int`): Size of the vocabulary.
    """
    tokens = torch.arange(vocab_size, device=problems.device)
    bits = hash_counters(seed, problems[:, None], places[:, None], tokens)
    mantissas = bits & (2**52 - 1)
    # MPS has no float64.
    dtype = torch.float32 if problems.device.type == "mps" else torch.float64
    uniform = (mantissas.to(dtype) + 0.5) / 2**52
    exponential = -uniform.log()
    return -exponential.log().float()
