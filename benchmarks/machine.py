"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# None if it is not installed: torch can be measured alone.
onepass: Any = importlib.import_module("onepass") if importlib.util.find_spec("onepass") else None


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a number: date, machine and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if onepass is not None:
        versions["onepass"] = onepass.__version__
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "arch": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        versions["cuda"] = str(torch.version.cuda)
        versions["driver"] = _driver_version()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "machine": machine,
        "versions": versions,
        "onepass_config": onepass.show_config() if onepass is not None else None,
    }


def slug(environment: Mapping[str, Any]) -> str:
    """The machine as part of a file name, such as ``amd-epyc-9354-2c`` or ``nvidia-h200``."""
    machine = environment["machine"]
    name = machine.get("gpu") or f"{machine['cpu']} {machine['cores']}c"
    name = re.sub(r"\((r|tm)\)|processor|cpu|@.*?ghz|\d+-core", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _meminfo("MemAvailable")


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _driver_version() -> str:
    try:
        match = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        match = None
    return match.group(1) if match else "unknown"


def _meminfo(key: str) -> int:
    """The bytes of a line ``key:  1234 kB``; 0 if the system has no such file."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1)) * 1024 if match else 0
