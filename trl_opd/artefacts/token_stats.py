"""TokenStats: sums of divergence and entropy per vocabulary entry, from which rocks are chosen.

Sums travel, means are for display: any split of the data, merged in any order, gives the same statistics. No interval
comes from them alone, because the tokens of one rollout are not independent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .atomic import complete_file
from .run_files import TOKEN_STATS_FILE

FORMAT = "trl_opd.token_stats"
VERSION = 1
COUNTS = ("seen", "count")
SUMS = ("kl_sum", "kl_sq_sum", "entropy_sum")
# Ten times the statistics of a vocabulary of 262 144: a larger file is a mistake.
MAX_BYTES = 100 * 2**20
# Windows that end after this share of a run are its last quarter.
LAST_QUARTER = 0.75


class MeasuredTokens(Protocol):
    """What is known of `N` emitted tokens, a tensor `(N,)` each; [`TokenSignals`] has it."""

    token_ids: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor


class TokenStats:
    """Sums per vocabulary entry over the positions of a loss mask.

    `seen` counts every position, `count` and the sums those that were measured: a frozen position is not, in steps that
    do not log. The mean divergence of type v is `kl_sum[v] / count[v]`, and `R(v) = kl_sum[v] / count[v] * seen[v]`
    its part of the whole (arXiv:2605.09253, stage A).

    Args:
        vocab_size (`int`): Vocabulary entries V that student and teacher share.
        measure (`dict`):
            What was measured: `divergence` ("forward_kl", "reverse_kl" or "jsd"), `beta`, `temperature`, `dropout`,
            `student`, `teacher`, `tokenizer`. Statistics of unequal measures do not merge.
        device (`torch.device`, *optional*, defaults to the CPU): Where the sums are kept; it needs float64.

    Attributes:
        seen (`torch.Tensor`): Positions, int64, shape `(V,)`.
        count (`torch.Tensor`): Measured positions, int64, shape `(V,)`.
        kl_sum (`torch.Tensor`): Sum of the divergence, nats, float64, shape `(V,)`.
        kl_sq_sum (`torch.Tensor`): Sum of its square, float64, shape `(V,)`.
        entropy_sum (`torch.Tensor`): Sum of the student's entropy, nats, float64, shape `(V,)`.

    Example:

    ```python
    >>> stats = TokenStats(4, {"divergence": "reverse_kl", "temperature": 1.0})
    >>> ids, divergence = torch.tensor([3, 1, 3]), torch.tensor([0.5, float("nan"), 1.5])
    >>> stats.update(TokenSignals(ids, divergence, torch.ones(3), torch.tensor([1.0, 0.0, 1.0])))
    >>> stats.seen.tolist(), stats.count.tolist(), stats.kl_sum.tolist()
    ([0, 1, 0, 2], [0, 0, 0, 2], [0.0, 0.0, 0.0, 2.0])
    ```
    """

    def __init__(self, vocab_size: int, measure: Mapping[str, Any], device: torch.device | str = "cpu"):
        if vocab_size < 1:
            raise ValueError(f"vocab_size counts vocabulary entries, at least 1, got {vocab_size}.")
        self.measure = _plain(measure)
        self.seen, self.count = (torch.zeros(vocab_size, dtype=torch.int64, device=device) for _ in COUNTS)
        self.kl_sum, self.kl_sq_sum, self.entropy_sum = (
            torch.zeros(vocab_size, dtype=torch.float64, device=device) for _ in SUMS
        )

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary entries."""
        return len(self.seen)

    @property
    def mean_kl(self) -> torch.Tensor:
        """Mean divergence of each type, nats, float64, shape `(V,)`; NaN for a type that was never measured."""
        return self.kl_sum / self.count

    def update(self, signals: MeasuredTokens) -> None:
        """Add `N` positions; those whose divergence is NaN count as seen and not as measured.

        Needs no synchronisation with the device.

        Raises:
            `ValueError`: if the tensors of the signals differ in length or, on the CPU, an id is no entry.
        """
        ids = signals.token_ids
        divergence = signals.divergence
        entropy = signals.entropy
        if not ids.shape == divergence.shape == entropy.shape or ids.ndim != 1:
            raise ValueError(
                f"token_ids, divergence and entropy must have one shape (N,), got {tuple(ids.shape)}, "
                f"{tuple(divergence.shape)} and {tuple(entropy.shape)}."
            )
        if ids.device.type == "cpu" and len(ids):  # on a GPU this check would wait for the device
            least = int(ids.min())
            largest = int(ids.max())
            if least < 0 or largest >= self.vocab_size:
                raise ValueError(f"token_ids must lie in 0..{self.vocab_size - 1}, got {least}..{largest}.")
        ids = ids.to(self.seen.device, torch.int64)
        measured = ~divergence.isnan()
        self.seen.index_add_(0, ids, torch.ones_like(ids))
        self.count.index_add_(0, ids, measured.to(self.count))
        divergence = divergence.detach().where(measured, 0.0).to(self.kl_sum)
        self.kl_sum.index_add_(0, ids, divergence)
        self.kl_sq_sum.index_add_(0, ids, divergence.square())
        self.entropy_sum.index_add_(0, ids, entropy.detach().where(measured, 0.0).to(self.entropy_sum))

    def merge(self, other: TokenStats) -> TokenStats:
        """Add the sums of other positions to these, and return these.

        Raises:
            `ValueError`: if the two measured different things, or have vocabularies of different size.
        """
        if self.vocab_size != other.vocab_size:
            raise ValueError(
                f"Statistics of {self.vocab_size} and of {other.vocab_size} vocabulary entries do not merge."
            )
        require_same_measure(self.measure, other.measure)
        for name in (*COUNTS, *SUMS):
            mine = getattr(self, name)
            mine += getattr(other, name).to(mine.device)
        return self

    def copy(self) -> TokenStats:
        """Return a copy on the CPU that shares no memory with these statistics."""
        return TokenStats(self.vocab_size, self.measure).merge(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file; it appears under its name only when it is complete.

        Raises:
            `ValueError`: if a sum is not finite.
        """
        tensors = {name: getattr(self, name).cpu().contiguous() for name in (*COUNTS, *SUMS)}
        _check(tensors)
        metadata = {"format": FORMAT, "version": str(VERSION), "measure": json.dumps(self.measure)}
        with complete_file(path) as part:
            part.write_bytes(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenStats:
        """Return the statistics of a file, or of a checkpoint folder's `token_stats.safetensors`.

        Raises:
            `ValueError`: if the file holds no statistics of a known version, with the file and the reason.
            `OSError`: if there is no such file.
        """
        path = Path(path)
        if path.is_dir():
            path = path / TOKEN_STATS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"There are no token statistics at {path}; a run with token_statistics=True writes them into its "
                "checkpoints."
            )
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, at most {MAX_BYTES} are read")
            return _read(path)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not token statistics: {str(error) or type(error).__name__:.250}") from error


def merge_last_quarter(windows: Sequence[tuple[int, Path]]) -> tuple[TokenStats, int]:
    """Return the statistics of the last quarter of a run, and the step after which it begins.

    Windows of 10 steps to step 80 give those of steps 61 to 80, and 60.

    Args:
        windows (`Sequence[tuple[int, Path]]`): Last step and file of each window, in order, at least one.

    Raises:
        `ValueError`: if a file holds no statistics, or those of another measure than the last one.
        `OSError`: if there is no such file.
    """
    end, last_path = windows[-1]
    merged = TokenStats.load(last_path).copy()
    first = len(windows) - 1
    for place, (step, path) in enumerate(windows[:-1]):
        if step > LAST_QUARTER * end:
            first = min(first, place)
            merged.merge(load_matching(path, merged))
    start = windows[first - 1][0] if first > 0 else 0
    return merged, start


def load_matching(path: Path, last: TokenStats, *, ignore: tuple[str, ...] = ()) -> TokenStats:
    """Return the statistics of a window of a run, which measured what the last window did.

    Args:
        path (`Path`): File of the window.
        last (`TokenStats`): Statistics of the last window.
        ignore (`tuple[str, ...]`, *optional*): Keys of the measure that may differ.

    Raises:
        `ValueError`: if it holds no statistics, or those of another measure or vocabulary.
        `OSError`: if there is no such file.
    """
    stats = TokenStats.load(path)
    try:
        require_same_measure(stats.measure, last.measure, ignore=ignore)
    except ValueError as error:
        raise ValueError(f"{path} and the last checkpoint's: {error}") from error
    if stats.vocab_size != last.vocab_size:
        raise ValueError(
            f"{path} is of {stats.vocab_size} vocabulary entries, the last checkpoint's of {last.vocab_size}."
        )
    return stats


def require_same_measure(first: Mapping[str, Any], second: Mapping[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` with the first key that two measures disagree in, apart from those to ignore."""
    for key in sorted({*first, *second} - {*ignore}):
        pair = [json.dumps(measure[key]) if key in measure else "not there" for measure in (first, second)]
        if pair[0] != pair[1]:
            raise ValueError(
                f"Statistics of different measures do not go together: {key} is {pair[0]:.200} and {pair[1]:.200}."
            )


def _plain(measure: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a measure, as a file that stores it would give it back."""
    if not isinstance(measure, Mapping) or not all(isinstance(key, str) for key in measure):
        raise ValueError("measure must be a dictionary of names.")
    try:
        return json.loads(json.dumps(dict(measure), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"measure must hold text and finite numbers only: {error}.") from error


def _read(path: Path) -> TokenStats:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f'its "format" is not "{FORMAT}"')
        if metadata.get("version") != str(VERSION):
            raise ValueError(f"version {metadata.get('version')!r:.40}, this trl_opd reads version {VERSION}")
        if set(file.keys()) != {*COUNTS, *SUMS}:
            raise ValueError(f"it must hold {', '.join((*COUNTS, *SUMS))} and nothing else")
        tensors = {name: file.get_tensor(name) for name in (*COUNTS, *SUMS)}
    measure = json.loads(metadata.get("measure", "null"))
    if not isinstance(measure, dict):
        raise ValueError("its measure is not an object")
    _check(tensors)
    stats = TokenStats(len(tensors["seen"]), measure)
    for name, tensor in tensors.items():
        setattr(stats, name, tensor)
    return stats


def _check(tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless these can be the sums of some positions."""
    size = tensors["seen"].numel()
    for name, tensor in tensors.items():
        dtype = torch.int64 if name in COUNTS else torch.float64
        if tensor.dtype != dtype or tensor.shape != (size,) or not size:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {dtype} of one shape (V,)")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    seen = tensors["seen"]
    count = tensors["count"]
    if (count < 0).any() or (count > seen).any() or seen.double().sum() >= 2**62:
        raise ValueError("count must lie between 0 and seen, and seen must be a number of positions")
    if any(tensors[name][count == 0].any() for name in SUMS):
        raise ValueError("a type that was never measured has sums")
    if (tensors["kl_sq_sum"] < 0).any():
        raise ValueError("kl_sq_sum is negative")
