"""Sums of the gradient of the reverse KL with respect to the student's logits, by token type: do tokens still teach?

At one position, with student p and teacher q, the gradient is `g_u = p_u (log p_u - log q_u - KL)` (arXiv:2605.09253).
We keep two vectors for each chosen type and two for all types together, never the gradients of all types.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..artefacts.occurrences import Occurrences, read_prompts
from ..loss.logits import logit_chunks, reverse_kl_gradient
from ..rollouts.batches import locate_loss_positions, pad_token_ids
from ..training.model_pair import ModelPair

RANDOM_TYPES = 100  # at most this many of the types that are neither rocks nor rare


class GradientSums:
    """Sums of the gradients over positions.

    Args:
        counts (`torch.Tensor`): How often each type occurs in all positions that will be added, int64, shape `(V,)`.
        ids (`torch.Tensor`): Types to measure, shape `(T,)`.
        device (`torch.device`): Where the sums are kept.

    Attributes:
        of_types, of_matched (`torch.Tensor`): Sum over all and over the matched positions of each type, `(T, V)`.
        squares (`torch.Tensor`): Sum of the squared norms, float64, `(T,)`.
        balanced (`torch.Tensor`): G_balanced, the sum of every type's mean gradient, `(V,)`.
        total (`torch.Tensor`): G_global, the sum of the gradients of all positions, `(V,)`.
    """

    def __init__(self, counts: torch.Tensor, ids: torch.Tensor, device: torch.device | str = "cpu"):
        vocab_size = len(counts)
        types = len(ids)
        self.counts = counts.to(device)
        self.ids = ids.to(device)
        self.of_types = torch.zeros(types, vocab_size, device=device)
        self.of_matched = torch.zeros_like(self.of_types)
        self.matched_counts = torch.zeros(types, dtype=torch.long, device=device)
        self.squares = torch.zeros(types, dtype=torch.float64, device=device)
        self.balanced = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.balanced)
        self._place = torch.full((vocab_size,), -1, device=device)
        self._place[self.ids] = torch.arange(types, device=device)

    def add(self, token_ids: torch.Tensor, gradients: torch.Tensor, matched: torch.Tensor) -> None:
        """Add positions: their tokens `(N,)`, gradients `(N, V)`, and which of them are matched, bool, `(N,)`."""
        # We sum with matrix products, because they need no weighted copy of the gradients.
        ones = torch.ones(1, len(gradients), device=gradients.device)
        self.total += (ones @ gradients)[0].double()
        shares = 1.0 / self.counts[token_ids].float()
        self.balanced += (shares[None] @ gradients)[0].double()

        places = self._place[token_ids]
        known = places >= 0
        known_places = places[known]
        known_gradients = gradients[known]
        self.of_types.index_add_(0, known_places, known_gradients)
        self.squares.index_add_(0, known_places, known_gradients.square().sum(-1, dtype=torch.float64))

        chosen = known & matched
        matched_places = places[chosen]
        self.of_matched.index_add_(0, matched_places, gradients[chosen])
        self.matched_counts.index_add_(0, matched_places, torch.ones_like(matched_places))

    def measures(self) -> dict[str, np.ndarray]:
        """Return the measures of the types, `(T,)` each; NaN where a type occurs too rarely for one.

        - `count`: positions of the type, n.
        - `norm`: norm of the mean gradient.
        - `norm_unbiased`: root of an unbiased estimate of the squared norm, which noise does not raise; 0 where the
          estimate is negative.
        - `cos_balanced`, `cos_global`: cosine to G_balanced and to G_global.
        - `cos_balanced_without`, `cos_global_without`: the same cosines to sums that leave the type itself out.
        - `contribution`: n x norm x cosine to G_balanced.
        - `matched_count`, `norm_matched`, `cos_matched`: the same from an equal number of positions of each type.
        """
        n = self.counts[self.ids].double()
        matched_n = self.matched_counts.double()
        norm = _norms(self.of_types) / n
        unbiased = ((n * norm).square() - self.squares) / (n * (n - 1))
        # The sum of a type's gradients has the same cosine as their mean.
        cos_balanced = _cosines(self.of_types, self.balanced)
        found = {
            "count": n,
            "norm": norm,
            "norm_unbiased": torch.where(n > 1, unbiased.clamp(min=0).sqrt(), torch.nan),
            "cos_balanced": cos_balanced,
            "cos_global": _cosines(self.of_types, self.total),
            "cos_balanced_without": _cosines(self.of_types, self.balanced, 1.0 / n),
            "cos_global_without": _cosines(self.of_types, self.total, torch.ones_like(n)),
            "contribution": n * norm * cos_balanced,
            "matched_count": matched_n,
            "norm_matched": _norms(self.of_matched) / matched_n,
            "cos_matched": _cosines(self.of_matched, self.balanced),
        }
        return {name: values.cpu().numpy() for name, values in found.items()}


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row, float64; a row at a time, because a float64 copy of all rows may not fit."""
    norms = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for place, row in enumerate(rows):
        norms[place] = row.double().norm()
    return norms


def _cosines(rows: torch.Tensor, vector: torch.Tensor, parts: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine of each row to a vector, NaN where one of them is zero.

    With `parts`, that multiple of the row is first subtracted from the vector.
    """
    cosines = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=rows.device)
    for place, row in enumerate(rows):
        own = row.double()
        other = vector
        if parts is not None:
            other = vector - parts[place] * own

        size = own.norm() * other.norm()
        if size > 0:
            cosines[place] = (own @ other) / size
    return cosines


@torch.no_grad()
def add_rollouts(
    pair: ModelPair,
    sums: GradientSums,
    rollouts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]],
    *,
    pad_id: int,
) -> None:
    """Add the gradients of a batch of stored rollouts to the sums.

    Args:
        pair (`ModelPair`): Student and teacher.
        sums (`GradientSums`): Sums that the gradients are added to.
        rollouts: Token ids of prompt and completion, and which positions of the completion are matched.
        pad_id (`int`): Token that fills the batch.

    Raises:
        `ValueError`: if a model's logits are not finite.
    """
    prompts = []
    completions = []
    flags = []
    for prompt, completion, own_flags in rollouts:
        prompts.append(prompt)
        completions.append(completion)
        flags.extend(own_flags)
    prompt_ids, prompt_mask = pad_token_ids(prompts, pad_id, side="left", device=pair.device)
    completion_ids, completion_mask = pad_token_ids(completions, pad_id, side="right", device=pair.device)
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }
    inputs = locate_loss_positions(batch)

    pair.student.eval()
    with pair.teacher_resident():
        states = pair.hidden_states(inputs)

    device = states.student.device
    token_ids = completion_ids.flatten()[inputs["positions"]].to(device)
    matched = torch.tensor(flags, device=device)
    for rows, student_logits, teacher_logits in logit_chunks(states, temperature=pair.temperature):
        _require_finite(student_logits, "student")
        _require_finite(teacher_logits, "teacher")
        sums.add(token_ids[rows], reverse_kl_gradient(student_logits, teacher_logits), matched[rows])


def _require_finite(logits: torch.Tensor, name: str) -> None:
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"The {name}'s logits are not finite (NaN or infinite): load it in bfloat16 or float32, and check its "
            "weights."
        )


def choose_types(
    counts: np.ndarray, mean_kl: np.ndarray, rocks: Sequence[int], *, most: int, seed: int
) -> dict[str, np.ndarray]:
    """Return the ids of the types in three groups: rocks, rare types of high KL, and up to 100 random other types.

    Rare types occur 2 to 10 times and have a mean KL above the 90 % quantile.

    Args:
        counts (`np.ndarray`): Occurrences, `(V,)`.
        mean_kl (`np.ndarray`): Mean divergence, `(V,)`.
        rocks (`Sequence[int]`): Ids of the rocks; those that do not occur are left out.
        most (`int`): Rare types at most.
        seed (`int`): Seed of the random choice.
    """
    rng = np.random.default_rng(seed)
    present = np.flatnonzero(counts > 0)
    rocks = np.array([id for id in rocks if id < len(counts) and counts[id] > 0], dtype=np.int64)

    high = np.quantile(mean_kl[present], 0.9)
    present_counts = counts[present]
    is_rare = (present_counts >= 2) & (present_counts <= 10) & (mean_kl[present] > high)
    rare = np.setdiff1d(present[is_rare], rocks)
    rare = np.sort(rng.choice(rare, min(most, len(rare)), replace=False))

    rest = np.setdiff1d(present, np.concatenate([rocks, rare]))
    rest = np.sort(rng.choice(rest, min(RANDOM_TYPES, len(rest)), replace=False))
    return {"rock": rocks, "rare": rare, "random": rest}


def matched_rows(token_ids: np.ndarray, ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return a mask of `count` random rows of each type, bool, `(N,)`; all rows of a type that has fewer.

    Args:
        token_ids (`np.ndarray`): Token of each row, `(N,)`.
        ids (`np.ndarray`): Types to choose rows of.
        count (`int`): Rows of each type.
        seed (`int`): Seed of the random choice.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(token_ids), dtype=bool)
    order = np.argsort(token_ids, kind="stable")
    sorted_ids = token_ids[order]
    starts = np.searchsorted(sorted_ids, ids)
    ends = np.searchsorted(sorted_ids, ids, side="right")
    for start, end in zip(starts, ends, strict=True):
        rows = order[start:end]
        if len(rows) > count:
            rows = rng.choice(rows, count, replace=False)
        chosen[rows] = True
    return chosen


def read_rollouts(
    occurrences: Occurrences, prompts: Path
) -> tuple[list[tuple[list[int], slice]], np.ndarray, np.ndarray]:
    """Return the rollouts of a file (token ids of the prompt, rows of the completion), and its `token_id` and `kl`.

    Raises:
        `ValueError`: if a prompt is missing or has no ids, or a rollout lacks some of its positions.
        `OSError`: if there is no file of prompts.
    """
    columns = {name: [] for name in ("rollout", "position", "token_id", "unit", "kl")}
    for batch in occurrences.batches():
        for name, parts in columns.items():
            parts.append(batch[name])
    columns = {name: np.concatenate(parts) for name, parts in columns.items()}
    if not prompts.is_file():
        raise FileNotFoundError(f"There is no {prompts}: the gradients need the prompts that `trl-opd collect` writes.")

    unit = columns["unit"]
    ids_of = read_prompts(prompts)
    known = {int(prompt): ids_of(int(prompt)) for prompt in np.unique(unit)}
    for prompt, ids in known.items():
        if ids and not all(type(id) is int for id in ids):
            raise ValueError(f"{prompts}: prompt {prompt} has a token without an id.")

    rollout = columns["rollout"]
    position = columns["position"]
    is_last = np.append(rollout[1:] != rollout[:-1], True)
    found = []
    start = 0
    for last in np.flatnonzero(is_last).tolist():
        if position[start] != 0 or position[last] != last - start:
            raise ValueError(
                f"Rollout {rollout[start]} of {occurrences.path} is incomplete: its positions must be 0, 1, 2 ... "
                "without a gap. Collect the rollouts again."
            )
        ids = known[int(unit[start])]
        if not ids:
            raise ValueError(
                f"{prompts} has no prompt {unit[start]}, which rollout {rollout[start]} of {occurrences.path} needs: "
                "use the two files of one collection."
            )
        end = last + 1
        found.append((ids, slice(start, end)))
        start = end
    return found, columns["token_id"], columns["kl"]
