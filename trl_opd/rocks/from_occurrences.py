"""Occurrences -> a rock set: scores, cutoff, controls, names, and shares on prompts that did not choose the rocks."""

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
from .controls import mass_matched_controls, with_texts
from .corpus import Corpus, heldout_shares, read_selection, split_units
from .cutoff import LEAST_JACCARD, Sweep, rank_ids, sweep_cutoffs
from .families import family_of
from .recurrence import ContextSettings, TypeStatistics, measure_types
from .rock_set import Rock, RockSet

SCORES, DEFAULT_TOP_K = ("context", "aggregate"), 100


@dataclass(frozen=True)
class Detection:
    """A rock set and how it was found.

    Args:
        rock_set (`RockSet`): The rocks.
        stages (`list[tuple[str, int]]`): What is left after each stage, from all types to the rocks.
        notes (`list[str]`): What the user should know beside.
        sweep (`Sweep`, *optional*): The sweep of the cutoff, where that was asked for.
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
    """Return the rocks of a file of occurrences (arXiv:2605.09253; the settings are this project's).

    One half of the prompts selects, the other half judges. Ties break by id.

    Args:
        path (`str` or `os.PathLike`): `occurrences.parquet`.
        joint (`str` or `os.PathLike`, *optional*):
            A second file, of another student: a type's score is then the smaller of the two.
        score (`str`, *optional*, defaults to `"context"`): "context" for R(v) x CCR(v), "aggregate" for R(v).
        top_k (`int` or `str`, *optional*): Largest number of rocks, at most 100 when omitted; "auto": the stable one.
        settings (`ContextSettings`, *optional*): Parameters of the context filter, and the seed of all that is drawn.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Names the tokens.

    Raises:
        `ValueError`: for a file that is not one of occurrences, settings that leave no type, a tokenizer that does not
            fit.
        `OSError`: if there is no such file.
    """
    settings = settings or ContextSettings()
    files = [Occurrences(name) for name in (path, *([] if joint is None else [joint]))]
    known = _tokenizer(files, tokenizer)
    selecting, judging = split_units(files[0])
    corpora = [read_selection(files[0], selecting), *(read_selection(file, split_units(file)[0]) for file in files[1:])]
    scorer = _Scorer(score, settings, 1 + max(int(corpus.token_id.max()) for corpus in corpora), known["vocab_size"])
    _require_fit(files[0], tokenizer, scorer.vocab_size)
    statistics = scorer.measure(corpora)
    values = scorer.score(statistics)
    order, notes = rank_ids(values), _notes_of(files, corpora)
    sweep = sweep_cutoffs(corpora, scorer, seed=settings.seed) if top_k == "auto" else None
    limit = _limit(top_k, int((statistics[0].count > 0).sum()), sweep, notes)
    stages = _stages(statistics, order, limit, context=score == "context")
    if len(order) == 0:
        raise ValueError(_nothing_left(stages, statistics[0], settings, score))
    notes += [*_notes_on_samples(statistics, settings, tokenizer), *_notes_on_length(len(order), limit)]
    rocks = [_rock(int(id), values, statistics[0], score) for id in order[:limit]]
    method = _method(score, limit, sweep, settings, statistics, joint)
    rock_set = RockSet(rocks, known, _measure(files[0]), method, _corpus(corpora[0], statistics[0]))
    shares = heldout_shares(files[0], judging, order[:limit], settings.seed)
    controls = _controls(rock_set, statistics[0], settings.seed, notes)
    rock_set = replace(rock_set, heldout=shares, controls=controls)
    return Detection(rock_set if tokenizer is None else _named(rock_set, tokenizer), stages, notes, sweep)


@dataclass(frozen=True)
class _Scorer:
    """Corpora of one or two students -> the score of every type.

    Args:
        kind (`str`): "context" or "aggregate".
        settings (`ContextSettings`): Parameters of the filter.
        vocab_size (`int`): Above every id.
        named (`int`, *optional*): Ids that the tokenizer has a token for, where that is known.
    """

    kind: str
    settings: ContextSettings
    vocab_size: int
    named: int | None

    def measure(self, corpora: Sequence[Corpus]) -> list[TypeStatistics]:
        context = self.kind == "context"
        return [measure_types(corpus, self.settings, self.vocab_size, context=context) for corpus in corpora]

    def score(self, statistics: Sequence[TypeStatistics]) -> np.ndarray:
        values = [found.context_score if self.kind == "context" else found.kl_sum for found in statistics]
        least = np.minimum.reduce(values)
        # Rows beyond the tokenizer pad the embedding: nothing could be frozen there.
        least[self.vocab_size if self.named is None else self.named :] = 0
        return least

    def __call__(self, corpora: Sequence[Corpus]) -> np.ndarray:
        return self.score(self.measure(corpora))


def _corpus(corpus: Corpus, statistics: TypeStatistics) -> dict[str, Any]:
    return {
        "rollouts": corpus.rollouts,
        "tokens": len(corpus.token_id),
        "kl_sum": float(statistics.kl_sum.sum()),
    }


def _named(rock_set: RockSet, tokenizer) -> RockSet:
    rock_set = with_texts(rock_set, tokenizer)
    return replace(rock_set, rocks=[replace(rock, family=family_of(rock.text)) for rock in rock_set.rocks])


def _require_fit(file: Occurrences, tokenizer, vocab_size: int) -> None:
    """Raise `ValueError` when a file that names no tokenizer holds ids that the given one does not have."""
    if tokenizer is not None and not file.metadata.get("tokenizer") and vocab_size > len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and {file.path} holds token id {vocab_size - 1}: it is not "
            "the one of these rollouts."
        )


def _limit(top_k: int | str | None, types: int, sweep: Sweep | None, notes: list[str]) -> int:
    if sweep is not None:
        if sweep.top_k is None:
            raise ValueError(
                f"--top_k auto: the {sweep.cutoffs[0]} highest types of {max(sweep.stability)} rollouts overlap with "
                f"those of as many others by {sweep.stability[max(sweep.stability)][0]:.2f} only (wanted: "
                f"{LEAST_JACCARD}): collect more prompts, or name a number."
            )
        return sweep.top_k
    if top_k is None:
        if types < DEFAULT_TOP_K:
            notes.append(f"There are {types} token types only: --top_k {DEFAULT_TOP_K} is cut to that.")
        return min(DEFAULT_TOP_K, types)
    if top_k > types:
        raise ValueError(f"--top_k {top_k} is more than the {types} token types of the half that selects.")
    return top_k


def _stages(
    statistics: Sequence[TypeStatistics], order: np.ndarray, limit: int, *, context: bool
) -> list[tuple[str, int]]:
    stages = [("types in the half of the prompts that selects", int((statistics[0].count > 0).sum()))]
    if context:
        for what, least in (("one", 1), ("two", 2)):
            count = int(np.logical_and.reduce([found.persistent >= least for found in statistics]).sum())
            stages.append((f"with at least {what} persistent occurrence{'s' * (least > 1)}", count))
        stages.append(("with a persistent occurrence in recurring surroundings", len(order)))
    else:
        stages.append(("with a divergence above 0", len(order)))
    return [*stages, ("rocks: the highest scores", min(limit, len(order)))]


def _nothing_left(
    stages: list[tuple[str, int]], statistics: TypeStatistics, settings: ContextSettings, score: str
) -> str:
    left = ", ".join(f"{count} {what}" for what, count in stages[:-1])
    if score == "aggregate":
        return f"No token type is left: {left}."
    taus = f"tau_post {statistics.tau_post:.4g} nats"
    if statistics.tau_pre is not None:
        taus = f"tau_pre {statistics.tau_pre:.4g} and {taus}"
    return (
        f"No token type is left: {left} ({taus}, window {settings.window}, gamma {settings.gamma}, eta "
        f"{settings.eta}): lower the thresholds, or use --score aggregate."
    )


def _rock(id: int, values: np.ndarray, statistics: TypeStatistics, score: str) -> Rock:
    count, context = int(statistics.count[id]), score == "context"
    return Rock(
        id=id,
        text=None,
        count=count,
        mean_kl=float(statistics.kl_sum[id]) / count,
        score=float(values[id]),
        mean_kl_pre=None if statistics.kl_pre_sum is None else float(statistics.kl_pre_sum[id]) / count,
        ccr=float(statistics.ccr[id]) if context else None,
        context_score=float(statistics.context_score[id]) if context else None,
    )


def _method(
    score, limit, sweep: Sweep | None, settings: ContextSettings, statistics: Sequence[TypeStatistics], joint
) -> dict[str, Any]:
    names = ("tau_pre", "tau_post", "window", "gamma", "eta")
    method = {"score": score, "top_k": limit, **dict.fromkeys(names), "half": "even prompts"}
    if sweep is not None:
        method["cutoff"] = "auto"
        stability = {str(size): values for size, values in sweep.stability.items()}  # names in JSON are texts
        method["sweep"] = {"cutoffs": sweep.cutoffs, "coverage": sweep.coverage, "stability": stability}
    if joint is not None:
        method["joint"] = Path(joint).name
    if score == "context":
        method |= {name: getattr(settings, name) for name in names[2:]}
        method |= {"tau_pre": statistics[0].tau_pre, "tau_post": statistics[0].tau_post}
        method |= {"features": "offset and token, weight 1 / offset", "max_occurrences": settings.max_occurrences}
        method |= {"thresholds": {"tau_pre": str(settings.tau_pre), "tau_post": str(settings.tau_post)}}
        method |= {"sampled": statistics[0].sampled.tolist(), "seed": settings.seed}
    return method


def _measure(file: Occurrences) -> dict[str, Any]:
    """Return what the occurrences measured; the temperature of a file that does not say is 1."""
    temperature = file.metadata.get("temperature", 1.0)
    known = {key: file.metadata.get(key) for key in ("student", "reference", "teacher")}
    return {"divergence": "reverse_kl", "temperature": temperature, **known}


def _controls(rock_set: RockSet, statistics: TypeStatistics, seed: int, notes: list[str]):
    stats = TokenStats(len(statistics.count), {"tokenizer": rock_set.tokenizer})
    stats.seen.copy_(torch.from_numpy(statistics.count))
    controls = mass_matched_controls(stats, rock_set, seed)
    if not controls.matched:
        notes.append(
            f"No control has the rocks' token mass: all other types together have {controls.mass_ratio:.0%} of it. "
            "Train with token_weighting='random' beside, or take fewer rocks."
        )
    return controls


def _tokenizer(files: Sequence[Occurrences], tokenizer) -> dict[str, Any]:
    """Return the tokenizer section of the rock set, or raise `ValueError` for one that the ids do not belong to."""
    sections = [file.metadata.get("tokenizer") for file in files]
    sections = [section if isinstance(section, dict) else {} for section in sections]
    prints = [section.get("fingerprint") for section in sections]
    if len(files) > 1 and None not in prints and prints[0] != prints[1]:
        raise ValueError(f"{files[0].path} and {files[1].path} were collected with different tokenizers.")
    section = {key: sections[0].get(key) for key in ("name", "vocab_size", "fingerprint")}
    size = section["vocab_size"]
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"{files[0].path}: its metadata has a tokenizer of vocab_size {size!r}.")
    if tokenizer is None:
        return section
    own = fingerprint(tokenizer)
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if prints[0] not in (None, own):
        raise ValueError(
            f"The tokenizer {name} ({len(tokenizer)} tokens) is not the one of {files[0].path} "
            f"({section['name'] or 'unnamed'}, {size} tokens): its ids name other tokens."
        )
    return {"name": section["name"] or name, "vocab_size": len(tokenizer), "fingerprint": own}


def _notes_of(files: Sequence[Occurrences], corpora: Sequence[Corpus]) -> list[str]:
    notes = []
    if corpora[0].kl_pre is None:
        notes.append("There is no kl_pre: occurrences count as persistent by kl alone, so learned tokens are not told.")
    if len(corpora) > 1:
        tokens = [len(corpus.token_id) for corpus in corpora]
        if max(tokens) > 1.1 * min(tokens):
            notes.append(
                f"The two files differ in size ({tokens[0]} and {tokens[1]} tokens), and so do their scores: the "
                "smaller one decides most ranks."
            )
    return notes


def _notes_on_length(found: int, limit: int) -> list[str]:
    short = f"No more than {found} types have a score above 0: the list is shorter than --top_k {limit}."
    return [short] if found < limit else []


def _notes_on_samples(statistics: Sequence[TypeStatistics], settings: ContextSettings, tokenizer) -> list[str]:
    sampled = statistics[0].sampled
    if len(sampled) == 0:
        return []
    shown = [str(id) if tokenizer is None else repr(tokenizer.decode([id])) for id in sampled[:10].tolist()]
    more = f" and {len(sampled) - 10} more" if len(sampled) > 10 else ""
    return [
        f"Of {len(sampled)} types {settings.max_occurrences} persistent occurrences were compared, a sample: "
        f"{', '.join(shown)}{more}."
    ]
