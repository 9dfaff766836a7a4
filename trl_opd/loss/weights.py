"""Weights of positions in the loss, chosen by token type or at random.

A weight belongs to the position whose logits *predict* the token, hence to the token emitted there (arXiv:2605.09253,
selective distillation: `w(x_t, t)`); no later code shifts it. Weights depend only on ids and positions, so they are
known before any projection.
"""

from collections.abc import Sequence

import torch

from .hashing import hash_counters


def token_weights(
    token_ids: torch.Tensor,
    rock_ids: torch.Tensor | Sequence[int],
    *,
    rock_weight: float,
    window: int = 0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weight of each position: `rock_weight` on rocks and their windows, 1 elsewhere, 0 outside the mask.

    Args:
        token_ids (`torch.Tensor`): Emitted tokens, int64, shape `(B, C)` (any shape when `window` is 0).
        rock_ids (`torch.Tensor` or `Sequence[int]`): Ids of the chosen token types.
        rock_weight (`float`): Weight of the chosen positions, in [0, 1].
        window (`int`, *optional*, defaults to `0`): Positions on each side of a rock that get the same weight.
        mask (`torch.Tensor`, *optional*):
            Positions of the loss, bool, shape of `token_ids`; all by default. A position outside is not treated as
            a rock and opens no window, but windows count it as a position.

    Returns:
        `torch.Tensor`: float32, shape of `token_ids`.

    Raises:
        `ValueError`: if `rock_weight` is outside [0, 1], `window` or an id is negative, or a shape does not fit.

    Example:

    ```python
    >>> token_weights(torch.tensor([[5, 7, 5, 9]]), [7], rock_weight=0.0, window=1)
    tensor([[0., 0., 0., 1.]])
    ```
    """
    if not 0.0 <= rock_weight <= 1.0:
        raise ValueError(f"rock_weight must be in [0, 1] (0 freezes rocks, 1 changes nothing), got {rock_weight}.")
    if window < 0:
        raise ValueError(f"window counts positions on each side of a rock and cannot be negative, got {window}.")
    if window and token_ids.ndim != 2:
        raise ValueError(
            f"A window needs token ids of shape (B, C), one rollout per row; got shape {tuple(token_ids.shape)}: "
            "add the missing dimension, or pass window=0."
        )
    if mask is not None and mask.shape != token_ids.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, token ids have {tuple(token_ids.shape)}: pass one of the same shape."
        )
    chosen = _look_up(token_ids, torch.as_tensor(rock_ids, dtype=torch.int64))
    if mask is not None:
        chosen &= mask.bool()
    if window and token_ids.numel():
        spread = torch.nn.functional.max_pool1d(chosen[:, None].float(), 2 * window + 1, stride=1, padding=window)
        chosen = spread[:, 0] > 0
    return _weights(chosen, rock_weight, mask)


def random_weights(
    mask: torch.Tensor, *, share: float, rock_weight: float, seed: int, step: int, first_rollout: int = 0
) -> torch.Tensor:
    """Return `rock_weight` at positions of the mask drawn with probability `share`, 1 at the rest, 0 outside it.

    The weights are float32 of shape `(B, C)`. The choice is a hash of seed, step, rollout and position: the same on
    every device, for every batch split and after a resume, and independent of the RNG that samples rollouts.

    Args:
        mask (`torch.Tensor`): Positions of the loss, bool, shape `(B, C)`.
        share (`float`): Probability of a position to be chosen, in [0, 1].
        rock_weight (`float`): Weight of the chosen positions.
        seed (`int`): Seed of the run.
        step (`int`): Optimizer step.
        first_rollout (`int`, *optional*, defaults to `0`): Index of the first row in the global generation batch.
    """
    batch, places = mask.shape
    rollout = torch.arange(first_rollout, first_rollout + batch, device=mask.device)[:, None]
    position = torch.arange(places, device=mask.device)[None]
    key = hash_counters(seed, torch.full_like(rollout, step), rollout, position)
    uniform = (key & 0xFFFFFF).float() / 2**24
    return _weights((uniform < share) & mask.bool(), rock_weight, mask)


def _look_up(token_ids: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return whether each token is one of the ids, bool, shape of `token_ids`; looked up in a table indexed by id."""
    if ids.numel() and ids.min() < 0:
        raise ValueError(f"rock_ids are indices into a vocabulary and cannot be negative, got {int(ids.min())}.")
    last = int(ids.max()) + 1 if ids.numel() else 0
    table = torch.zeros(last + 1, dtype=torch.bool, device=ids.device)
    table[ids] = True
    # Ids above the table map to its last entry and negative ones to index -1, the same entry, which is never a rock.
    return table.to(token_ids.device)[token_ids.clamp(-1, last).long()]


def _weights(chosen: torch.Tensor, rock_weight: float, mask: torch.Tensor | None) -> torch.Tensor:
    weights = torch.ones(chosen.shape, dtype=torch.float32, device=chosen.device).masked_fill(chosen, rock_weight)
    if mask is None:
        return weights
    return weights.masked_fill(~mask.bool(), 0.0)
