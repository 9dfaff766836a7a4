"""OPDCallback: the base class of callbacks that see more of a distillation than transformers shows them."""

from __future__ import annotations

import torch
from transformers import TrainerCallback
from trl import DistillationTrainer

from .model_pair import ModelPair


class OPDCallback(TrainerCallback):
    """Base class of callbacks that work with [`OPDTrainer`] only.

    `OPDTrainer` calls `attach` before each training and `on_generation_batch` with every new generation batch. With
    another trainer the training ends with an error that says so.
    """

    trainer: DistillationTrainer | None = None
    model_pair: ModelPair | None = None

    def attach(self, trainer: DistillationTrainer, model_pair: ModelPair) -> None:
        """Take the trainer and its two models, once before each training."""
        self.trainer = trainer
        self.model_pair = model_pair

    def on_generation_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """Take the generation batch of an optimizer step, with its weights and the teacher's states, if it has them."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Raise `ValueError` where no `OPDTrainer` has attached this callback."""
        if self.trainer is None:
            raise ValueError(
                f"{type(self).__name__} works with trl_opd.OPDTrainer only: pass it to that trainer, whose models and "
                "rollouts it needs."
            )
