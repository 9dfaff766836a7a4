"""opd_run.json: what was run. Models, data, versions, command, hardware, arguments and the log, for report and card."""

from __future__ import annotations

import json
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
from accelerate.utils import is_peft_model
from datasets import Dataset

from ..artefacts import token_stats
from ..artefacts.atomic import complete_file
from ..artefacts.hub import redact
from ..artefacts.run_files import RUN_FILE, RUN_FORMAT
from ..rocks import rock_set
from ..rocks.rock_set import RockSet

VERSION = 1
PACKAGES = ("trl_opd", "trl", "transformers", "torch", "peft", "accelerate", "bitsandbytes", "datasets")
CREDENTIALS = ("auth_token", "hub_token", "access_token", "password", "secret", "api_key")
# Arguments that say nothing about the result, or are told elsewhere.
UNTOLD = {"output_dir", "hub_token", "logging_dir", "run_name", "local_rank", "push_to_hub", "hub_model_id"}
UNTOLD |= {"accelerator_config", "report_to", "debug", "disable_tqdm", "dataloader_pin_memory", "pad_to_multiple_of"}


class RunRecord:
    """The record of a trainer's run; no secret is in it.

    Args:
        trainer (`OPDTrainer`): The trainer, whose teacher is placed, and not yet parked.
        measure (`dict`): What is measured (see [`TokenStats`]).

    Attributes:
        dataset_name (`str` or `None`): Name of the training data; known to whoever loaded it.
    """

    def __init__(self, trainer, measure: dict[str, Any]):
        self._trainer, self._measure, self._started = trainer, measure, _now()
        self._teacher = _model(trainer.accelerator.unwrap_model(trainer.teacher_model))
        self.dataset_name: str | None = None

    def start(self) -> None:
        """Note the time at which a training begins, and lay its rock set beside what it will leave."""
        self._started = _now()
        if self._trainer.is_world_process_zero():
            with self._warned():
                self._keep_rock_set()

    def write(self, dataset_name: str | None = None) -> None:
        """Write the record as the run stands to `output_dir/opd_run.json`; it appears only when it is complete.

        Args:
            dataset_name (`str`, *optional*): Name of the training data, where that becomes known now.
        """
        self.dataset_name = dataset_name or self.dataset_name
        path = self._folder / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as part:
            part.write_text(json.dumps(self.describe(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def write_results(self) -> None:
        """Write record, rock set and statistics (since the run began or went on) to the output folder. A collective.

        What cannot be written is a warning: the student is still to be saved.
        """
        stats = self._trainer.reduced_token_stats()
        if not self._trainer.is_world_process_zero():
            return
        with self._warned():
            self.write()
            if stats is not None and bool(stats.seen.any()):
                stats.save(self._folder / token_stats.FILE_NAME)
            self._keep_rock_set()

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.args.output_dir)

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            warnings.warn(f"The record of the run cannot be written to {self._folder}: {error}", stacklevel=4)

    def _keep_rock_set(self) -> None:
        """Put the rock set of the run beside its student, unless another one lies there."""
        found, path = self._trainer.rock_set, self._folder / rock_set.FILE_NAME
        if found is None:
            return
        if path.is_file() and RockSet.load(path) != found:
            warnings.warn(f"{path} is another rock set than this run's, and is left as it is.", stacklevel=4)
        elif not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)

    def describe(self) -> dict[str, Any]:
        """Return the record as it is written."""
        trainer, args, state = self._trainer, self._trainer.args, self._trainer.state
        content = {
            "format": RUN_FORMAT,
            "version": VERSION,
            "command": _command(),
            "started": self._started,
            "written": _now(),
            "steps": state.global_step,
            "max_steps": state.max_steps,
            "versions": _versions(),
            "hardware": _hardware(trainer),
            "student": _student(trainer.accelerator.unwrap_model(trainer.model)),
            "teacher": self._teacher,
            "dataset": _dataset(trainer.train_dataset, self.dataset_name),
            "measure": self._measure,
            "arguments": _arguments(args),
            "rocks": None if trainer.rock_set is None else trainer.rock_set.ids.tolist(),
            "log": state.log_history,
        }
        return _clean(content, args.hub_token)


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


def _hardware(trainer) -> dict[str, Any]:
    device = trainer.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": device.type, "name": name, "processes": trainer.accelerator.num_processes}


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
        "name": model.config._name_or_path or None,
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


def _student(model: torch.nn.Module) -> dict[str, Any]:
    found = _model(model)
    found["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["adapter"] = None
    if is_peft_model(model):
        config = model.peft_config[model.active_adapters[0]]
        rank, kind = getattr(config, "r", None), str(config.peft_type).rsplit(".", 1)[-1]
        found["adapter"] = kind if rank is None else f"{kind} of rank {rank}"
        found["name"] = config.base_model_name_or_path or found["name"]
    return found


def _dataset(dataset: Any, name: str | None) -> dict[str, Any]:
    info = getattr(dataset, "info", None)
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    return {"name": name or getattr(info, "dataset_name", None), "rows": rows}


def _arguments(args) -> dict[str, Any]:
    """Return the arguments that are not at their default."""
    content, told = args.to_dict(), {}
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
