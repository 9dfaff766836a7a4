"""Gradients of stored rollouts, compared between rocks, rare types of high divergence and random other types."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from ..artefacts.gradient_table import Study
from ..artefacts.occurrences import Occurrences
from ..rocks.rock_set import RockSet
from ..training.model_pair import ModelPair
from .gradients import GradientSums, StoredRollouts, add_rollouts, choose_types, matched_rows


def study_gradients(
    pair: ModelPair,
    rock_set: RockSet,
    stored: StoredRollouts,
    early: Occurrences | None,
    *,
    matched: int,
    rare: int,
    seed: int,
    batch_size: int,
    pad_id: int,
) -> Study:
    """Return the measures of the rocks, of rare types and of random other types in stored rollouts.

    Args:
        pair (`ModelPair`): Student and teacher.
        rock_set (`RockSet`): The rocks.
        stored (`StoredRollouts`): The rollouts ([`read_rollouts`]).
        early (`Occurrences`, *optional*): Rollouts of the student at an earlier step, to compare divergences with.
        matched (`int`): Number of positions of each type in the comparison with equal numbers.
        rare (`int`): Maximum number of rare types.
        seed (`int`): Seed of the random choice of types and positions.
        batch_size (`int`): Rollouts in a forward pass.
        pad_id (`int`): Token id that fills a batch.

    Raises:
        `ValueError`: if a token id is outside the vocabulary that student and teacher share, no rock occurs in the
            rollouts, or a model's logits are not finite.
    """
    vocab_size = pair.vocab_size
    token_ids = stored.token_ids
    prompt_ids = np.concatenate([rollout.prompt for rollout in stored.rollouts])
    if prompt_ids.min() < 0 or max(prompt_ids.max(), token_ids.max()) >= vocab_size:
        raise ValueError(
            f"The rollouts hold token ids outside the {vocab_size} that student and teacher share: pass the models "
            "that the rollouts were collected with."
        )
    counts = np.bincount(token_ids, minlength=vocab_size)
    mean_kl = np.bincount(token_ids, stored.kl, vocab_size) / np.maximum(counts, 1)
    groups = choose_types(counts, mean_kl, rock_set.ids.tolist(), most=rare, seed=seed)
    if len(groups["rock"]) == 0:
        raise ValueError(
            "No rock of the rock set occurs in these rollouts, so there is nothing to compare: pass rollouts of the "
            "student that the rocks were detected for."
        )

    ids = np.concatenate(list(groups.values()))
    is_matched = matched_rows(token_ids, ids, matched, seed)
    device = pair.student.get_output_embeddings().weight.device
    sums = GradientSums(torch.from_numpy(counts), torch.from_numpy(ids), device)
    _add_all(pair, sums, stored, is_matched, batch_size=batch_size, pad_id=pad_id)

    sizes = [len(types) for types in groups.values()]
    columns = {"token_id": ids, "group": np.repeat(list(groups), sizes), "mean_kl": mean_kl[ids]}
    columns |= sums.measures()
    if early is not None:
        columns["mean_kl_early"] = _mean_divergences(early, ids, vocab_size)
    return Study(columns, matched, has_early=early is not None)


def _add_all(
    pair: ModelPair,
    sums: GradientSums,
    stored: StoredRollouts,
    is_matched: np.ndarray,
    *,
    batch_size: int,
    pad_id: int,
) -> None:
    """Add all rollouts to the sums, the longest first, so a run that lacks memory fails in its first batch."""
    longest_first = sorted(stored.rollouts, key=lambda rollout: rollout.length, reverse=True)
    with tqdm(total=len(longest_first), unit="rollout", desc="gradients") as bar:
        for start in range(0, len(longest_first), batch_size):
            batch = longest_first[start : start + batch_size]
            add_rollouts(
                pair,
                sums,
                prompts=[rollout.prompt for rollout in batch],
                completions=[stored.token_ids[rollout.rows] for rollout in batch],
                matched=np.concatenate([is_matched[rollout.rows] for rollout in batch]),
                pad_id=pad_id,
            )
            bar.update(len(batch))


def _mean_divergences(file: Occurrences, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the mean divergence of some types in a file, nats, `(T,)`; NaN for types that do not occur in it."""
    counts = np.zeros(vocab_size)
    sums = np.zeros(vocab_size)
    for batch in file.batches():
        is_known = batch["token_id"] < vocab_size
        token_ids = batch["token_id"][is_known]
        counts += np.bincount(token_ids, minlength=vocab_size)
        sums += np.bincount(token_ids, batch["kl"][is_known], vocab_size)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a type that does not occur
        return sums[ids] / counts[ids]


class MannWhitney(NamedTuple):
    """Result of the Mann-Whitney test of two groups of types.

    Args:
        share (`float`):
            U / (n1 n2), the share of pairs in which the first group has the higher value; 1/2 means no difference.
        p (`float`): Two-sided p value.
    """

    share: float
    p: float


def mann_whitney(one: np.ndarray, other: np.ndarray) -> MannWhitney | None:
    """Return the Mann-Whitney test of the values of two groups; `None` if one group is empty."""
    pairs = len(one) * len(other)
    if pairs == 0:
        return None
    test = stats.mannwhitneyu(one, other, alternative="two-sided")
    return MannWhitney(share=test.statistic / pairs, p=test.pvalue)


class Wilcoxon(NamedTuple):
    """Result of the Wilcoxon signed-rank test of a group: the mean divergence of its types, early against late.

    Args:
        early, late (`float`): Medians over the types, nats.
        p (`float`): Two-sided p value.
        fallen (`float`): Share of the ranks that belong to types whose divergence fell.
        types (`int`): Number of types that occur both early and late.
    """

    early: float
    late: float
    p: float
    fallen: float
    types: int


def compare_with_early(found: Study, group: str) -> Wilcoxon | None:
    """Return the Wilcoxon test of a group's mean divergence, early against late.

    `None` if fewer than two types occur in both, or no type changed.
    """
    early, late = _early_and_late(found, group)
    if len(early) < 2 or np.array_equal(early, late):
        return None
    test = stats.wilcoxon(early, late)
    change = early - late
    ranks = stats.rankdata(np.abs(change))
    return Wilcoxon(
        early=np.median(early),
        late=np.median(late),
        p=test.pvalue,
        fallen=ranks[change > 0].sum() / ranks.sum(),
        types=len(early),
    )


def divergence_changes(found: Study, group: str) -> np.ndarray:
    """Return by how much the mean divergence of a group's types rose from early to late, nats, `(T,)`."""
    early, late = _early_and_late(found, group)
    return late - early


def _early_and_late(found: Study, group: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the early and the late mean divergence of a group's types that occur in both, nats, `(T,)` each."""
    columns = found.columns
    early = columns["mean_kl_early"]
    is_chosen = (columns["group"] == group) & np.isfinite(early)
    return early[is_chosen], columns["mean_kl"][is_chosen]
