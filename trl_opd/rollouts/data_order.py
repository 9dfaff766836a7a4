"""Order of the prompts: TRL's order, also after a resume, with several rollouts per prompt, and for streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import DistillationTrainer

from .._trl import RepeatSampler, repeat_iterable_dataset


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with the permutation chosen by the number of the epoch.

    TRL's own draws permutation after permutation from one generator, so a run that is resumed in epoch 3 sees the
    prompts of epoch 1 again. Uninterrupted, the two are the same.

    Args:
        epoch (`Callable[[], int]`): Returns the number of epochs that are complete when the first one is drawn.
        **kwargs: As [`trl.trainer.utils.RepeatSampler`] has them.
    """

    def __init__(self, *, epoch: Callable[[], int], **kwargs):
        super().__init__(**kwargs)
        self._complete = epoch
        self._epoch = None

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            # After the first call, count one up each time, also after an epoch that was cut short.
            self._epoch = self._complete() if self._epoch is None else self._epoch + 1
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def place_after_resume(
    place: tuple[int, int],
    *,
    checkpoint: str | None,
    state: TrainerState,
    args: TrainingArguments,
    dataset: Dataset | IterableDataset,
    max_steps: int,
    num_train_epochs: int,
) -> tuple[int, int]:
    """Return the number of epochs that a resumed run has completed, and of batches done in the current epoch.

    Corrects transformers' Trainer in two places. It would train one extra step when a finished run is resumed. And a
    streaming dataset is one epoch of `max_steps` steps to it, so it would look for the next prompt beyond the stream's
    end: in the state of a checkpoint `epoch` counts as the run went, passes and batches of the last one.

    Args:
        place (`tuple[int, int]`): The two numbers as the Trainer has them.
        checkpoint (`str`, *optional*): Folder of the checkpoint that the run resumes from.
        state (`transformers.TrainerState`): The state that was read from it.
        args (`transformers.TrainingArguments`): The configuration.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The training prompts.
        max_steps (`int`): Optimizer steps of the whole run.
        num_train_epochs (`int`): Epochs of the whole run.
    """
    if checkpoint is None or not (path := Path(checkpoint) / TRAINER_STATE_NAME).is_file():
        return place
    if state.global_step >= max_steps:
        return num_train_epochs, 0
    if args.ignore_data_skip or not isinstance(dataset, IterableDataset):
        return place
    before = TrainerState.load_from_json(path)  # `max_steps` may have changed since
    epochs = int(before.epoch)
    batches = (before.epoch - epochs) * before.max_steps * args.gradient_accumulation_steps
    return epochs, round(batches)


@contextmanager
def grouped_stream(trainer: DistillationTrainer, *, prompts: int, rollouts: int) -> Iterator[None]:
    """Let TRL's `get_train_dataloader` read a streaming dataset with each prompt repeated `rollouts` times.

    TRL repeats a stream itself, once per accumulation step, but each prompt once. Repeating the records first gives the
    order that the sampler has for indexed datasets; the shuffle has to come before that. Other datasets and single
    rollouts are left alone.

    Args:
        trainer (`trl.DistillationTrainer`): The trainer, changed inside and restored after.
        prompts (`int`): Different prompts of a generation batch.
        rollouts (`int`): Rollouts of each.
    """
    stream = trainer.train_dataset
    shuffle = trainer.shuffle_dataset
    if rollouts == 1 or not isinstance(stream, IterableDataset):
        yield
        return
    shuffled = stream.shuffle(seed=trainer.args.seed) if shuffle else stream
    trainer.train_dataset = repeat_iterable_dataset(shuffled, rollouts, batch_size=prompts)
    trainer.shuffle_dataset = False
    try:
        yield
    finally:
        trainer.train_dataset = stream
        trainer.shuffle_dataset = shuffle
