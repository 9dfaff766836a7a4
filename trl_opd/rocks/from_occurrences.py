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
from .cutoff import LEAST_JACCARD, Sweep, rank_ids, sweep_cutoffs
from .families import family_of
from .recurrence import ContextSettings, TypeStatistics, measure_types
from .rock_set import Controls, Rock, RockSet

DEFAULT_TOP_K = 100


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
        `ValueError`: if the file does not hold valid occurrences, the settings leave no type, or the tokenizer is not
            the one of the rollouts.
        `OSError`: if a file does not exist.
    """
    settings = settings or ContextSettings()
    context = score == "context"

    files = [Occurrences(path)]
    if joint is not None:
        files.append(Occurrences(joint))
    known = _tokenizer_of(files, tokenizer)

    corpora, judging = _read_halves(files)
    scorer = _scorer_for(corpora, settings, context, known["vocab_size"])
    if tokenizer is not None:
        _require_fit(files[0], tokenizer, scorer.vocab_size)
    statistics = scorer.measure(corpora)
    first = statistics[0]
    values = scorer.score(statistics)
    order = rank_ids(values)

    sweep = sweep_cutoffs(corpora, scorer, seed=settings.seed) if top_k == "auto" else None
    limit = _limit(top_k, first.types, sweep)
    chosen = order[:limit]
    stages = _stages(statistics, len(order), len(chosen), context=context)
    if len(order) == 0:
        raise ValueError(_nothing_left(stages, first, settings, context=context))

    rock_set = RockSet(
        rocks=[_rock(id, values, first, context=context) for id in chosen.tolist()],
        tokenizer=known,
        measure=_measure(files[0]),
        method=_method(score, limit, sweep, settings, first, joint),
        corpus=_corpus(corpora[0], first),
        heldout=heldout_shares(files[0], judging, chosen, settings.seed),
    )
    rock_set = replace(rock_set, controls=_controls(rock_set, first.count, settings.seed))
    if tokenizer is not None:
        rock_set = _named(rock_set, tokenizer)

    notes = _notes_on_files(corpora)
    if top_k is None and limit < DEFAULT_TOP_K:
        notes.append(f"There are {limit} token types only: --top_k {DEFAULT_TOP_K} is cut to that.")
    notes += _notes_on_samples(first.sampled, settings, tokenizer)
    notes += _notes_on_result(rock_set.controls, scored=len(order), limit=limit)
    return Detection(rock_set=rock_set, stages=stages, notes=notes, sweep=sweep)


def _read_halves(files: Sequence[Occurrences]) -> tuple[list[Corpus], np.ndarray]:
    """Return the selecting half of every file, and the prompts of the first file's other half."""
    corpora = []
    held_out = []
    for file in files:
        selecting, judging = split_units(file)
        corpora.append(read_selection(file, selecting))
        held_out.append(judging)
    return corpora, held_out[0]


@dataclass(frozen=True)
class _Scorer:
    """Function from the corpora of one or two students to the score of every type, `(V,)`.

    Args:
        context (`bool`): Whether the score is R(v) x CCR(v) instead of R(v).
        settings (`ContextSettings`): Parameters of the context filter.
        vocab_size (`int`): V; above every id.
        named (`int`): Number of ids, from 0, that have a token; the rows from there on only pad the embedding.
    """

    context: bool
    settings: ContextSettings
    vocab_size: int
    named: int

    def measure(self, corpora: Sequence[Corpus]) -> list[TypeStatistics]:
        return [measure_types(corpus, self.settings, self.vocab_size, context=self.context) for corpus in corpora]

    def score(self, statistics: Sequence[TypeStatistics]) -> np.ndarray:
        name = "context_score" if self.context else "kl_sum"
        least = np.minimum.reduce([getattr(found, name) for found in statistics])
        # Padding rows of the embedding have no token, so freezing them would do nothing.
        least[self.named :] = 0
        return least

    def __call__(self, corpora: Sequence[Corpus]) -> np.ndarray:
        return self.score(self.measure(corpora))


def _scorer_for(corpora: Sequence[Corpus], settings: ContextSettings, context: bool, named: int | None) -> _Scorer:
    largest = max(corpus.token_id.max() for corpus in corpora)
    vocab_size = 1 + int(largest)
    if named is None:
        named = vocab_size
    return _Scorer(context=context, settings=settings, vocab_size=vocab_size, named=named)


def _corpus(corpus: Corpus, statistics: TypeStatistics) -> dict[str, Any]:
    return {
        "rollouts": corpus.rollouts,
        "tokens": len(corpus.token_id),
        "kl_sum": float(statistics.kl_sum.sum()),
    }


def _named(rock_set: RockSet, tokenizer) -> RockSet:
    rock_set = with_texts(rock_set, tokenizer)
    rocks = [replace(rock, family=family_of(rock.text)) for rock in rock_set.rocks]
    return replace(rock_set, rocks=rocks)


def _require_fit(file: Occurrences, tokenizer, vocab_size: int) -> None:
    """Raise `ValueError` when a file that does not name its tokenizer holds ids that `tokenizer` does not have."""
    if not file.metadata.get("tokenizer") and vocab_size > len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and {file.path} holds token id {vocab_size - 1}: it is not "
            "the one of these rollouts. Pass the tokenizer of the student that wrote them."
        )


def _limit(top_k: int | str | None, types: int, sweep: Sweep | None) -> int:
    """Return the largest number of rocks, or raise `ValueError` if no cutoff is stable or there are fewer types."""
    if sweep is not None:
        if sweep.top_k is None:
            size = max(sweep.stability)
            overlap = sweep.stability[size][0]
            raise ValueError(
                f"--top_k auto found no stable cutoff: the {sweep.cutoffs[0]} highest types of {size} rollouts overlap "
                f"by only {overlap:.2f} (Jaccard) with those of {size} other rollouts, and {LEAST_JACCARD} is needed. "
                "Collect more prompts, or pass a number as --top_k."
            )
        return sweep.top_k

    if top_k is None:
        return min(DEFAULT_TOP_K, types)
    if top_k > types:
        raise ValueError(
            f"--top_k {top_k} is more than the {types} token types in the half of the prompts that selects rocks. Pass "
            "a smaller number, or collect more prompts."
        )
    return top_k


def _stages(statistics: Sequence[TypeStatistics], scored: int, rocks: int, *, context: bool) -> list[tuple[str, int]]:
    stages = [("types in the half of the prompts that selects", statistics[0].types)]
    if context:
        # With two files a type must have the occurrences in both.
        persistent = np.minimum.reduce([found.persistent for found in statistics])
        one = int((persistent >= 1).sum())
        two = int((persistent >= 2).sum())
        stages.append(("with at least one persistent occurrence", one))
        stages.append(("with at least two persistent occurrences", two))
        stages.append(("with a persistent occurrence in recurring surroundings", scored))
    else:
        stages.append(("with a divergence above 0", scored))

    stages.append(("rocks: the highest scores", rocks))
    return stages


def _nothing_left(
    stages: list[tuple[str, int]], statistics: TypeStatistics, settings: ContextSettings, *, context: bool
) -> str:
    left = ", ".join(f"{count} {what}" for what, count in stages[:-1])
    if not context:
        return f"No token type is left: {left}. Check that the occurrences compare two different models."

    taus = f"tau_post {statistics.tau_post:.4g} nats"
    if statistics.tau_pre is not None:
        taus = f"tau_pre {statistics.tau_pre:.4g} and {taus}"
    return (
        f"No token type is left: {left} ({taus}, window {settings.window}, gamma {settings.gamma}, eta "
        f"{settings.eta}). Lower the thresholds, or use --score aggregate."
    )


def _rock(id: int, values: np.ndarray, statistics: TypeStatistics, *, context: bool) -> Rock:
    count = int(statistics.count[id])
    rock = Rock(
        id=id,
        text=None,
        count=count,
        mean_kl=float(statistics.kl_sum[id]) / count,
        score=float(values[id]),
    )
    if statistics.kl_pre_sum is not None:
        rock = replace(rock, mean_kl_pre=float(statistics.kl_pre_sum[id]) / count)
    if context:
        rock = replace(rock, ccr=float(statistics.ccr[id]), context_score=float(statistics.context_score[id]))
    return rock


def _method(
    score: str,
    limit: int,
    sweep: Sweep | None,
    settings: ContextSettings,
    statistics: TypeStatistics,
    joint: str | os.PathLike | None,
) -> dict[str, Any]:
    context = score == "context"
    method = {
        "score": score,
        "top_k": limit,
        "tau_pre": statistics.tau_pre,
        "tau_post": statistics.tau_post,
        "window": settings.window if context else None,
        "gamma": settings.gamma if context else None,
        "eta": settings.eta if context else None,
        "half": "even prompts",
    }
    if sweep is not None:
        method["cutoff"] = "auto"
        # JSON allows only strings as names.
        stability = {str(size): values for size, values in sweep.stability.items()}
        method["sweep"] = {"cutoffs": sweep.cutoffs, "coverage": sweep.coverage, "stability": stability}
    if joint is not None:
        method["joint"] = Path(joint).name
    if context:
        method["features"] = "offset and token, weight 1 / offset"
        method["max_occurrences"] = settings.max_occurrences
        method["thresholds"] = {"tau_pre": str(settings.tau_pre), "tau_post": str(settings.tau_post)}
        method["sampled"] = statistics.sampled.tolist()
        method["seed"] = settings.seed
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


def _tokenizer_of(files: Sequence[Occurrences], tokenizer) -> dict[str, Any]:
    """Return the tokenizer section of the rock set, or raise `ValueError` if the ids belong to another tokenizer."""
    sections = []
    for file in files:
        section = file.metadata.get("tokenizer")
        sections.append(tokenizer_section(section if isinstance(section, dict) else None))

    section = sections[0]
    size = section["vocab_size"]
    recorded = section["fingerprint"]
    other = sections[-1]["fingerprint"]
    if recorded is not None and other is not None and recorded != other:
        raise ValueError(
            f"{files[0].path} and {files[1].path} were collected with different tokenizers, so the same id means "
            "different tokens. Collect both with one tokenizer."
        )
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f"{files[0].path}: its metadata has a tokenizer of vocab_size {size!r}, which is not a whole number of at "
            "least 1. Correct the metadata, or collect the occurrences again."
        )
    if tokenizer is None:
        return section

    own = fingerprint(tokenizer)
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if recorded not in (None, own):
        raise ValueError(
            f"The tokenizer {name} ({len(tokenizer)} tokens) is not the one of {files[0].path} "
            f"({section['name'] or 'unnamed'}, {size} tokens): its ids name other tokens. Pass the tokenizer that the "
            "occurrences were collected with."
        )
    return {"name": section["name"] or name, "vocab_size": len(tokenizer), "fingerprint": own}


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
    if len(sampled) == 0:
        return []
    shown = []
    for id in sampled[:10].tolist():
        name = str(id) if tokenizer is None else repr(tokenizer.decode([id]))
        shown.append(name)
    text = ", ".join(shown)
    if len(sampled) > 10:
        text += f" and {len(sampled) - 10} more"
    return [
        f"Of {len(sampled)} types {settings.max_occurrences} persistent occurrences were compared, a sample: {text}."
    ]


def _notes_on_result(controls: Controls, *, scored: int, limit: int) -> list[str]:
    notes = []
    if scored < limit:
        notes.append(f"No more than {scored} types have a score above 0: the list is shorter than --top_k {limit}.")
    if not controls.matched:
        notes.append(
            f"No set of controls has the rocks' token mass: all other types together have {controls.mass_ratio:.0%} of "
            "it. Also train with token_weighting='random', or take fewer rocks."
        )
    return notes
