"""RockSet: the token types that did not converge, with their statistics, their controls and their origin.

The file is JSON in the format `trl_opd.rock_set`, version 1. It may come from another program, so `load` checks it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

from ..artefacts import json_checks
from ..artefacts.atomic import complete_file
from ..artefacts.fingerprint import fingerprint
from ..artefacts.hub import hub_errors
from ..artefacts.run_files import LABELS, ROCK_SET_FILE

if TYPE_CHECKING:
    import torch
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedTokenizerBase

FORMAT = "trl_opd.rock_set"
VERSION = 1
# A larger file raises an error before it is read: it is a mistake, because a rock set of 300 types has 100 kB.
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Rock:
    """A token type that did not converge; `count`, `mean_kl` (nats) and `score` are those of the selection half."""

    id: int
    text: str | None
    count: int
    mean_kl: float
    score: float
    mean_kl_pre: float | None = None
    ccr: float | None = None
    context_score: float | None = None
    family: str | None = None
    role: str | None = None
    role_uncorrected: str | None = None


@dataclass(frozen=True)
class Controls:
    """Token types that are not rocks; `mass_ratio` is their number of occurrences divided by that of the rocks."""

    ids: list[int]
    mass_ratio: float
    matched: bool
    seed: int | None = None
    texts: list[str | None] | None = None


@dataclass(frozen=True)
class RockSet:
    """Rocks in rank order, with the method and the rollouts that they were found with.

    Args:
        rocks (`list[Rock]`): The rocks, highest score first.
        tokenizer (`dict`):
            `name`, `vocab_size` and `fingerprint` of the tokenizer that the ids belong to; `None` if unknown.
        measure (`dict`): `divergence` and `temperature` that the rocks were measured with.
        method (`dict`): `score`, `top_k` and the thresholds that the rocks were chosen by.
        corpus (`dict`): `rollouts`, `tokens` and `kl_sum` of the rollouts that the rocks were chosen from.
        controls (`Controls`, *optional*): Mass-matched controls.
        heldout (`dict`, *optional*): `token_share` and `kl_share` on rollouts that the rocks were not chosen from.
    """

    rocks: list[Rock]
    tokenizer: dict[str, Any]
    measure: dict[str, Any]
    method: dict[str, Any]
    corpus: dict[str, Any]
    controls: Controls | None = None
    heldout: dict[str, float] | None = None

    @property
    def ids(self) -> torch.Tensor:
        """Ids of the rocks in rank order, int64, shape `(K,)`."""
        import torch

        return torch.tensor([rock.id for rock in self.rocks], dtype=torch.long)

    @property
    def token_share(self) -> float:
        """Share of the corpus's tokens that are rocks: the sum of their `count` / `corpus.tokens`."""
        rock_tokens = sum(rock.count for rock in self.rocks)
        return rock_tokens / max(self.corpus["tokens"], 1)

    @classmethod
    def load(cls, path_or_repo: str | os.PathLike) -> RockSet:
        """Return the rock set in a file, or in the `rock_set.json` of a folder or of a Hub repository.

        Raises:
            `ValueError`: if the file is not a rock set of a known version; the message names the file and the reason.
            `OSError`: if the file or repository does not exist, or the Hub cannot be reached.
        """
        path = _find(path_or_repo)
        what = "a rock set"
        content = json_checks.read_json(
            path, what, format=FORMAT, version=VERSION, max_bytes=MAX_BYTES, made_by="trl-opd detect"
        )
        with json_checks.name_file_in_errors(path, what):
            return _parse(content)

    def save(self, path: str | os.PathLike) -> None:
        """Write the rock set as JSON; the file appears under its name only when it is complete."""
        text = self._json()
        with complete_file(path) as part:
            part.write_text(text, encoding="utf-8")

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> CommitInfo:
        """Upload the rock set to a Hub repository, from which `load` reads it, and return the client's commit.

        Args:
            repo_id (`str`): `"user/name"` of a model repository, which is created if it does not exist.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str`, *optional*): Token with write access; defaults to HF_TOKEN or the one of `hf auth login`.
            commit_message (`str`, *optional*): Defaults to the client's message, which names the file.

        Raises:
            `ValueError`: if `load` could not read the set; in this case nothing is uploaded.
            `OSError`: if the Hub rejects the upload or cannot be reached.
        """
        content = self._json().encode()
        from huggingface_hub import HfApi

        with hub_errors(f"push the rock set to {repo_id}"):
            api = HfApi(token=token, library_name="trl_opd")
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            # The id that the Hub returns also has the user's name if `repo_id` does not.
            return api.upload_file(
                path_or_fileobj=content, path_in_repo=ROCK_SET_FILE, repo_id=repo.repo_id, commit_message=commit_message
            )

    def _json(self) -> str:
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        controls = content["controls"]
        if controls is not None:
            # An unknown seed and unknown texts are left out of the file; its format has no null for them.
            content["controls"] = {key: value for key, value in controls.items() if value is not None}
        _parse(content)
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def check(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """Raise `ValueError` unless the ids of this set mean the same tokens for `tokenizer`.

        A set that does not name its tokenizer, and one from a tokenizer that differs only by added tokens, are accepted
        with a warning.

        Args:
            tokenizer (`transformers.PreTrainedTokenizerBase`): The student's tokenizer.
            vocab_size (`int`): Number of ids that student and teacher share; a larger or equal id is an error.
        """
        texts = self._texts()
        outside = [id for id in texts if id >= vocab_size]
        if outside:
            raise ValueError(
                f"The rock set contains token id {outside[0]}, but student and teacher share only {vocab_size} ids. "
                "Detect rocks with this student and teacher."
            )

        name = tokenizer_name(tokenizer)
        known = self.tokenizer.get("fingerprint")
        size = self.tokenizer.get("vocab_size")
        source = f"tokenizer {self.tokenizer.get('name') or '(unnamed)'} of {size} tokens"
        both = f"The rock set was made with {source}, but the student has {name} of {len(tokenizer)} tokens"
        if known is None and size in (None, len(tokenizer)):
            warnings.warn(
                f"The rock set does not record which tokenizer its ids belong to ({source}): they are taken as those "
                f"of {name}.",
                stacklevel=2,
            )
        elif known is None or known != fingerprint(tokenizer):
            if known is None or not _only_tokens_added(texts, size, tokenizer):
                raise ValueError(f"{both}, so the ids name other tokens. Detect rocks with the student's tokenizer.")
            warnings.warn(
                f"{both}; the tokenizers differ only by added tokens, so the rocks are used as they are.", stacklevel=2
            )

    def _texts(self) -> dict[int, str | None]:
        """Return the text of every rock and control by its id; `None` if it is not known."""
        texts = {rock.id: rock.text for rock in self.rocks}
        if self.controls is not None:
            texts |= dict.fromkeys(self.controls.ids)
            if self.controls.texts:
                texts |= zip(self.controls.ids, self.controls.texts, strict=True)
        return texts


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name or path that a tokenizer was loaded from, or the name of its class."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _only_tokens_added(texts: dict[int, str | None], size: int | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has at least `size` tokens and all these ids have the same known texts in it."""
    if size is None or size > len(tokenizer):
        return False
    for id, text in texts.items():
        # A text is decoded, or written as in the vocabulary.
        spellings = (tokenizer.decode([id]), tokenizer.convert_ids_to_tokens(id))
        if text is None or text not in spellings:
            return False
    return True


def _find(path_or_repo: str | os.PathLike) -> Path:
    """Return the path of the file, which is downloaded if the argument is the name of a Hub repository."""
    path = Path(path_or_repo)
    is_folder = path.is_dir()
    if is_folder:
        path = path / ROCK_SET_FILE
    if path.is_file():
        return path
    if is_folder or not _names_repository(str(path_or_repo)):
        raise FileNotFoundError(
            f"No rock set at {path}: there is no such file, and it is not the name of a Hub repository."
        )
    from huggingface_hub import hf_hub_download

    with hub_errors(f"load the rock set {path_or_repo}, which is no file or folder here, from the Hub"):
        downloaded = hf_hub_download(str(path_or_repo), ROCK_SET_FILE)
        return Path(downloaded)


def _names_repository(text: str) -> bool:
    """Return whether a text has the form of a Hub repository's name, "user/name", and not that of a path."""
    owner, _, name = text.partition("/")
    if owner in ("", ".", "..") or name == "":
        return False
    return "/" not in name and not name.endswith(".json")


def _parse(content: dict[str, Any]) -> RockSet:
    """Return the rock set that parsed JSON describes, or raise `ValueError` with the reason alone."""
    tokenizer = json_checks.section(
        content,
        "tokenizer",
        {"name": json_checks.text, "vocab_size": json_checks.whole, "fingerprint": json_checks.text},
        null=True,
    )
    rocks = [_rock(entry, place) for place, entry in enumerate(json_checks.entries(content, "rocks"))]
    controls = _controls(content.get("controls"))
    _check_ids([rock.id for rock in rocks], controls.ids if controls else [], tokenizer["vocab_size"])

    heldout = content.get("heldout")
    if heldout is not None:
        heldout = json_checks.section(
            content, "heldout", {"token_share": json_checks.number, "kl_share": json_checks.number}
        )
    measure = json_checks.section(
        content, "measure", {"divergence": json_checks.text, "temperature": json_checks.number}
    )
    method = json_checks.section(content, "method", {"score": json_checks.text, "top_k": json_checks.whole})
    thresholds = ("tau_pre", "tau_post", "window", "gamma", "eta")
    json_checks.require(method, dict.fromkeys(thresholds, json_checks.number), "method", null=True)
    corpus = json_checks.section(content, "corpus", {"tokens": json_checks.whole, "kl_sum": json_checks.number})
    corpus.setdefault("rollouts", None)
    json_checks.require(corpus, {"rollouts": json_checks.whole}, "corpus", null=True)
    return RockSet(
        rocks=rocks,
        tokenizer=tokenizer,
        measure=measure,
        method=method,
        corpus=corpus,
        controls=controls,
        heldout=heldout,
    )


def _rock(entry: Any, place: int) -> Rock:
    where = f"rocks[{place}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object")
    required = {
        "id": json_checks.whole,
        "count": json_checks.whole,
        "mean_kl": json_checks.number,
        "score": json_checks.number,
    }
    json_checks.require(entry, required, where)
    optional = {
        "text": json_checks.text,
        "mean_kl_pre": json_checks.number,
        "ccr": json_checks.number,
        "context_score": json_checks.number,
        "family": json_checks.text,
        "role": json_checks.text,
        "role_uncorrected": json_checks.text,
    }
    json_checks.require(entry, optional, where, null=True)
    for name in ("role", "role_uncorrected"):
        if entry.get(name) not in (None, *LABELS):
            raise ValueError(
                f"{where}.{name} is {json_checks.short(entry[name])}, known are {', '.join(LABELS)} and null"
            )
    return Rock(**{f.name: entry.get(f.name) for f in fields(Rock)})


def _controls(section: Any) -> Controls | None:
    if section is None:
        return None
    if not isinstance(section, dict):
        raise ValueError("controls is not an object")
    json_checks.require(section, {"mass_ratio": json_checks.number, "matched": json_checks.truth}, "controls")
    json_checks.require(section, {"seed": json_checks.whole}, "controls", null=True)
    ids = json_checks.entries(section, "ids", "controls.")
    for place, id in enumerate(ids):
        json_checks.whole(id, f"controls.ids[{place}]")

    texts = section.get("texts")
    if texts is not None:
        if not isinstance(texts, list) or len(texts) != len(ids):
            raise ValueError("controls.texts is not a list as long as controls.ids")
        for place, text in enumerate(texts):
            if text is not None:
                json_checks.text(text, f"controls.texts[{place}]")
    return Controls(
        ids=list(ids),
        mass_ratio=section["mass_ratio"],
        matched=section["matched"],
        seed=section.get("seed"),
        texts=texts,
    )


def _check_ids(rocks: Sequence[int], controls: Sequence[int], vocab_size: int | None) -> None:
    # Ids of an unknown vocabulary must fit in the int32 columns of this project's files.
    limit = 2**31 if vocab_size is None else vocab_size
    _check_list(rocks, "rocks", limit)
    _check_list(controls, "controls", limit)
    both = set(rocks).intersection(controls)
    if both:
        raise ValueError(f"token id {min(both)} is a rock and a control")


def _check_list(ids: Sequence[int], where: str, limit: int) -> None:
    if len(set(ids)) < len(ids):
        raise ValueError(f"token id {mode(ids)} occurs twice in {where}")
    outside = [id for id in ids if id >= limit]
    if outside:
        raise ValueError(f"token id {outside[0]} in {where} is outside the vocabulary of {limit}")
