"""TokenStats: sums of divergence and entropy per vocabulary entry, from which rocks are chosen.

We store sums and derive means from them, so that any split of the data, merged in any order, gives the same statistics.
They are not enough for confidence intervals, because the tokens of one rollout are not independent.
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
NAMES = COUNTS + SUMS
# Ten times the size of the statistics for a vocabulary of 262 144 entries; a larger file is a mistake.
MAX_BYTES = 100 * 2**20
# Windows that end after this share of a run belong to its last quarter.
LAST_QUARTER = 0.75


class MeasuredTokens(Protocol):
    """Measurements of `N` emitted tokens, tensors of shape `(N,)`; [`TokenSignals`] has these attributes."""

    token_ids: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor


class TokenStats:
    """Sums per vocabulary entry over the positions of a loss mask.

    `seen` counts every position. `count` and the sums cover only measured positions; a frozen position is not measured
    in steps that do not log. The mean divergence of type v is `kl_sum[v] / count[v]`, and
    `R(v) = kl_sum[v] / count[v] * seen[v]` estimates its sum over all positions (arXiv:2605.09253, stage A).

    Args:
        vocab_size (`int`): Number V of vocabulary entries that student and teacher share.
        measure (`dict`):
            What was measured: `divergence` ("forward_kl", "reverse_kl" or "jsd"), `beta`, `temperature`, `dropout`,
            `student`, `teacher`, `tokenizer`. Statistics of different measures cannot be merged.
        device (`torch.device`, *optional*, defaults to the CPU): Device of the sums; it must support float64.

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
            raise ValueError(f"vocab_size must be at least 1, the number of vocabulary entries; got {vocab_size}.")
        self.measure = _plain(measure)
        self.seen = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        self.count = torch.zeros_like(self.seen)
        self.kl_sum = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.kl_sq_sum = torch.zeros_like(self.kl_sum)
        self.entropy_sum = torch.zeros_like(self.kl_sum)

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary entries."""
        return len(self.seen)

    @property
    def mean_kl(self) -> torch.Tensor:
        """Mean divergence of each type, nats, float64, shape `(V,)`; NaN for a type that was never measured."""
        return self.kl_sum / self.count

    def update(self, signals: MeasuredTokens) -> None:
        """Add `N` positions; a position whose divergence is NaN counts as seen but not as measured.

        On a GPU this does not wait for the device.

        Raises:
            `ValueError`: if the tensors of the signals differ in shape or, on the CPU, an id is outside the vocabulary.
        """
        ids = signals.token_ids
        divergence = signals.divergence
        entropy = signals.entropy
        if not ids.shape == divergence.shape == entropy.shape or ids.ndim != 1:
            raise ValueError(
                f"token_ids, divergence and entropy must have one shape (N,), got {tuple(ids.shape)}, "
                f"{tuple(divergence.shape)} and {tuple(entropy.shape)}."
            )
        if ids.device.type == "cpu" and len(ids):  # on a GPU, this check would wait for the device
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
        entropy = entropy.detach().where(measured, 0.0).to(self.entropy_sum)
        self.entropy_sum.index_add_(0, ids, entropy)

    def merge(self, other: TokenStats) -> TokenStats:
        """Add the sums of other statistics to these, in place, and return these.

        Raises:
            `ValueError`: if the two have different measures, or vocabularies of different size.
        """
        if self.vocab_size != other.vocab_size:
            raise ValueError(
                f"Statistics of {self.vocab_size} and of {other.vocab_size} vocabulary entries cannot be merged."
            )
        require_same_measure(self.measure, other.measure)
        for name in NAMES:
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
        tensors = {name: getattr(self, name).cpu().contiguous() for name in NAMES}
        _check(tensors)
        metadata = {"format": FORMAT, "version": str(VERSION), "measure": json.dumps(self.measure)}
        with complete_file(path) as part:
            part.write_bytes(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenStats:
        """Return the statistics in a file, or in the `token_stats.safetensors` of a checkpoint folder.

        Raises:
            `ValueError`: if the file does not hold statistics of a known version; it names the file and the reason.
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
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise ValueError(f"it has {size} bytes, at most {MAX_BYTES} are read")
            return _read(path)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not token statistics: {str(error) or type(error).__name__:.250}") from error


def merge_last_quarter(windows: Sequence[tuple[int, Path]]) -> tuple[TokenStats, int]:
    """Return the statistics of the last quarter of a run, and the step after which it begins.

    For windows of 10 steps up to step 80, these are the statistics of steps 61 to 80, and 60.

    Args:
        windows (`Sequence[tuple[int, Path]]`): Last step and file of each window in order, at least one.

    Raises:
        `ValueError`: if a file does not hold statistics, or has another measure than the last one.
        `OSError`: if there is no such file.
    """
    end, last_path = windows[-1]
    merged = TokenStats.load(last_path)
    start = 0
    for step, path in windows[:-1]:
        if step > LAST_QUARTER * end:
            merged.merge(load_matching(path, merged))
        else:
            start = step
    return merged, start


def load_matching(path: Path, last: TokenStats, *, ignore: tuple[str, ...] = ()) -> TokenStats:
    """Return the statistics of a window of a run, after checking that its measure is that of the last window.

    Args:
        path (`Path`): File of the window.
        last (`TokenStats`): Statistics of the last window.
        ignore (`tuple[str, ...]`, *optional*): Keys of the measure that may differ.

    Raises:
        `ValueError`: if the file does not hold statistics, or has another measure or vocabulary size.
        `OSError`: if there is no such file.
    """
    stats = TokenStats.load(path)
    try:
        require_same_measure(stats.measure, last.measure, ignore=ignore)
    except ValueError as error:
        raise ValueError(f"{path} and the last checkpoint: {error}") from error
    if stats.vocab_size != last.vocab_size:
        raise ValueError(
            f"{path} has statistics of {stats.vocab_size} vocabulary entries, the last checkpoint of {last.vocab_size}."
        )
    return stats


def require_same_measure(first: Mapping[str, Any], second: Mapping[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` with the first key in which two measures differ; keys in `ignore` may differ."""
    keys = (first.keys() | second.keys()).difference(ignore)
    for key in sorted(keys):
        one = json.dumps(first[key]) if key in first else "not there"
        other = json.dumps(second[key]) if key in second else "not there"
        if one != other:
            raise ValueError(
                f"Statistics of different measures cannot be combined: {key} is {one:.200} and {other:.200}."
            )


def _plain(measure: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a measure in the form that it has after it was written to JSON and read again."""
    if not isinstance(measure, Mapping) or not all(isinstance(key, str) for key in measure):
        raise ValueError("measure must be a dictionary whose keys are strings.")
    try:
        return json.loads(json.dumps(dict(measure), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"measure must hold only values that JSON can store, with finite numbers: {error}.") from error


def _read(path: Path) -> TokenStats:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f'its "format" is not "{FORMAT}"')
        if metadata.get("version") != str(VERSION):
            raise ValueError(f"it has version {metadata.get('version')!r:.40}, this trl_opd reads version {VERSION}")
        if set(file.keys()) != set(NAMES):
            raise ValueError(f"it must hold {', '.join(NAMES)} and nothing else")
        tensors = {name: file.get_tensor(name) for name in NAMES}

    measure = json.loads(metadata.get("measure", "null"))
    if not isinstance(measure, dict):
        raise ValueError("its measure is not an object")
    _check(tensors)
    stats = TokenStats(len(tensors["seen"]), measure)
    for name, tensor in tensors.items():
        setattr(stats, name, tensor)
    return stats


def _check(tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless the tensors can be sums over positions."""
    size = tensors["seen"].numel()
    for name, tensor in tensors.items():
        dtype = torch.int64 if name in COUNTS else torch.float64
        if size == 0 or tensor.shape != (size,) or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {dtype} of one shape (V,)")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")

    seen = tensors["seen"]
    count = tensors["count"]
    impossible = (count < 0) | (count > seen)
    if impossible.any() or seen.double().sum() >= 2**62:
        raise ValueError("count must lie between 0 and seen, and seen must be a number of positions")
    unmeasured = count == 0
    for name in SUMS:
        if tensors[name][unmeasured].any():
            raise ValueError("a type that was never measured has sums")
    if (tensors["kl_sq_sum"] < 0).any():
        raise ValueError("kl_sq_sum is negative")
