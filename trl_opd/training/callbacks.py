"""OPDCallback: the base class of callbacks that need the rollouts and both models of a distillation."""

from __future__ import annotations

import torch
from transformers import TrainerCallback
from trl import DistillationTrainer

from .model_pair import ModelPair


class OPDCallback(TrainerCallback):
    """Base class of callbacks that work with [`OPDTrainer`] only.

    `OPDTrainer` calls `attach` before each training and `on_generation_batch` with every new generation batch. Any
    other trainer stops with an error when the training begins.
    """

    trainer: DistillationTrainer | None = None
    model_pair: ModelPair | None = None

    def attach(self, trainer: DistillationTrainer, model_pair: ModelPair) -> None:
        """Store the trainer and its two models; called once before each training."""
        self.trainer = trainer
        self.model_pair = model_pair

    def on_generation_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """Receive the generation batch of an optimizer step, with its weights and the teacher's states, if any."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Raise `ValueError` unless an `OPDTrainer` has attached this callback."""
        if self.trainer is None:
            raise ValueError(
                f"{type(self).__name__} works with trl_opd.OPDTrainer only: pass it to that trainer, whose models and "
                "rollouts it needs."
            )
