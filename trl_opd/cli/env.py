"""`trl-opd env`: the versions and devices of this machine, to paste into a bug report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

HELP = """usage: trl-opd env

Print the versions of the packages that a run uses, and the devices of this machine, one per line. Paste the lines into
a bug report. They name no host, user, path or token.

example:
  trl-opd env"""

PACKAGES = (
    "trl_opd",
    "trl",
    "transformers",
    "torch",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "numpy",
    "pyarrow",
    "scipy",
    "matplotlib",
    "safetensors",
    "vllm",
    "deepspeed",
)
GIB = 2**30


def run(argv: list[str]) -> None:
    """Print versions and devices; raises `ValueError` for arguments, since the command has none."""
    if argv:
        raise ValueError(f"trl-opd env takes no arguments, got {' '.join(argv)}.")
    for name, value in describe_environment().items():
        print(f"{name}: {value}")


def describe_environment() -> dict[str, str]:
    """Return the versions of the packages and the devices by name; a missing package is "not installed"."""
    lines = {name: _version(name) for name in PACKAGES}
    lines["Python"] = platform.python_version()
    lines["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    lines["CPU cores"] = str(os.cpu_count())
    try:
        import torch
    except ImportError:
        return lines

    lines["CUDA of torch"] = torch.version.cuda or "none"
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / GIB
        lines[f"GPU {index}"] = f"{properties.name}, {memory:.1f} GiB"
    if count == 0:
        lines["GPU"] = "Apple MPS" if torch.backends.mps.is_available() else "none"
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
