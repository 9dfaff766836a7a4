"""Writes `opd_run.json`, the record of a run, from which the report and the model card are made."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import TrainerState

from ..artefacts.atomic import write_json
from ..artefacts.hub import redact
from ..artefacts.run_files import ROCK_SET_FILE, RUN_FILE, RUN_FORMAT, RUN_VERSION, TOKEN_STATS_FILE
from ..artefacts.token_stats import TokenStats
from ..opd_config import OPDConfig
from ..rocks.rock_set import RockSet

# Their versions are in the record, where they are installed.
PACKAGES = ("trl_opd", "trl", "transformers", "torch", "peft", "accelerate", "bitsandbytes", "datasets")
# Endings of the names of arguments that hold a credential.
CREDENTIALS = ("auth_token", "hub_token", "access_token", "password", "secret", "api_key")
# Arguments that do not affect the result, or that are elsewhere in the record.
LEFT_OUT = {
    "accelerator_config",
    "dataloader_pin_memory",
    "debug",
    "disable_tqdm",
    "hub_model_id",
    "hub_token",
    "local_rank",
    "logging_dir",
    "output_dir",
    "pad_to_multiple_of",
    "push_to_hub",
    "report_to",
    "run_name",
}


class RunRecord:
    """The record of a run: models, data, command, versions, hardware, settings and log, without any credential.

    Args:
        args (`OPDConfig`): The configuration.
        accelerator (`accelerate.Accelerator`): The accelerator, for the device and the number of processes.
        student (`torch.nn.Module`): The student, unwrapped.
        teacher (`torch.nn.Module`): The teacher, unwrapped, and not yet parked.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): The training prompts.
        rock_set (`RockSet`, *optional*): The rock set of the run.
        measure (`dict`): What is measured (see [`TokenStats`]).
        starts_at_base (`bool`): Whether the student with its adapter switched off is the student as the run began.

    Attributes:
        dataset_name (`str` or `None`): Name of the training data, which whoever loads them may set.
    """

    def __init__(
        self,
        args: OPDConfig,
        accelerator: Accelerator,
        *,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        train_dataset: Dataset | IterableDataset | None,
        rock_set: RockSet | None,
        measure: dict[str, Any],
        starts_at_base: bool,
    ):
        self._args = args
        self._accelerator = accelerator
        self._student = student
        self._teacher = _model(teacher)
        self._train_dataset = train_dataset
        self._rock_set = rock_set
        self._measure = measure
        self._starts_at_base = starts_at_base
        self._folder = Path(args.output_dir)
        self._started = _now()
        self.dataset_name: str | None = None

    def start(self) -> None:
        """Note the time at which the training begins, and have the main process save the rock set."""
        self._started = _now()
        if self._args.process_index == 0:
            with self._errors_as_warnings():
                self._keep_rock_set()

    def write(self, state: TrainerState) -> None:
        """Write the current record to `output_dir/opd_run.json`, which appears only when it is complete.

        Raises:
            `OSError`: if the file cannot be written.
        """
        path = self._folder / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.describe(state))

    def write_or_warn(self, state: TrainerState) -> None:
        """Write the record; if that fails, warn, because the run itself can go ahead without it."""
        try:
            self.write(state)
        except OSError as error:
            warnings.warn(f"The record of the run cannot be written: {error}", stacklevel=3)

    def write_results(self, state: TrainerState, stats: TokenStats | None) -> None:
        """Write the record, the statistics and the rock set to the output folder, in the main process only.

        If that fails, it warns, because the student is still to be saved.

        Args:
            state (`transformers.TrainerState`): The state of the run.
            stats (`TokenStats`, *optional*): Statistics since the run began or was resumed, of all processes.
        """
        if self._args.process_index != 0:
            return
        with self._errors_as_warnings():
            self.write(state)
            if stats is not None and stats.seen.any():
                stats.save(self._folder / TOKEN_STATS_FILE)
            self._keep_rock_set()

    def describe(self, state: TrainerState) -> dict[str, Any]:
        """Return the record as it is written: a dictionary that JSON can hold."""
        content = {
            "format": RUN_FORMAT,
            "version": RUN_VERSION,
            "command": _command(),
            "started": self._started,
            "written": _now(),
            "steps": state.global_step,
            "max_steps": state.max_steps,
            "versions": _versions(),
            "hardware": _hardware(self._accelerator),
            "student": _student(self._student, self._starts_at_base),
            "teacher": self._teacher,
            "dataset": _dataset(self._train_dataset, self.dataset_name),
            "measure": self._measure,
            "arguments": _arguments(self._args),
            "rocks": None if self._rock_set is None else self._rock_set.ids.tolist(),
            "log": state.log_history,
        }
        return _clean(content, self._args.hub_token)

    @contextmanager
    def _errors_as_warnings(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            warnings.warn(f"The record of the run cannot be written to {self._folder}: {error}", stacklevel=4)

    def _keep_rock_set(self) -> None:
        """Save the rock set of the run in the output folder, unless there is one already."""
        if self._rock_set is None:
            return
        path = self._folder / ROCK_SET_FILE
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rock_set.save(path)
        elif RockSet.load(path) != self._rock_set:
            warnings.warn(
                f"{path} is not the rock set of this run, and is kept: to save this run's rock set there, move that "
                "file away, or choose another output_dir.",
                stacklevel=4,
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command() -> str:
    """Return the command line that started this process, without the folder of the program."""
    program = Path(sys.argv[0]).name
    words = [program, *sys.argv[1:]]
    if program != "trl-opd":
        words.insert(0, "python")
    return shlex.join(words)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _hardware(accelerator: Accelerator) -> dict[str, Any]:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": device.type, "name": name, "processes": accelerator.num_processes}


def _processor() -> str:
    """Return the processor's name and the number of its cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model_name = re.search(r"^model name.*?:(.*)", info, re.MULTILINE)
        if model_name:
            name = model_name[1].strip()
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not on Linux
        cores = os.cpu_count()
    return f"{name}, {cores} cores"


def _model(model: torch.nn.Module) -> dict[str, Any]:
    config = model.config
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    quantization = getattr(config, "quantization_config", None)
    return {
        "name": config.name_or_path or None,
        "parameters": model.num_parameters() or None,
        "dtype": ", ".join(sorted(dtypes)) or None,
        "quantization": None if quantization is None else _quantization(quantization),
    }


def _quantization(config: Any) -> str:
    settings = config if isinstance(config, dict) else config.to_dict()
    if settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type", "")
        return f"4-bit {kind}".strip()
    if settings.get("load_in_8bit"):
        return "8-bit"
    method = str(settings.get("quant_method", "quantised"))  # an enum's name begins with its class
    return method.rpartition(".")[2].lower()


def _student(model: torch.nn.Module, starts_at_base: bool) -> dict[str, Any]:
    found = _model(model)
    found["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["adapter"] = None
    if is_peft_model(model):
        name = model.active_adapters[0]
        config = model.peft_config[name]
        kind = str(config.peft_type).rpartition(".")[2]
        rank = getattr(config, "r", None)
        found["adapter"] = kind if rank is None else f"{kind} of rank {rank}"
        found["name"] = config.base_model_name_or_path or found["name"]
        found["starts_at_base"] = starts_at_base
    return found


def _dataset(dataset: Any, name: str | None) -> dict[str, Any]:
    info = getattr(dataset, "info", None)
    rows = len(dataset) if isinstance(dataset, Dataset) else None  # a stream does not know its length
    return {"name": name or getattr(info, "dataset_name", None), "rows": rows}


def _arguments(args: OPDConfig) -> dict[str, Any]:
    """Return the arguments that are not at their default."""
    content = args.to_dict()
    changed = {}
    for field in fields(args):
        if not field.init or field.name in LEFT_OUT:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(args, field.name) not in (default, None):
            changed[field.name] = content.get(field.name)
    return changed


def _clean(value: Any, secret: str | None) -> Any:
    """Return a value as JSON can hold it: without credentials, infinite or NaN numbers, and other objects."""
    if isinstance(value, dict):
        cleaned = {}
        for key, part in value.items():
            cleaned[str(key)] = "<TOKEN>" if _is_secret(key, part) else _clean(part, secret)
        return cleaned
    if isinstance(value, (list, tuple, set)):
        return [_clean(part, secret) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    text = redact(str(value))
    return text.replace(secret, "<TOKEN>") if secret else text


def _is_secret(key: Any, value: Any) -> bool:
    """Return whether an argument of this name holds a credential: `hub_token`, but not `eos_token`."""
    if not isinstance(value, str):
        return False
    name = str(key).lower()
    return name == "token" or name.endswith(CREDENTIALS)
