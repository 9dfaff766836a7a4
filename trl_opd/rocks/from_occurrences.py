"""Detection of rocks in a file of occurrences: scores, cutoff, controls, token names and held-out shares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..artefacts.fingerprint import fingerprint
from ..artefacts.occurrences import Occurrences
from ..artefacts.token_stats import TokenStats
from .controls import mass_matched_controls, tokenizer_section, with_texts
from .corpus import Corpus, heldout_shares, read_selection, split_units
from .cutoff import Sweep
from .families import family_of
from .ranking import DEFAULT_TOP_K, Ranking, rank_types, scorer_for
from .recurrence import ContextSettings, TypeStatistics
from .rock_set import Controls, Rock, RockSet, tokenizer_name


@dataclass(frozen=True)
class Detection:
    """A rock set and how it was found.

    Args:
        rock_set (`RockSet`): The rocks.
        stages (`list[tuple[str, int]]`): Number of types left after each stage, from all types to the rocks.
        notes (`list[str]`): Remarks that the user should read before trusting the rocks.
        sweep (`Sweep`, *optional*): The sweep of the cutoff, for `top_k="auto"` only.
    """

    rock_set: RockSet
    stages: list[tuple[str, int]]
    notes: list[str]
    sweep: Sweep | None


def detect_from_occurrences(
    path: str | os.PathLike,
    *,
    joint: str | os.PathLike | None = None,
    score: str = "context",
    top_k: int | str | None = None,
    settings: ContextSettings | None = None,
    tokenizer=None,
) -> Detection:
    """Return the rocks in a file of occurrences (arXiv:2605.09253; the default settings are this project's).

    One half of the prompts selects the rocks, the other half measures their held-out shares. Ties break by id.

    Args:
        path (`str` or `os.PathLike`): `occurrences.parquet`.
        joint (`str` or `os.PathLike`, *optional*):
            Occurrences of another student: a type's score is then the smaller of its two scores.
        score (`str`, *optional*, defaults to `"context"`): "context" for R(v) x CCR(v), "aggregate" for R(v).
        top_k (`int` or `str`, *optional*):
            Largest number of rocks, or "auto" for the largest stable number. 100 by default, or all types if there are
            fewer.
        settings (`ContextSettings`, *optional*): Parameters of the context filter, and the seed of every random draw.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Decodes the ids to texts.

    Raises:
        `ValueError`: if the file does not contain valid occurrences, the settings leave no type, or the tokenizer is
            not the one of the rollouts.
        `OSError`: if a file does not exist.
    """
    settings = settings or ContextSettings()
    files = [Occurrences(path)]
    if joint is not None:
        files.append(Occurrences(joint))
    known_tokenizer = _tokenizer_of(files, tokenizer)

    corpora, held_out = _read_halves(files)
    scorer = scorer_for(corpora, settings, context=score == "context", named=known_tokenizer["vocab_size"])
    if tokenizer is not None:
        _require_fit(files[0], tokenizer, scorer.vocab_size)
    ranking = rank_types(corpora, scorer, top_k)

    rock_set = RockSet(
        rocks=[_rock(id, ranking) for id in ranking.rocks.tolist()],
        tokenizer=known_tokenizer,
        measure=_measure(files[0]),
        method=_method(score, ranking, settings, joint),
        corpus=_corpus(corpora[0], ranking.first),
        heldout=heldout_shares(files[0], held_out, ranking.rocks, settings.seed),
    )
    controls = _controls(rock_set, ranking.first.count, settings.seed)
    rock_set = replace(rock_set, controls=controls)
    if tokenizer is not None:
        rock_set = _named(rock_set, tokenizer)

    notes = _notes_on_files(corpora)
    if top_k is None and ranking.limit < DEFAULT_TOP_K:
        notes.append(f"There are only {ranking.limit} token types, so --top_k {DEFAULT_TOP_K} is lowered to that.")
    notes += _notes_on_samples(ranking.first.sampled, settings, tokenizer)
    notes += _notes_on_result(controls, ranking)
    return Detection(rock_set=rock_set, stages=ranking.stages, notes=notes, sweep=ranking.sweep)


def _read_halves(files: Sequence[Occurrences]) -> tuple[list[Corpus], np.ndarray]:
    """Return the selecting half of every file, and the held-out prompts of the first file."""
    corpora = []
    held_out = []
    for file in files:
        selecting, others = split_units(file)
        corpora.append(read_selection(file, selecting))
        held_out.append(others)
    return corpora, held_out[0]


def _rock(id: int, ranking: Ranking) -> Rock:
    statistics = ranking.first
    count = int(statistics.count[id])
    rock = Rock(
        id=id,
        text=None,
        count=count,
        mean_kl=float(statistics.kl_sum[id]) / count,
        score=float(ranking.scores[id]),
    )
    if statistics.kl_pre_sum is not None:
        rock = replace(rock, mean_kl_pre=float(statistics.kl_pre_sum[id]) / count)
    if ranking.context:
        rock = replace(rock, ccr=float(statistics.ccr[id]), context_score=float(statistics.context_score[id]))
    return rock


def _corpus(corpus: Corpus, statistics: TypeStatistics) -> dict[str, Any]:
    return {
        "rollouts": corpus.rollouts,
        "tokens": len(corpus.token_id),
        "kl_sum": float(statistics.kl_sum.sum()),
    }


def _method(score: str, ranking: Ranking, settings: ContextSettings, joint: str | os.PathLike | None) -> dict[str, Any]:
    context = ranking.context
    statistics = ranking.first
    method = {
        "score": score,
        "top_k": ranking.limit,
        "tau_pre": statistics.tau_pre,
        "tau_post": statistics.tau_post,
        "window": settings.window if context else None,
        "gamma": settings.gamma if context else None,
        "eta": settings.eta if context else None,
        "half": "even prompts",
    }
    sweep = ranking.sweep
    if sweep is not None:
        # JSON allows only strings as names.
        stability = {str(size): overlaps for size, overlaps in sweep.stability.items()}
        method["cutoff"] = "auto"
        method["sweep"] = {"cutoffs": sweep.cutoffs, "coverage": sweep.coverage, "stability": stability}
    if joint is not None:
        method["joint"] = Path(joint).name
    if context:
        method |= {
            "features": "offset and token, weight 1 / offset",
            "max_occurrences": settings.max_occurrences,
            "thresholds": {"tau_pre": str(settings.tau_pre), "tau_post": str(settings.tau_post)},
            "sampled": statistics.sampled.tolist(),
            "seed": settings.seed,
        }
    return method


def _measure(file: Occurrences) -> dict[str, Any]:
    """Return what was measured in the occurrences; the temperature defaults to 1 if the file does not record it."""
    return {
        "divergence": "reverse_kl",
        "temperature": file.metadata.get("temperature", 1.0),
        "student": file.metadata.get("student"),
        "reference": file.metadata.get("reference"),
        "teacher": file.metadata.get("teacher"),
    }


def _controls(rock_set: RockSet, count: np.ndarray, seed: int) -> Controls:
    stats = TokenStats(len(count), {"tokenizer": rock_set.tokenizer})
    stats.seen.copy_(torch.from_numpy(count))
    return mass_matched_controls(stats, rock_set, seed)


def _named(rock_set: RockSet, tokenizer) -> RockSet:
    """Return the rock set with the texts of all rocks and controls and the families of the rocks."""
    rock_set = with_texts(rock_set, tokenizer)
    rocks = [replace(rock, family=family_of(rock.text)) for rock in rock_set.rocks]
    return replace(rock_set, rocks=rocks)


def _require_fit(file: Occurrences, tokenizer, vocab_size: int) -> None:
    """Raise `ValueError` if a file that does not name its tokenizer contains ids that `tokenizer` does not have."""
    if not file.metadata.get("tokenizer") and vocab_size > len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but {file.path} contains token id {vocab_size - 1}, so it is "
            "not the tokenizer of these rollouts. Pass the tokenizer of the student that wrote them."
        )


def _tokenizer_of(files: Sequence[Occurrences], tokenizer) -> dict[str, Any]:
    """Return the tokenizer section of the rock set, or raise `ValueError` if the ids belong to another tokenizer."""
    path = files[0].path
    recorded = _recorded_tokenizer(files[0])
    recorded_fingerprint = recorded["fingerprint"]
    if len(files) > 1:
        other_fingerprint = _recorded_tokenizer(files[1])["fingerprint"]
        if recorded_fingerprint not in (None, other_fingerprint) and other_fingerprint is not None:
            raise ValueError(
                f"{path} and {files[1].path} were collected with different tokenizers, so the same id means different "
                "tokens. Collect both with one tokenizer."
            )
    size = recorded["vocab_size"]
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(
            f"{path}: its metadata has a tokenizer of vocab_size {size!r}, which is not a whole number of at least 1. "
            "Correct the metadata, or collect the occurrences again."
        )
    if tokenizer is None:
        return recorded

    own_fingerprint = fingerprint(tokenizer)
    name = tokenizer_name(tokenizer)
    if recorded_fingerprint not in (None, own_fingerprint):
        raise ValueError(
            f"The tokenizer {name} ({len(tokenizer)} tokens) is not the one of {path} "
            f"({recorded['name'] or 'unnamed'}, {size} tokens), so its ids name other tokens. Pass the tokenizer that "
            "the occurrences were collected with."
        )
    return {"name": recorded["name"] or name, "vocab_size": len(tokenizer), "fingerprint": own_fingerprint}


def _recorded_tokenizer(file: Occurrences) -> dict[str, Any]:
    """Return the tokenizer section in the metadata of a file; its entries are `None` if there is none."""
    section = file.metadata.get("tokenizer")
    return tokenizer_section(section if isinstance(section, dict) else None)


def _notes_on_files(corpora: Sequence[Corpus]) -> list[str]:
    notes = []
    if corpora[0].kl_pre is None:
        notes.append(
            "There is no kl_pre: occurrences count as persistent by kl alone, so tokens that the student has learned "
            "cannot be distinguished from unlearned ones."
        )
    tokens = [len(corpus.token_id) for corpus in corpora]
    if max(tokens) > 1.1 * min(tokens):
        notes.append(
            f"The two files differ in size ({tokens[0]} and {tokens[1]} tokens), and so do their scores: the "
            "smaller one decides most ranks."
        )
    return notes


def _notes_on_samples(sampled: np.ndarray, settings: ContextSettings, tokenizer) -> list[str]:
    count = len(sampled)
    if count == 0:
        return []
    shown = []
    for id in sampled[:10].tolist():
        name = str(id) if tokenizer is None else repr(tokenizer.decode([id]))
        shown.append(name)
    text = ", ".join(shown)
    if count > 10:
        text += f" and {count - 10} more"
    return [
        f"Only a sample of {settings.max_occurrences} persistent occurrences was compared for each of {count} "
        f"types: {text}."
    ]


def _notes_on_result(controls: Controls, ranking: Ranking) -> list[str]:
    notes = []
    scored = len(ranking.order)
    limit = ranking.limit
    if scored < limit:
        notes.append(f"Only {scored} types have a score above 0, so the list is shorter than --top_k {limit}.")
    if not controls.matched:
        notes.append(
            f"No set of controls has the rocks' token mass: all other types together have {controls.mass_ratio:.0%} of "
            "it. Also train with token_weighting='random', or take fewer rocks."
        )
    return notes
