"""Do tokens still teach? The gradient of the reverse KL with respect to the student's logits, summed by token type.

At one position, with p the student and q the teacher, it is `g_u = p_u (log p_u - log q_u - KL)` (arXiv:2605.09253).
Kept are one vector for each type that is looked at and two for all types together, never a matrix of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..artefacts.occurrences import Occurrences, read_prompts
from ..loss.logits import logit_chunks, reverse_kl_gradient
from ..rollouts.batches import locate_loss_positions
from ..training.model_pair import ModelPair


class GradientSums:
    """Sums of the gradients over positions.

    Args:
        counts (`torch.Tensor`): How often each type occurs in all rows that will be added, int64, shape `(V,)`.
        ids (`torch.Tensor`): Types that are looked at, shape `(T,)`.
        device (`torch.device`): Where the sums are kept.

    Attributes:
        of_types, of_matched (`torch.Tensor`): Sum over all and over the matched positions of each type, `(T, V)`.
        squares (`torch.Tensor`): Sum of the squared norms, float64, `(T,)`.
        balanced (`torch.Tensor`): G_balanced: every type's mean, once, `(V,)`.
        total (`torch.Tensor`): G_global: every position, once, `(V,)`.
    """

    def __init__(self, counts: torch.Tensor, ids: torch.Tensor, device: torch.device | str = "cpu"):
        vocab_size = len(counts)
        self.counts, self.ids = counts.to(device), ids.to(device)
        self.of_types, self.of_matched = (torch.zeros(len(ids), vocab_size, device=device) for _ in range(2))
        self.matched_counts = torch.zeros(len(ids), dtype=torch.long, device=device)
        self.squares = torch.zeros(len(ids), dtype=torch.float64, device=device)
        self.balanced, self.total = (torch.zeros(vocab_size, dtype=torch.float64, device=device) for _ in range(2))
        self._place = torch.full((vocab_size,), -1, device=device)
        self._place[self.ids] = torch.arange(len(ids), device=device)

    def add(self, token_ids: torch.Tensor, gradients: torch.Tensor, matched: torch.Tensor) -> None:
        """Add positions: their tokens `(N,)`, gradients `(N, V)`, and which of them are matched, bool, `(N,)`."""
        # Products with the gradients sum them without a copy.
        self.total += (torch.ones(1, len(gradients), device=gradients.device) @ gradients)[0].double()
        self.balanced += ((1.0 / self.counts[token_ids].float())[None] @ gradients)[0].double()
        places = self._place[token_ids]
        for sums, chosen in ((self.of_types, places >= 0), (self.of_matched, (places >= 0) & matched)):
            sums.index_add_(0, places[chosen], gradients[chosen])
        known = places >= 0
        self.squares.index_add_(0, places[known], gradients[known].square().sum(-1, dtype=torch.float64))
        self.matched_counts.index_add_(0, places[known & matched], torch.ones_like(places[known & matched]))

    def measures(self) -> dict[str, np.ndarray]:
        """Return the measures of the types, `(T,)` each; NaN where a type occurs too rarely for one.

        `norm` of the mean gradient; `norm_unbiased`, the root of an estimate of its square that noise does not raise
        (0 where that is negative); cosines to G_balanced and G_global, with and without the type itself in them;
        `contribution` n x norm x cosine to G_balanced; `norm_matched` and `cos_matched` from equally many positions.
        """
        n, few = self.counts[self.ids].double(), self.matched_counts.double()
        norm = _norms(self.of_types) / n
        unbiased = ((n * norm).square() - self.squares) / (n * (n - 1))
        balanced = _cosines(self.of_types, self.balanced)  # of a mean and of a sum they are the same
        found = {
            "count": n,
            "norm": norm,
            "norm_unbiased": torch.where(n > 1, unbiased.clamp(min=0).sqrt(), torch.nan),
            "cos_balanced": balanced,
            "cos_global": _cosines(self.of_types, self.total),
            "cos_balanced_without": _cosines(self.of_types, self.balanced, 1.0 / n),
            "cos_global_without": _cosines(self.of_types, self.total, torch.ones_like(n)),
            "contribution": n * norm * balanced,
            "matched_count": few,
            "norm_matched": _norms(self.of_matched) / few,
            "cos_matched": _cosines(self.of_matched, self.balanced),
        }
        return {name: values.cpu().numpy() for name, values in found.items()}


def _norms(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.double().norm() for row in rows]) if len(rows) else torch.zeros(0, dtype=torch.float64)


def _cosines(rows: torch.Tensor, vector: torch.Tensor, parts: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine of each row to a vector, less a part of the row itself; a row at a time, without a copy."""
    found = []
    for place, row in enumerate(rows):
        own = row.double()
        other = vector if parts is None else vector - parts[place] * own
        size = own.norm() * other.norm()
        found.append((own @ other) / size if size > 0 else torch.full_like(size, torch.nan))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def add_rollouts(
    pair: ModelPair,
    sums: GradientSums,
    rollouts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]],
    *,
    pad_id: int,
) -> None:
    """Add the gradients of stored rollouts, a batch of them.

    Args:
        pair (`ModelPair`): Student and teacher.
        sums (`GradientSums`): What they are added to.
        rollouts: Token ids of prompt and completion, and which positions of the completion are matched.
        pad_id (`int`): Token that fills the batch.

    Raises:
        `ValueError`: where the logits of a model are not finite.
    """
    inputs = locate_loss_positions(_padded(rollouts, pad_id, pair.device))
    pair.student.eval()
    with pair.teacher_resident():
        states = pair.hidden_states(inputs)
    device = states.student.device
    token_ids = inputs["completion_ids"].flatten()[inputs["positions"]].to(device)
    matched = torch.tensor([flag for *_, flags in rollouts for flag in flags], device=device)
    for rows, student_logits, teacher_logits in logit_chunks(states, temperature=pair.temperature):
        for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
            if not torch.isfinite(logits).all():
                raise ValueError(
                    f"The {name}'s logits are not finite (NaN or infinite): load it in bfloat16 or float32, and check "
                    "its weights."
                )
        sums.add(token_ids[rows], reverse_kl_gradient(student_logits, teacher_logits), matched[rows])


def _padded(rollouts, pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return rollouts as the trainer has them: prompts padded on the left, completions on the right."""
    width, length = (max(len(rollout[place]) for rollout in rollouts) for place in (0, 1))
    batch = {}
    for name, place, size in (("prompt", 0, width), ("completion", 1, length)):
        rows = [list(rollout[place]) for rollout in rollouts]
        fill = [size - len(row) for row in rows]
        left = name == "prompt"
        pairs = list(zip(rows, fill, strict=True))
        ids = [[pad_id] * count + row if left else row + [pad_id] * count for row, count in pairs]
        mask = [[0] * count + [1] * len(row) if left else [1] * len(row) + [0] * count for row, count in pairs]
        batch[f"{name}_ids"] = torch.tensor(ids, device=device)
        batch[f"{name}_mask"] = torch.tensor(mask, device=device)
    return batch


def choose_types(
    counts: np.ndarray, mean_kl: np.ndarray, rocks: Sequence[int], *, most: int, seed: int
) -> dict[str, np.ndarray]:
    """Return the types of the three groups: rocks, rare high-KL types, and a random rest of a hundred.

    Args:
        counts (`np.ndarray`): Occurrences, `(V,)`.
        mean_kl (`np.ndarray`): Mean divergence, `(V,)`.
        rocks (`Sequence[int]`): The rocks.
        most (`int`): Rare types at most.
        seed (`int`): Of what is drawn.
    """
    rng, present = np.random.default_rng(seed), np.flatnonzero(counts > 0)
    rocks = np.array([id for id in rocks if id < len(counts) and counts[id] > 0], dtype=np.int64)
    high = np.quantile(mean_kl[present], 0.9)
    rare = present[(counts[present] >= 2) & (counts[present] <= 10) & (mean_kl[present] > high)]
    rare = np.setdiff1d(rare, rocks)
    rare = np.sort(rng.choice(rare, min(most, len(rare)), replace=False))
    rest = np.setdiff1d(present, np.concatenate([rocks, rare]))
    return {"rock": rocks, "rare": rare, "random": np.sort(rng.choice(rest, min(100, len(rest)), replace=False))}


def matched_rows(token_ids: np.ndarray, ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return which rows are among `count` drawn of their type, bool, `(N,)`; all of a rarer type's rows are."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(token_ids), dtype=bool)
    order = np.argsort(token_ids, kind="stable")
    starts = np.searchsorted(token_ids[order], ids)
    ends = np.searchsorted(token_ids[order], ids, side="right")
    for start, end in zip(starts, ends, strict=True):
        rows = order[start:end]
        chosen[rng.choice(rows, count, replace=False) if len(rows) > count else rows] = True
    return chosen


def read_rollouts(
    occurrences: Occurrences, prompts: Path
) -> tuple[list[tuple[list[int], slice]], np.ndarray, np.ndarray]:
    """Return the rollouts of a file (prompt's ids, rows of the completion), and the columns `token_id` and `kl`.

    Raises:
        `ValueError`: if the prompts are missing, or a completion is not there as a whole.
        `OSError`: if there is no file of prompts.
    """
    columns = {name: [] for name in ("rollout", "position", "token_id", "unit", "kl")}
    for batch in occurrences.batches():
        for name, parts in columns.items():
            parts.append(batch[name])
    rollout, position, token_id, unit, kl = (np.concatenate(parts) for parts in columns.values())
    if not prompts.is_file():
        raise FileNotFoundError(f"There is no {prompts}: the gradients need the prompts that `trl-opd collect` writes.")
    ids_of = read_prompts(prompts)
    known = {int(prompt): ids_of(int(prompt)) for prompt in np.unique(unit)}
    if wrong := [prompt for prompt, ids in known.items() if not all(type(id) is int for id in ids or [])]:
        raise ValueError(f"{prompts}: prompt {wrong[0]} has a token without an id.")
    starts = np.flatnonzero(np.concatenate([[True], rollout[1:] != rollout[:-1]]))
    found = []
    for start, end in zip(starts, [*starts[1:], len(rollout)], strict=True):
        if position[start] != 0 or position[end - 1] != end - start - 1:
            raise ValueError(
                f"Rollout {rollout[start]} of {occurrences.path} is not there as a whole: positions go 0, 1, 2 ..."
            )
        if not known.get(int(unit[start])):
            raise ValueError(f"{prompts} has no prompt {unit[start]}, which rollout {rollout[start]} goes on from.")
        found.append((known[int(unit[start])], slice(int(start), int(end))))
    return found, token_id, kl
