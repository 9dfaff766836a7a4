"""Gradients of stored rollouts by group of token types: rocks, rare types of high divergence, a random rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from ..artefacts.gradient_table import Study
from ..artefacts.occurrences import Occurrences
from ..rocks.rock_set import RockSet
from ..training.model_pair import ModelPair
from .gradients import GradientSums, add_rollouts, choose_types, matched_rows


def study_gradients(
    pair: ModelPair,
    rock_set: RockSet,
    rollouts: tuple[Sequence[tuple[list[int], slice]], np.ndarray, np.ndarray],
    early: Occurrences | None,
    *,
    matched: int,
    rare: int,
    seed: int,
    batch_size: int,
    pad_id: int,
) -> Study:
    """Return the measures of the types in stored rollouts.

    Args:
        pair (`ModelPair`): Student and teacher.
        rock_set (`RockSet`): The rocks.
        rollouts: Prompts and rows, `token_id` and `kl`, as [`read_rollouts`] returns them.
        early (`Occurrences`, *optional*): Of an earlier student.
        matched (`int`): Positions of each type in the groups of equal number.
        rare (`int`): Rare types at most.
        seed (`int`): Of what is drawn.
        batch_size (`int`): Rollouts of a forward.
        pad_id (`int`): Token that fills a batch.

    Raises:
        `ValueError`: if a token is outside of what student and teacher share, or no rock occurs.
    """
    pairs, token_ids, kl = rollouts
    vocab_size = pair.vocab_size
    largest = max(int(token_ids.max()), *(max(prompt) for prompt, _ in pairs))
    if largest >= vocab_size or min(min(prompt) for prompt, _ in pairs) < 0:
        raise ValueError(f"The rollouts hold ids outside of the {vocab_size} that the two models share.")
    counts = np.bincount(token_ids, minlength=vocab_size)
    mean_kl = np.bincount(token_ids, kl, vocab_size) / np.maximum(counts, 1)
    groups = choose_types(counts, mean_kl, rock_set.ids.tolist(), most=rare, seed=seed)
    if len(groups["rock"]) == 0:
        raise ValueError("No rock occurs in these rollouts, so there is nothing to compare.")

    ids = np.concatenate(list(groups.values()))
    flags = matched_rows(token_ids, ids, matched, seed)
    device = pair.student.get_output_embeddings().weight.device
    sums = GradientSums(torch.from_numpy(counts), torch.from_numpy(ids), device)
    _add_all(pair, sums, pairs, token_ids, flags, batch_size=batch_size, pad_id=pad_id)

    columns = {"token_id": ids, "group": np.repeat(list(groups), [len(part) for part in groups.values()])}
    columns |= {"mean_kl": mean_kl[ids], **sums.measures()}
    if early is not None:
        columns["mean_kl_early"] = _means(early, ids, vocab_size)
    return Study(columns, matched, early is not None)


def _add_all(
    pair: ModelPair,
    sums: GradientSums,
    rollouts: Sequence[tuple[list[int], slice]],
    token_ids: np.ndarray,
    flags: np.ndarray,
    *,
    batch_size: int,
    pad_id: int,
) -> None:
    """Add all rollouts, the longest first."""
    longest_first = sorted(rollouts, key=lambda rollout: -(len(rollout[0]) + rollout[1].stop - rollout[1].start))
    with tqdm(total=len(rollouts), unit="rollout", desc="gradients") as bar:
        for start in range(0, len(rollouts), batch_size):
            chosen = longest_first[start : start + batch_size]
            batch = [(prompt, token_ids[rows].tolist(), flags[rows].tolist()) for prompt, rows in chosen]
            add_rollouts(pair, sums, batch, pad_id=pad_id)
            bar.update(len(chosen))


def _means(file: Occurrences, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the mean divergence of types in a file, NaN where they do not occur."""
    counts, sums = np.zeros(vocab_size), np.zeros(vocab_size)
    for batch in file.batches():
        inside = batch["token_id"] < vocab_size
        counts += np.bincount(batch["token_id"][inside], minlength=vocab_size)
        sums += np.bincount(batch["token_id"][inside], batch["kl"][inside], vocab_size)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)[ids]


class MannWhitney(NamedTuple):
    """Mann and Whitney's test of two groups of types.

    Args:
        share (`float`): U / (n1 n2), the share of pairs in which the first group is higher; 1/2 is no difference.
        p (`float`): Two-sided p value.
    """

    share: float
    p: float


def mann_whitney(one: np.ndarray, other: np.ndarray) -> MannWhitney | None:
    """Return Mann and Whitney's test of two groups; `None` where one is empty."""
    if not len(one) or not len(other):
        return None
    test = stats.mannwhitneyu(one, other, alternative="two-sided")
    return MannWhitney(share=test.statistic / (len(one) * len(other)), p=test.pvalue)


class Wilcoxon(NamedTuple):
    """Wilcoxon's signed-rank test of the mean divergence of a group's types, early against late.

    Args:
        early, late (`float`): Medians over the types, nats.
        p (`float`): Two-sided p value.
        fallen (`float`): Share of the ranks that belong to types whose divergence fell.
        types (`int`): Number of types that occur in both.
    """

    early: float
    late: float
    p: float
    fallen: float
    types: int


def compare_with_early(found: Study, group: str) -> Wilcoxon | None:
    """Return Wilcoxon's test of a group's mean divergence, early against late; `None` for too few types."""
    chosen = (found.columns["group"] == group) & np.isfinite(found.columns["mean_kl_early"])
    early = found.columns["mean_kl_early"][chosen]
    late = found.columns["mean_kl"][chosen]
    if len(early) < 2 or not (early != late).any():
        return None
    test = stats.wilcoxon(early, late)
    ranks = stats.rankdata(np.abs(early - late))
    rank_sum = len(early) * (len(early) + 1) / 2
    return Wilcoxon(
        early=np.median(early),
        late=np.median(late),
        p=test.pvalue,
        fallen=ranks[early > late].sum() / rank_sum,
        types=len(early),
    )


def divergence_changes(found: Study, group: str) -> np.ndarray:
    """Return by how much the mean divergence of a group's types rose from early to late, nats, `(T,)`."""
    change = found.columns["mean_kl"] - found.columns["mean_kl_early"]
    change = change[found.columns["group"] == group]
    return change[np.isfinite(change)]
