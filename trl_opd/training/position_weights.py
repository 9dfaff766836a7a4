"""Computes the weight of each position of a generation batch from the configuration and its rock set."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from transformers import TrainerState

from ..loss.weights import random_weights, token_weights
from ..opd_config import OPDConfig
from ..rocks.rock_set import RockSet
from ..rollouts.batches import is_truncated, loss_mask
from .metrics import token_groups

logger = logging.getLogger(__name__)

# Frozen positions are measured in the steps that end in a log or, if logs do not come every N steps, in every tenth.
MEASURE_EVERY = 10


class PositionWeights:
    """Weights of the positions of a run's generation batches; evaluation is never weighted.

    Args:
        args (`OPDConfig`): The configuration.
        rock_set (`RockSet`, *optional*): The rock set of `args.rock_set`, checked against the tokenizer.
        vocab_size (`int`): The range of ids that student and teacher share.
        stop_ids (`Sequence[int]`): Ids that end a complete rollout; one that ends otherwise was cut.
        accelerator (`accelerate.Accelerator`): Sums over processes.

    Attributes:
        groups (`torch.Tensor` or `None`): Rock, control or other, int64, shape `(vocab_size,)`; `None` without a set.
    """

    def __init__(
        self,
        args: OPDConfig,
        rock_set: RockSet | None,
        vocab_size: int,
        stop_ids: Sequence[int],
        accelerator: Accelerator,
    ):
        self._args = args
        self._stop_ids = stop_ids
        self._accelerator = accelerator
        self._freezes = args.token_weighting != "uniform" and args.rock_weight == 0.0
        self.groups = None
        if rock_set is None:
            return

        controls = [] if rock_set.controls is None else rock_set.controls.ids
        self.groups = token_groups(rock_set.ids, controls, vocab_size)
        self._share = rock_set.token_share
        self._ids = torch.tensor(controls) if args.token_weighting == "control" else rock_set.ids

    def mask_and_weigh(self, batch: dict[str, torch.Tensor], step: int) -> None:
        """Mask cut rollouts if `mask_truncated_completions` is set, then add the weights. A collective."""
        if self._args.mask_truncated_completions:
            self._mask_truncated(batch, step)
        self.weigh(batch, step)

    def weigh(self, batch: dict[str, torch.Tensor], step: int) -> None:
        """Add the weights of a generation batch, `(B, C)`, and their denominator if it is not TRL's token count.

        A collective: every process calls it.
        """
        if self._args.token_weighting == "uniform":
            return
        batch["weights"] = self._weights(batch, step)
        if self._args.weight_normalization == "weights":
            total = self._accelerator.gather(batch["weights"].sum()).sum()
            # Gradients are averaged over processes, so each divides by its part of the global sum.
            batch["weight_denominator"] = total / self._accelerator.num_processes

    def measures_all(self, state: TrainerState) -> bool:
        """Return whether every position is measured in the current optimizer step.

        Frozen positions are measured, without gradient, only in the steps that end in a log; all others always are.
        """
        return not self._freezes or ends_in_log(self._args, state)

    def _mask_truncated(self, batch: dict[str, torch.Tensor], step: int) -> None:
        cut = is_truncated(batch["completion_ids"], batch["completion_mask"], self._stop_ids)[:, None]
        # TRL has only the tool mask to keep a position as context and out of the loss.
        batch["tool_mask"] = (loss_mask(batch) & ~cut).long()
        batch["num_items_in_batch"] = self._accelerator.gather(batch["tool_mask"].sum()).sum()
        if batch["num_items_in_batch"] == 0:
            warnings.warn(
                f"Step {step + 1}: every rollout was cut at max_completion_length={self._args.max_completion_length}, "
                "and mask_truncated_completions leaves them out, so nothing is trained in this step. Raise "
                "max_completion_length.",
                stacklevel=2,
            )

    def _weights(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        args = self._args
        mask = loss_mask(batch)
        if args.token_weighting != "random":
            return token_weights(
                batch["completion_ids"],
                self._ids,
                rock_weight=args.rock_weight,
                window=args.rock_window,
                mask=mask,
            )
        return random_weights(
            mask,
            share=self._share,
            rock_weight=args.rock_weight,
            seed=args.seed,
            step=step,
            first_rollout=self._accelerator.process_index * len(mask),
        )


def ends_in_log(args: OPDConfig, state: TrainerState) -> bool:
    """Return whether the current optimizer step ends in a log; without `logging_strategy="steps"`, every tenth does."""
    step = state.global_step + 1
    if args.logging_strategy != "steps":
        return step % MEASURE_EVERY == 0
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)


def load_rock_set(args: OPDConfig) -> RockSet | None:
    """Return the rock set of the configuration, or `None` if it has none.

    Raises:
        `ValueError`: if the set lacks the controls, the roles or the token share that the configuration needs.
    """
    if args.rock_set is None:
        return None
    rock_set = RockSet.load(args.rock_set)
    if args.rock_exclude_pillars:
        rock_set = _without_pillars(rock_set, args)
    if args.token_weighting == "control" and (rock_set.controls is None or not rock_set.controls.matched):
        raise ValueError(
            f"token_weighting='control' needs controls that match the rocks' token mass, and {args.rock_set} has none: "
            "use token_weighting='random', which draws an equal share of the positions at random."
        )
    if args.token_weighting == "random" and rock_set.token_share > 1.0:
        raise ValueError(
            f"{args.rock_set} counts more rocks than its corpus has tokens ({rock_set.token_share:.1f} times as many), "
            "and token_weighting='random' cannot draw that share of the positions: run `trl-opd detect` again."
        )
    return rock_set


def _without_pillars(rock_set: RockSet, args: OPDConfig) -> RockSet:
    if all(rock.role is None for rock in rock_set.rocks):
        raise ValueError(
            f"rock_exclude_pillars needs the roles of a probe, and {args.rock_set} has none: pass the copy of the set "
            "that `trl-opd probe` writes."
        )
    rocks = [rock for rock in rock_set.rocks if rock.role != "pillar"]
    total = len(rock_set.rocks)
    logger.warning("rock_exclude_pillars leaves %d of %d rocks unweighted.", total - len(rocks), total)
    return dataclasses.replace(rock_set, rocks=rocks)
