"""How every benchmark here measures.

Variants run in turn (A B C A B C ...), so that a slow minute of the machine affects all of them. A sample in which another
process took a core away (an involuntary context switch) is discarded. A low percentile says what the code costs, the
median what a user sees. Results are plain dictionaries, saved as JSON with the versions and the machine; report.py presents
them.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LOW_PERCENTILE = 20
# With fewer undisturbed samples than this, the disturbed ones are kept as well, and the result says so.
MIN_CLEAN = 3

Json = dict[str, Any]

# None if it is not installed: torch can be measured alone.
onepass: Any = importlib.import_module("onepass") if importlib.util.find_spec("onepass") else None


@dataclass
class Variant:
    """Something to measure: ``run`` is timed; ``prepare``, called before each run, is not.

    A ``run`` that returns a float has measured its own time, in seconds.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Samples:
    """Seconds per run of one variant. On a GPU they are the GPU's time, and ``cpu`` is the time until the call returned."""

    clean: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def kept(self) -> list[float]:
        return self.clean if len(self.clean) >= MIN_CLEAN else self.clean + self.disturbed

    def summary(self) -> Json:
        result: Json = {
            "p20_ms": 1e3 * percentile(self.kept, LOW_PERCENTILE),
            "median_ms": 1e3 * percentile(self.kept, 50),
            "samples": len(self.kept),
            "discarded": len(self.clean) + len(self.disturbed) - len(self.kept),
        }
        if self.kept is not self.clean:
            result["disturbed"] = True
        if self.cpu:
            result["cpu_p20_ms"] = 1e3 * percentile(self.cpu, LOW_PERCENTILE)
        return result


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that ``percent`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def measure(
    variants: Sequence[Variant],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warm_up: int = 2,
) -> dict[str, Samples]:
    """Run the variants in turn for about ``seconds``, preparations included, after ``warm_up`` unrecorded rounds."""
    for _ in range(warm_up):
        for variant in variants:
            variant.prepare()
            variant.run()
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    samples = {variant.name: Samples() for variant in variants}
    end = time.perf_counter() + seconds
    for round_ in range(max_rounds):
        if round_ >= min_rounds and time.perf_counter() > end:
            break
        for variant in variants:
            sample(variant, samples[variant.name])
    return samples


def _sample_cpu(variant: Variant, samples: Samples) -> None:
    variant.prepare()
    switches = _involuntary_switches()
    start = time.perf_counter()
    timed_itself = variant.run()
    elapsed = time.perf_counter() - start
    disturbed = _involuntary_switches() != switches
    elapsed = timed_itself if isinstance(timed_itself, float) else elapsed
    (samples.disturbed if disturbed else samples.clean).append(elapsed)


def _sample_cuda(variant: Variant, samples: Samples) -> None:
    variant.prepare()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    timed_itself = variant.run()
    cpu = time.perf_counter() - start
    end.record()
    end.synchronize()
    elapsed = float(begin.elapsed_time(end)) * 1e-3
    samples.clean.append(timed_itself if isinstance(timed_itself, float) else elapsed)
    samples.cpu.append(cpu)


def _involuntary_switches() -> int:
    # RUSAGE_SELF, not RUSAGE_THREAD: torch's worker threads count too, since the slowest one ends the step.
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def environment(device: torch.device) -> Json:
    """What a reader needs to judge a number: date, machine and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if onepass is not None:
        versions["onepass"] = onepass.__version__
    machine: Json = {
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


def save(result: Mapping[str, Any], folder: Path, benchmark: str) -> Path:
    """Write ``<folder>/<benchmark>-<date>-<machine>.json`` atomically and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = result["environment"]
    path = folder / f"{benchmark}-{environment['date'][:10]}-{slug(environment)}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(_rounded(result), indent=1) + "\n")
    unfinished.replace(path)
    return path


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _meminfo("MemAvailable")


class PeakMemory:
    """``with PeakMemory(device) as peak``: ``peak.extra`` is the block's peak memory in bytes beyond that at its start.

    On a CPU it is the process's resident memory, so that native allocations count as well; ``extra`` is None if the
    system cannot reset its high-water mark (only Linux can).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        self.extra: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: see proc_pid_clear_refs(5)
            self._before = _status("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self.extra = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self.extra = max(0, _status("VmHWM") - self._before)


def _rounded(value: Any) -> Any:
    """Round to five significant digits: more is noise, and a diff of two results should be readable."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


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
    return _kilobytes(Path("/proc/meminfo"), key)


def _status(key: str) -> int:
    return _kilobytes(Path("/proc/self/status"), key)


def _kilobytes(path: Path, key: str) -> int:
    """The bytes of a line ``key:  1234 kB``; 0 if the system has no such file."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1)) * 1024 if match else 0
