"""opd_run.json: what was run. Models, data, versions, command, hardware, arguments and the log, for report and card."""

from __future__ import annotations

import math
import os
import platform
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

PACKAGES = ("trl_opd", "trl", "transformers", "torch", "peft", "accelerate", "bitsandbytes", "datasets")
CREDENTIALS = ("auth_token", "hub_token", "access_token", "password", "secret", "api_key")
# Arguments that say nothing about the result, or are told elsewhere.
UNTOLD = {"output_dir", "hub_token", "logging_dir", "run_name", "local_rank", "push_to_hub", "hub_model_id"}
UNTOLD |= {"accelerator_config", "report_to", "debug", "disable_tqdm", "dataloader_pin_memory", "pad_to_multiple_of"}


class RunRecord:
    """The record of a run: models, data, settings, hardware and log; no secret is in it.

    Only the main process of a run writes.

    Args:
        args (`OPDConfig`): The configuration.
        accelerator (`accelerate.Accelerator`): Knows the hardware.
        student (`torch.nn.Module`): The student, unwrapped.
        teacher (`torch.nn.Module`): The teacher, unwrapped, and not yet parked.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): The training prompts.
        rock_set (`RockSet`, *optional*): The rock set of the run.
        measure (`dict`): What is measured (see [`TokenStats`]).
        starts_at_base (`bool`): Whether the student with its adapter switched off is the student as the run began.

    Attributes:
        dataset_name (`str` or `None`): Name of the training data; known to whoever loaded it.
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
        """Note the time at which a training begins, and save its rock set in the output folder."""
        self._started = _now()
        if self._args.process_index == 0:
            with self._errors_as_warnings():
                self._keep_rock_set()

    def write(self, state: TrainerState) -> None:
        """Write the record as the run stands to `output_dir/opd_run.json`; it appears only when it is complete."""
        path = self._folder / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.describe(state))

    def write_or_warn(self, state: TrainerState) -> None:
        """Write the record as [`RunRecord.write`] does; no run ends because that fails."""
        try:
            self.write(state)
        except OSError as error:
            warnings.warn(f"The record of the run cannot be written: {error}", stacklevel=3)

    def write_results(self, state: TrainerState, stats: TokenStats | None) -> None:
        """Write record, rock set and statistics to the output folder.

        What cannot be written is a warning: the student is still to be saved.

        Args:
            state (`transformers.TrainerState`): The state of the run.
            stats (`TokenStats`, *optional*): Statistics since the run began or was resumed, of all processes.
        """
        if self._args.process_index != 0:
            return
        with self._errors_as_warnings():
            self.write(state)
            if stats is not None and bool(stats.seen.any()):
                stats.save(self._folder / TOKEN_STATS_FILE)
            self._keep_rock_set()

    def describe(self, state: TrainerState) -> dict[str, Any]:
        """Return the record as it is written."""
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
        """Put the rock set of the run beside its student, unless another one lies there."""
        path = self._folder / ROCK_SET_FILE
        if self._rock_set is None:
            return
        if path.is_file() and RockSet.load(path) != self._rock_set:
            warnings.warn(f"{path} is another rock set than this run's, and is left as it is.", stacklevel=4)
        elif not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rock_set.save(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command() -> str:
    program = Path(sys.argv[0]).name
    words = [program] if program == "trl-opd" else ["python", program]
    return shlex.join([*words, *sys.argv[1:]])


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
    """Return the processor's name and its number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # no Linux
        cores = os.cpu_count()
    return f"{name}, {cores} cores"


def _model(model: torch.nn.Module) -> dict[str, Any]:
    quantization = getattr(model.config, "quantization_config", None)
    parameters = list(model.parameters())
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()}
    return {
        "name": model.config.name_or_path or None,
        "parameters": model.num_parameters() or None,
        "dtype": ", ".join(sorted(dtypes)) or None,
        "quantization": None if quantization is None else _quantization(quantization),
    }


def _quantization(config: Any) -> str:
    content = config if isinstance(config, dict) else config.to_dict()
    if content.get("load_in_4bit"):
        return f"4-bit {content.get('bnb_4bit_quant_type', '')}".strip()
    if content.get("load_in_8bit"):
        return "8-bit"
    return str(content.get("quant_method", "quantised")).rsplit(".", 1)[-1].lower()


def _student(model: torch.nn.Module, starts_at_base: bool) -> dict[str, Any]:
    found = _model(model)
    found["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["adapter"] = None
    if is_peft_model(model):
        config = model.peft_config[model.active_adapters[0]]
        rank, kind = getattr(config, "r", None), str(config.peft_type).rsplit(".", 1)[-1]
        found["adapter"] = kind if rank is None else f"{kind} of rank {rank}"
        found["name"] = config.base_model_name_or_path or found["name"]
        found["starts_at_base"] = starts_at_base
    return found


def _dataset(dataset: Any, name: str | None) -> dict[str, Any]:
    info = getattr(dataset, "info", None)
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    return {"name": name or getattr(info, "dataset_name", None), "rows": rows}


def _arguments(args) -> dict[str, Any]:
    """Return the arguments that are not at their default."""
    content = args.to_dict()
    told = {}
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.init and field.name not in UNTOLD and getattr(args, field.name) not in (default, None):
            told[field.name] = content.get(field.name)
    return told


def _clean(value: Any, secret: str | None) -> Any:
    """Return a value as JSON has it: no token, no number that is not finite, no object."""
    if isinstance(value, dict):
        return {str(key): _clean("<TOKEN>" if _is_secret(key, part) else part, secret) for key, part in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_clean(part, secret) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    text = redact(str(value))
    return text.replace(secret, "<TOKEN>") if secret else text


def _is_secret(key: Any, value: Any) -> bool:
    """Return whether an argument of this name holds a credential: `hub_token`, but not `eos_token`."""
    name = str(key).lower()
    return isinstance(value, str) and (name == "token" or name.endswith(CREDENTIALS))
