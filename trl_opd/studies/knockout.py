"""Completions with tokens forbidden at every step, decoded again only where that can change anything.

Forbidding v changes a completion only if v was chosen in it, and then only from there on: the completion without v is
its own prefix up to the first v, and decoded from that. This holds for the likeliest token, and for sampling when the
noise of every (position, token) is fixed: then the sample is the token of the largest sum of logit and noise (Gumbel),
and a token that was not the largest may be left out. It does not hold where a token's absence changes which others may
be drawn (top_p, top_k, min_p): there everything is decoded again.
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

BASELINE = "baseline"  # the arm that forbids nothing


@dataclass(frozen=True)
class Sampling:
    """How completions are decoded.

    Args:
        max_new_tokens (`int`): Longest completion.
        greedy (`bool`): Whether to take the likeliest token; the others are for sampling.
        temperature, top_p, top_k, min_p: As in TRL's configuration; `top_k` 0 and `top_p` 1 cut nothing.
        seed (`int`): Of the noise.
        batch_size (`int`): Rows of a batch.
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
        """Whether a completion without a token is its own prefix up to where the token was chosen."""
        return self.greedy or (self.temperature > 0 and self.top_p == 1.0 and self.top_k == 0 and not self.min_p)


@dataclass(frozen=True)
class Job:
    """A completion to decode.

    Args:
        arm (`str`): Whose it is.
        problem (`int`): Index of the problem.
        prompt (`tuple[int, ...]`): Token ids of the prompt.
        prefix (`tuple[int, ...]`): Token ids of the completion that are kept.
        forbidden (`frozenset[int]`): Ids that may not be chosen.
        expected (`int`): Tokens that it may take; the longest are decoded first.
    """

    arm: str
    problem: int
    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    forbidden: frozenset[int]
    expected: int


def baseline_jobs(prompts: Sequence[Sequence[int]], sampling: Sampling, *, forbidden: Iterable[int] = ()) -> list[Job]:
    """Return the completions of all problems, with nothing forbidden, or what no arm may choose."""
    return [
        Job(BASELINE, problem, tuple(prompt), (), frozenset(forbidden), sampling.max_new_tokens)
        for problem, prompt in enumerate(prompts)
    ]


def knockout_jobs(
    prompts: Sequence[Sequence[int]],
    baseline: Sequence[Sequence[int]],
    arms: Mapping[str, frozenset[int]],
    sampling: Sampling,
) -> list[Job]:
    """Return what has to be decoded for arms that forbid tokens: suffixes of the problems that chose one of them.

    Args:
        prompts (`Sequence[Sequence[int]]`): Token ids of the prompts.
        baseline (`Sequence[Sequence[int]]`): Token ids of the completions with nothing forbidden.
        arms (`Mapping[str, frozenset[int]]`): Forbidden ids of each arm.
        sampling (`Sampling`): How the baseline was decoded.
    """
    jobs = []
    first: list[dict[int, int]] = []
    for completion in baseline:
        places: dict[int, int] = {}
        for place, id in enumerate(completion):
            places.setdefault(id, place)
        first.append(places)
    for arm, forbidden in arms.items():
        for problem, places in enumerate(first):
            start = min((places[id] for id in forbidden if id in places), default=None)
            if start is None and sampling.reuses:
                continue
            start = start if sampling.reuses else 0
            prefix = tuple(baseline[problem][:start])
            jobs.append(Job(arm, problem, tuple(prompts[problem]), prefix, forbidden, len(baseline[problem]) - start))
    return jobs


@torch.no_grad()
def decode(
    model: PreTrainedModel, jobs: Sequence[Job], sampling: Sampling, *, pad_id: int, eos_ids: Sequence[int]
) -> Iterator[list[tuple[Job, list[int]]]]:
    """Yield the jobs with their whole completions, the end token included, a batch at a time, the longest first.

    Args:
        model (`transformers.PreTrainedModel`): The student, in eval mode.
        jobs (`Sequence[Job]`): What to decode.
        sampling (`Sampling`): How.
        pad_id (`int`): Id that fills shorter rows.
        eos_ids (`Sequence[int]`): Ids that end a completion.

    Raises:
        `ValueError`: where a step has no token left, or logits that are not numbers.
    """
    order = sorted(jobs, key=lambda job: (-job.expected, -len(job.prompt), job.problem, job.arm))
    for start in range(0, len(order), sampling.batch_size):
        batch = order[start : start + sampling.batch_size]
        yield [
            (job, ids) for job, ids in zip(batch, _decode_batch(model, batch, sampling, pad_id, eos_ids), strict=True)
        ]


def _decode_batch(
    model: PreTrainedModel, jobs: Sequence[Job], sampling: Sampling, pad_id: int, eos_ids: Sequence[int]
) -> list[list[int]]:
    rows = [[*job.prompt, *job.prefix] for job in jobs]
    width, device = max(map(len, rows)), model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    rooms = [sampling.max_new_tokens - len(job.prefix) for job in jobs]
    # Greedy to `generate`: what is sampled is decided by the noise that is added to the logits. What is left open here
    # (suppressed tokens, penalties) is as the student's own configuration has it.
    config = GenerationConfig(
        max_new_tokens=max(rooms), do_sample=False, pad_token_id=pad_id, eos_token_id=list(eos_ids), use_cache=True
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([_Knockout(jobs, sampling, width, device)]),
    )
    found = []
    for job, room, row in zip(jobs, rooms, output[:, width:].tolist(), strict=True):
        end = next((place + 1 for place, id in enumerate(row[:room]) if id in eos_ids), room)
        found.append([*job.prefix, *row[: min(end, room)]])
    return found


class _Knockout(LogitsProcessor):
    """Forbids each row's own ids, and adds each row's own noise."""

    def __init__(self, jobs: Sequence[Job], sampling: Sampling, width: int, device: torch.device):
        pairs = [(row, id) for row, job in enumerate(jobs) for id in sorted(job.forbidden)]
        self._rows, self._ids = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).T
        self._jobs, self._sampling, self._width = jobs, sampling, width
        self._problems = torch.tensor([job.problem for job in jobs], device=device)
        self._starts = torch.tensor([len(job.prefix) for job in jobs], device=device)
        self._cuts = []
        if not sampling.greedy:
            cuts = (
                (TopKLogitsWarper, sampling.top_k),
                (TopPLogitsWarper, sampling.top_p),
                (MinPLogitsWarper, sampling.min_p),
            )
            self._cuts = [cut(value) for cut, value in cuts if value and value != 1.0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float().clone()
        inside = self._ids < scores.shape[1]
        scores[self._rows[inside], self._ids[inside]] = -torch.inf
        best = scores.max(dim=1).values
        if not (best > -torch.inf).all() or (best == torch.inf).any():  # NaN is not above anything
            row = int((~(best > -torch.inf) | (best == torch.inf)).nonzero()[0])
            why = "no token is left to choose" if best[row] == -torch.inf else "the student's logits are not finite"
            raise ValueError(f"Problem {self._jobs[row].problem}, arm {self._jobs[row].arm!r}: {why}.")
        if self._sampling.greedy:
            return scores
        scores = scores / self._sampling.temperature
        for cut in self._cuts:
            scores = cut(input_ids, scores)
        places = self._starts + (input_ids.shape[1] - self._width)
        return scores + gumbel(self._sampling.seed, self._problems, places, scores.shape[1])


def gumbel(seed: int, problems: torch.Tensor, places: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return Gumbel noise of (seed, problem, position, token), float32, shape `(B, vocab_size)`.

    Args:
        seed (`int`): Seed.
        problems (`torch.Tensor`): Indices of the problems, `(B,)`.
        places (`torch.Tensor`): Positions in the completion, `(B,)`.
        vocab_size (`int`): Tokens.
    """
    tokens = torch.arange(vocab_size, device=problems.device)
    bits = hash_counters(seed, problems[:, None], places[:, None], tokens[None]) & (2**52 - 1)
    kind = torch.float32 if problems.device.type == "mps" else torch.float64
    uniform = (bits.to(kind) + 0.5) / 2**52
    return -torch.log(-torch.log(uniform)).float()
