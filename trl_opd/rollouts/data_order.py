"""Order of the prompts: as in TRL, but right also after a resume and for streams with several rollouts per prompt."""

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
    """TRL's sampler, with a permutation that depends on the number of the epoch.

    TRL's sampler draws one permutation after another from a generator that starts over on resume, so a run that is
    resumed in its third epoch gets the order of its first. In a run that is not interrupted both samplers are the same.

    Args:
        epoch (`Callable[[], int]`): Returns how many epochs are complete when the first permutation is drawn.
        **kwargs: Arguments of [`trl.trainer.utils.RepeatSampler`].
    """

    def __init__(self, *, epoch: Callable[[], int], **kwargs):
        super().__init__(**kwargs)
        self._complete = epoch
        self._epoch = None

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            if self._epoch is None:
                self._epoch = self._complete()
            else:
                self._epoch += 1  # also after an epoch that was cut short
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

    Fixes two bugs of transformers' Trainer. When a finished run is resumed, the Trainer trains one extra step. And it
    takes a streaming dataset for one epoch of `max_steps` steps, so it would look for the next prompt beyond the end of
    the stream. We read the place from `epoch` in the checkpoint's state, which counts the passes over the stream, with
    the batches of the last one as a fraction.

    Args:
        place (`tuple[int, int]`): The two numbers as the Trainer computes them.
        checkpoint (`str`, *optional*): Folder of the checkpoint that the run resumes from.
        state (`transformers.TrainerState`): The trainer's state, read from that checkpoint.
        args (`transformers.TrainingArguments`): The configuration.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The training prompts.
        max_steps (`int`): Optimizer steps of the whole run.
        num_train_epochs (`int`): Epochs of the whole run.
    """
    if checkpoint is None:
        return place
    state_file = Path(checkpoint) / TRAINER_STATE_NAME
    if not state_file.is_file():
        return place
    if state.global_step >= max_steps:
        return num_train_epochs, 0
    if args.ignore_data_skip or not isinstance(dataset, IterableDataset):
        return place

    # `max_steps` of this run may differ from that of the run which wrote the checkpoint.
    saved = TrainerState.load_from_json(state_file)
    epochs = int(saved.epoch)
    batches = (saved.epoch - epochs) * saved.max_steps * args.gradient_accumulation_steps
    return epochs, round(batches)


@contextmanager
def grouped_stream(trainer: DistillationTrainer, *, prompts: int, rollouts: int) -> Iterator[None]:
    """Make TRL's `get_train_dataloader` read a streaming dataset with each prompt repeated `rollouts` times.

    TRL repeats the batches of a stream for its accumulation steps, but takes each prompt once. Repeating the rows of
    the stream gives the order that the sampler gives to other datasets. The stream must be shuffled before that, so it
    is shuffled here and not by TRL. Other datasets, and runs with one rollout per prompt, are left alone.

    Args:
        trainer (`trl.DistillationTrainer`): The trainer, whose dataset is replaced inside this block only.
        prompts (`int`): Number of different prompts in a generation batch.
        rollouts (`int`): Number of rollouts per prompt.
    """
    stream = trainer.train_dataset
    shuffle = trainer.shuffle_dataset
    if rollouts == 1 or not isinstance(stream, IterableDataset):
        yield
        return

    ordered = stream.shuffle(seed=trainer.args.seed) if shuffle else stream
    trainer.train_dataset = repeat_iterable_dataset(ordered, rollouts, batch_size=prompts)
    trainer.shuffle_dataset = False
    try:
        yield
    finally:
        trainer.train_dataset = stream
        trainer.shuffle_dataset = shuffle
