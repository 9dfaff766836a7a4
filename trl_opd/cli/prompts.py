"""Arguments of the command line -> the prompts of a dataset."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path


def take_prompts(script_args, dataset_args, args, count: int | None):
    """Return the first `count` rows of the dataset, all of them when it is `None`."""
    from datasets import Dataset

    dataset, _ = load_prompts(script_args, dataset_args, args)
    if not isinstance(dataset, Dataset):
        if count is None:
            raise ValueError("A streaming dataset has no known end: set --num_prompts.")
        dataset = Dataset.from_list(list(dataset.take(count)))
    if count is not None and count > len(dataset):
        raise ValueError(f"--num_prompts {count} is more than the {len(dataset)} rows of the dataset.")
    return dataset if count is None else dataset.select(range(count))


# Extensions of a single data file and the loader that `datasets` has for each.
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@contextmanager
def readable(name: str | None):
    """Raise `ValueError` that names the dataset where its rows turn out to be broken while they are read."""
    from pyarrow import ArrowInvalid, ArrowTypeError

    try:
        yield
    except (ArrowInvalid, ArrowTypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name or 'The dataset'} cannot be read: {error}") from error


def load_prompts(script_args, dataset_args, training_args):
    """Return the training and evaluation datasets (the latter `None` without evaluation)."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from trl import get_dataset

    if not dataset_args.datasets and not script_args.dataset_name:
        raise ValueError("Prompts are required: set --dataset_name to a dataset or a file of JSON lines.")
    try:
        if dataset_args.datasets:
            dataset = get_dataset(dataset_args)
        else:
            path = Path(script_args.dataset_name)
            source, files = script_args.dataset_name, None
            if path.suffix in LOADERS:
                if not path.is_file():
                    raise FileNotFoundError(f"There is no dataset file {path}.")
                if path.stat().st_size == 0:
                    raise ValueError(f"The dataset file {path} is empty.")
                source, files = LOADERS[path.suffix], str(path)
            streaming = script_args.dataset_streaming
            dataset = load_dataset(source, name=script_args.dataset_config, data_files=files, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"{script_args.dataset_name} cannot be read: {error.__cause__ or error}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"The dataset {script_args.dataset_name} has no rows.") from error
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    for split in splits:
        if split not in dataset:
            raise ValueError(
                f"The dataset has no split {split!r} (it has {', '.join(dataset)}): set --dataset_train_split and "
                "--dataset_test_split."
            )
    return dataset[splits[0]], dataset[splits[1]] if len(splits) > 1 else None
