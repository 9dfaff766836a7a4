"""Sums of the gradient of the reverse KL with respect to the student's logits, by token type.

At one position, with student p and teacher q, the gradient is `g_u = p_u (log p_u - log q_u - KL)` (arXiv:2605.09253).
The sums show whether the positions of a type still push the student in one direction. We keep two vectors for each
chosen type and two for all types together, because the gradients of all positions would not fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..artefacts.occurrences import Occurrences, read_prompts
from ..loss.logits import logit_chunks, reverse_kl_gradient
from ..rollouts.batches import locate_loss_positions, pad_token_ids
from ..training.model_pair import ModelPair

# Maximum number of random types that are neither rocks nor rare.
RANDOM_TYPES = 100


class StoredRollout(NamedTuple):
    """A rollout in a file of occurrences.

    Args:
        prompt (`list[int]`): Token ids of the prompt.
        rows (`slice`): Rows of the file that hold the completion.
    """

    prompt: list[int]
    rows: slice

    @property
    def length(self) -> int:
        """Number of tokens of prompt and completion."""
        return len(self.prompt) + self.rows.stop - self.rows.start


class StoredRollouts(NamedTuple):
    """The rollouts of a file of occurrences, and two of its columns.

    Args:
        rollouts (`list[StoredRollout]`): The rollouts, in the order of the file.
        token_ids (`np.ndarray`): Token id of each row, `(N,)`.
        kl (`np.ndarray`): Divergence at each row, nats, `(N,)`.
    """

    rollouts: list[StoredRollout]
    token_ids: np.ndarray
    kl: np.ndarray


class GradientSums:
    """Sums of the gradients over positions.

    Args:
        counts (`torch.Tensor`): How often each type occurs in all positions that will be added, int64, shape `(V,)`.
        ids (`torch.Tensor`): Types to measure, shape `(T,)`.
        device (`torch.device`): Where the sums are kept.

    Attributes:
        of_types, of_matched (`torch.Tensor`): Sum over all and over the matched positions of each type, `(T, V)`.
        matched_counts (`torch.Tensor`): Number of matched positions of each type, int64, `(T,)`.
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
        """Add positions: their token ids `(N,)`, gradients `(N, V)`, and which of them are matched, bool, `(N,)`."""
        # We sum with matrix products, because a weighted sum would copy the gradients.
        ones = torch.ones(1, len(gradients), device=gradients.device)
        self.total += (ones @ gradients)[0].double()
        shares = 1.0 / self.counts[token_ids].float()
        self.balanced += (shares[None] @ gradients)[0].double()

        places = self._place[token_ids]
        is_known = places >= 0
        known_places = places[is_known]
        known_gradients = gradients[is_known]
        squared_norms = known_gradients.square().sum(-1, dtype=torch.float64)
        self.of_types.index_add_(0, known_places, known_gradients)
        self.squares.index_add_(0, known_places, squared_norms)

        is_matched = is_known & matched
        matched_places = places[is_matched]
        self.of_matched.index_add_(0, matched_places, gradients[is_matched])
        self.matched_counts.index_add_(0, matched_places, torch.ones_like(matched_places))

    def measures(self) -> dict[str, np.ndarray]:
        """Return the measures of the types by name, `(T,)` each; NaN where a type occurs too rarely for a measure.

        - `count`: number of positions of the type, n.
        - `norm`: norm of the mean gradient.
        - `norm_unbiased`: square root of an unbiased estimate of the squared norm, which noise does not increase; 0 if
          the estimate is negative.
        - `cos_balanced`, `cos_global`: cosine to G_balanced and to G_global.
        - `cos_balanced_without`, `cos_global_without`: the same cosines to sums that leave the type itself out.
        - `contribution`: n x norm x cosine to G_balanced.
        - `matched_count`, `norm_matched`, `cos_matched`: the same from an equal number of positions of each type.
        """
        n = self.counts[self.ids].double()
        matched_n = self.matched_counts.double()
        norm = _norms(self.of_types) / n
        size = n * norm
        # The squared norm of the sum, without the part that each gradient adds with itself, over all ordered pairs.
        unbiased_square = (size.square() - self.squares) / (n * (n - 1))
        norm_unbiased = unbiased_square.clamp(min=0).sqrt()
        # The sum of a type's gradients has the same cosine as their mean.
        cos_balanced = _cosines(self.of_types, self.balanced)
        found = {
            "count": n,
            "norm": norm,
            "norm_unbiased": torch.where(n > 1, norm_unbiased, torch.nan),
            "cos_balanced": cos_balanced,
            "cos_global": _cosines(self.of_types, self.total),
            "cos_balanced_without": _cosines(self.of_types, self.balanced, 1.0 / n),
            "cos_global_without": _cosines(self.of_types, self.total, torch.ones_like(n)),
            "contribution": size * cos_balanced,
            "matched_count": matched_n,
            "norm_matched": _norms(self.of_matched) / matched_n,
            "cos_matched": _cosines(self.of_matched, self.balanced),
        }
        return {name: values.cpu().numpy() for name, values in found.items()}


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row, float64, `(T,)`; one row at a time, because float64 needs twice the memory."""
    norms = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for place, row in enumerate(rows):
        norms[place] = row.double().norm()
    return norms


def _cosines(rows: torch.Tensor, vector: torch.Tensor, parts: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine of each row to a vector, float64, `(T,)`; NaN if the row or the vector is zero.

    With `parts`, `(T,)`, the vector is first reduced by that multiple of the row.
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
    *,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[np.ndarray],
    matched: np.ndarray,
    pad_id: int,
) -> None:
    """Add the gradients of a batch of stored rollouts to the sums.

    Args:
        pair (`ModelPair`): Student and teacher.
        sums (`GradientSums`): Sums that the gradients are added to.
        prompts (`Sequence[Sequence[int]]`): Token ids of the prompt of each rollout.
        completions (`Sequence[np.ndarray]`): Token ids of the completion of each rollout.
        matched (`np.ndarray`): Which positions of all completions are matched, bool, `(N,)`.
        pad_id (`int`): Token id that fills the batch.

    Raises:
        `ValueError`: if a model's logits are not finite.
    """
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
    is_matched = torch.from_numpy(matched).to(device)
    for rows, student_logits, teacher_logits in logit_chunks(states, temperature=pair.temperature):
        _require_finite(student_logits, "student")
        _require_finite(teacher_logits, "teacher")
        gradients = reverse_kl_gradient(student_logits, teacher_logits)
        sums.add(token_ids[rows], gradients, is_matched[rows])


def _require_finite(logits: torch.Tensor, name: str) -> None:
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"The {name}'s logits are not finite (NaN or infinite): load the {name} in bfloat16 or float32, and check "
            "its weights."
        )


def choose_types(
    counts: np.ndarray, mean_kl: np.ndarray, rocks: Sequence[int], *, most: int, seed: int
) -> dict[str, np.ndarray]:
    """Return the ids of the types in three groups: "rock", "rare" (of high KL), and up to 100 "random" other types.

    Rare types occur 2 to 10 times, and their mean KL is above the 90 % quantile of all types.

    Args:
        counts (`np.ndarray`): Number of occurrences of each type, `(V,)`.
        mean_kl (`np.ndarray`): Mean divergence of each type, nats, `(V,)`.
        rocks (`Sequence[int]`): Ids of the rocks; those that do not occur are left out.
        most (`int`): Maximum number of rare types.
        seed (`int`): Seed of the random choice.
    """
    rng = np.random.default_rng(seed)
    present = np.flatnonzero(counts)
    # The order of the rocks is their rank, so no set operation may sort them.
    occurring = set(present.tolist())
    rocks = np.array([id for id in rocks if id in occurring], dtype=np.int64)

    present_counts = counts[present]
    present_kl = mean_kl[present]
    has_high_kl = present_kl > np.quantile(present_kl, 0.9)
    is_rare = (present_counts >= 2) & (present_counts <= 10) & has_high_kl
    rare = _draw(rng, np.setdiff1d(present[is_rare], rocks), most)

    others = np.setdiff1d(present, np.concatenate([rocks, rare]))
    return {"rock": rocks, "rare": rare, "random": _draw(rng, others, RANDOM_TYPES)}


def _draw(rng: np.random.Generator, ids: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the ids, chosen at random, in ascending order."""
    return np.sort(rng.choice(ids, min(most, len(ids)), replace=False))


def matched_rows(token_ids: np.ndarray, ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return which rows are chosen if up to `count` random rows of each type are, bool, `(N,)`.

    Args:
        token_ids (`np.ndarray`): Token id of each row, `(N,)`.
        ids (`np.ndarray`): Types whose rows are chosen.
        count (`int`): Number of rows of each type; of a rarer type all rows are chosen.
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


def read_rollouts(occurrences: Occurrences, prompts: Path) -> StoredRollouts:
    """Return the rollouts of a file of occurrences, with their prompts.

    Args:
        occurrences (`Occurrences`): The file.
        prompts (`Path`): The `prompts.parquet` of the same collection.

    Raises:
        `ValueError`: if a prompt is missing or has no ids, or a rollout lacks some of its positions.
        `OSError`: if there is no file of prompts.
    """
    columns = _read_columns(occurrences, ("rollout", "position", "token_id", "unit", "kl"))
    if not prompts.is_file():
        raise FileNotFoundError(
            f"There is no {prompts}, and the gradients need the prompts: use the two files of a folder that "
            "`trl-opd collect` wrote."
        )
    unit = columns["unit"]
    ids_of = read_prompts(prompts)
    known = {}
    for prompt in np.unique(unit).tolist():
        ids = ids_of(prompt)
        if ids and None in ids:
            raise ValueError(
                f"{prompts}: prompt {prompt} has a token without an id (null). Collect the rollouts again."
            )
        known[prompt] = ids

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
        ids = known[unit[start]]
        if not ids:
            raise ValueError(
                f"{prompts} has no prompt {unit[start]}, which rollout {rollout[start]} of {occurrences.path} needs: "
                "use the two files of one collection."
            )
        end = last + 1
        found.append(StoredRollout(prompt=ids, rows=slice(start, end)))
        start = end
    return StoredRollouts(rollouts=found, token_ids=columns["token_id"], kl=columns["kl"])


def _read_columns(occurrences: Occurrences, names: Sequence[str]) -> dict[str, np.ndarray]:
    batches = list(occurrences.batches())
    columns = {}
    for name in names:
        columns[name] = np.concatenate([batch[name] for batch in batches])
    return columns
