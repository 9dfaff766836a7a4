"""The prompts of a command: a dataset on the Hub, a folder, a file, or a mixture of datasets."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig

# File extension -> name of the loader in `datasets`.
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class PromptSource:
    """Where prompts are read from.

    Args:
        name (`str`, *optional*): Name on the Hub, folder, or data file. Required if there is no mixture.
        config (`str`, *optional*): Configuration of the dataset.
        split (`str`, *optional*, defaults to `"train"`): Split of the prompts.
        eval_split (`str`, *optional*): Split of the prompts for evaluation; `None` without evaluation.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read rows as they are needed.
        mixture (`trl.DatasetMixtureConfig`, *optional*): Datasets to read in place of `name`.
    """

    name: str | None
    config: str | None = None
    split: str = "train"
    eval_split: str | None = None
    streaming: bool = False
    mixture: DatasetMixtureConfig | None = None


def make_source(script_args, dataset_args, training_args) -> PromptSource:
    """Return the source of the prompts that TRL's script, mixture and training arguments name."""
    evaluates = training_args.eval_strategy != "no"
    return PromptSource(
        name=script_args.dataset_name,
        config=script_args.dataset_config,
        split=script_args.dataset_train_split,
        eval_split=script_args.dataset_test_split if evaluates else None,
        streaming=script_args.dataset_streaming,
        mixture=dataset_args if dataset_args.datasets else None,
    )


def load_prompts(source: PromptSource):
    """Return the dataset of prompts, and the evaluation dataset or `None`.

    Raises:
        `ValueError` or `OSError`: if the dataset cannot be read, has no rows, or lacks a split.
    """
    from datasets.exceptions import DatasetGenerationError

    if source.mixture is None and not source.name:
        raise ValueError("Prompts are required: set --dataset_name to a dataset or a file of JSON lines.")
    try:
        dataset = _load_splits(source)
    except DatasetGenerationError as error:
        raise ValueError(f"{source.name} cannot be read: {error.__cause__ or error}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"The dataset {source.name} has no rows.") from error

    for split in (source.split, source.eval_split):
        if split is not None and split not in dataset:
            raise ValueError(
                f"The dataset has no split {split!r} (it has {', '.join(dataset)}): set --dataset_train_split and "
                "--dataset_test_split."
            )

    eval_dataset = None
    if source.eval_split is not None:
        eval_dataset = dataset[source.eval_split]
    return dataset[source.split], eval_dataset


def take_prompts(source: PromptSource, count: int | None):
    """Return the first `count` rows of the dataset, or all rows if `count` is `None`.

    Raises:
        `ValueError` or `OSError`: if the dataset cannot be read, has fewer rows, or is a stream and `count` is `None`.
    """
    from datasets import Dataset

    dataset, _ = load_prompts(source)
    if not isinstance(dataset, Dataset):
        if count is None:
            raise ValueError("A streaming dataset has an unknown number of rows: set --num_prompts.")
        dataset = Dataset.from_list(list(dataset.take(count)))
    if count is None:
        return dataset
    if count > len(dataset):
        raise ValueError(
            f"--num_prompts {count} is more than the {len(dataset)} rows of the dataset: take fewer, or leave it out."
        )
    return dataset.select(range(count))


@contextmanager
def dataset_errors(name: str | None):
    """Raise `ValueError` with the name of the dataset if reading its rows fails."""
    from pyarrow import ArrowInvalid, ArrowTypeError

    try:
        yield
    except (ArrowInvalid, ArrowTypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name or 'The dataset'} cannot be read: {error}") from error


def _load_splits(source: PromptSource):
    """Return the splits of a source by name, as `datasets` loads them."""
    from datasets import load_dataset
    from trl import get_dataset

    if source.mixture is not None:
        return get_dataset(source.mixture)

    path = Path(source.name)
    loader = source.name
    data_files = None
    if path.suffix in LOADERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no dataset file {path}.")
        if path.stat().st_size == 0:
            raise ValueError(f"The dataset file {path} is empty.")
        loader = LOADERS[path.suffix]
        data_files = str(path)
    return load_dataset(loader, name=source.config, data_files=data_files, streaming=source.streaming)
