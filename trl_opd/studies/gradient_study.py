"""Gradients of stored rollouts by group of token types: rocks, rare types of high divergence, a random rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from ..artefacts.gradient_table import GROUPS, MEDIANS, Study
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


def lines(found: Study) -> list[str]:
    """Return the table of groups and the tests between them."""
    text = [f"{'medians of types':<16}{'types':>7}" + "".join(f"{head:>15}" for head in MEDIANS.values())]
    for group, name in GROUPS.items():
        cells = "".join(f"{_median(found.of(group, column)):>15}" for column in MEDIANS)
        text.append(f"{name:<16}{(found.columns['group'] == group).sum():>7}{cells}")
    text += [
        f"Norms of the mean gradient of the logits; cosines to G_balanced; equal n: {found.matched} positions each.",
        "No intervals: positions of a rollout are not independent. Rocks against rare types (Mann-Whitney, U / n1 n2):",
    ]
    for name, what in (("norm", "norm, as published"), ("norm_unbiased", "unbiased norm"), ("norm_matched", "equal n")):
        text.append(f"  {what:<20} {_mann_whitney(found.of('rock', name), found.of('rare', name))}")
    if found.has_early:
        text += ["Mean KL, early to late (medians; Wilcoxon):", *(_change(found, group) for group in GROUPS)]
        changes = [_changes(found, group) for group in ("rock", "rare")]
        text.append(f"  change, rocks against rare (Mann-Whitney): {_mann_whitney(*changes)}")
    return text


def _median(values: np.ndarray) -> str:
    return f"{np.median(values):.4g}" if len(values) else "-"


def _mann_whitney(one: np.ndarray, other: np.ndarray) -> str:
    if not len(one) or not len(other):
        return "not compared: a group is empty"
    test = stats.mannwhitneyu(one, other, alternative="two-sided")
    return f"{test.statistic / (len(one) * len(other)):.2f} (1/2 is no difference), p = {test.pvalue:.2g}"


def _changes(found: Study, group: str) -> np.ndarray:
    change = (found.columns["mean_kl"] - found.columns["mean_kl_early"])[found.columns["group"] == group]
    return change[np.isfinite(change)]


def _change(found: Study, group: str) -> str:
    chosen = (found.columns["group"] == group) & np.isfinite(found.columns["mean_kl_early"])
    early, late = found.columns["mean_kl_early"][chosen], found.columns["mean_kl"][chosen]
    if len(early) < 2 or not (early != late).any():
        return f"  {GROUPS[group]:<20} too few types"
    test = stats.wilcoxon(early, late)
    pairs = len(early) * (len(early) + 1) / 2
    fallen = stats.rankdata(np.abs(early - late))[early > late].sum() / pairs
    return (
        f"  {GROUPS[group]:<20} {np.median(early):.3g} -> {np.median(late):.3g}, p = {test.pvalue:.2g}, share of ranks "
        f"that fell {fallen:.2f}, {len(early)} types"
    )
