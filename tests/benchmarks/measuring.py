"""Peak memory of a function, in this process or a new one, and the machine that a table was measured on."""

import multiprocessing
import os
import platform
import resource
from collections.abc import Callable
from datetime import date
from typing import Any

import torch


def machine() -> str:
    """Return date, hardware and versions, for the heading of a table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{date.today()}, {name}, {platform.machine()}, {versions}"


def in_a_process(function: Callable, *arguments) -> Any:
    """Return what a function returns in a new process, which ends before the next measurement starts."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_bytes(function: Callable, *arguments) -> int:
    """Return the most memory that a call used beyond what was in use before, on the GPU if there is one."""
    if not torch.cuda.is_available():
        return host_peak_bytes(function, *arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*arguments)
    return torch.cuda.max_memory_allocated() - before


def host_peak_bytes(function: Callable, *arguments) -> int:
    """Return the most memory of this process that a call used beyond what was in use before."""
    with open("/proc/self/statm") as file:
        _, resident_pages, *_ = file.read().split()
    before = int(resident_pages) * resource.getpagesize()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    function(*arguments)
    with open("/proc/self/status") as file:
        (peak,) = [line for line in file if line.startswith("VmHWM")]
    _, kilobytes, _ = peak.split()
    return int(kilobytes) * 1024 - before
