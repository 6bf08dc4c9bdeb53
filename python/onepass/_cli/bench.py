"""Measure optimizer steps of onepass and torch on lists of tensors."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, optim, show_config
from .output import OutputFile, PictureFile, UsageError, distinct_files, milliseconds, progress, text_table
from .results import FORMAT, OURS, best_peer, page
from .timing import measure
from .workload import Workload, like, usual

Json = dict[str, Any]

_OPTIONS: dict[str, Json] = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "AdamW": {"lr": 1e-3}}
_STATES = {"SGD": 1, "AdamW": 2}
_TORCH_PATHS: dict[str, Json] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False, "fused": False},
}
# Larger lists share parameters and gradients between the variants, to fit a small machine's memory. Smaller ones must
# not: a variant would find the parameters in the cache, left there by the previous one.
_SHARED_ABOVE = 64_000_000
# A ratio is reported as unreliable if its upper quartile is this many times the lower one.
_WIDE = 1.5


@dataclass(frozen=True)
class _Row:
    """One row of the table: an optimizer's step on a list of tensors."""

    workload: Workload
    optimizer: str

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.optimizer.lower()}"

    @property
    def bytes_needed(self) -> int:
        """Of all variants together, with two temporaries of the whole list, which torch's foreach path needs."""
        variants = 1 + len(_TORCH_PATHS)
        lists = 2 * (1 if self.workload.elements > _SHARED_ABOVE else variants) + 2
        return lists * self.workload.bytes + 4 * self.workload.elements * _STATES[self.optimizer] * variants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--like", type=like, metavar="WHAT", help=like_help)
    parser.add_argument("--quick", action="store_true", help="small lists and few rounds, to show that it works")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=OutputFile, metavar="FILE", help="save the results")
    parser.add_argument("--plot", type=PictureFile, metavar="FILE", help="save a picture of the ratios (matplotlib)")
    parser.add_argument("--html", type=OutputFile, metavar="FILE", help="save a page whose columns can be sorted")


like_help = (
    "instead of the usual lists: the parameters of resnet50, of gpt2, or of what a callable of yours returns, named as "
    "FILE:CALLABLE: a torch.nn.Module, or a list of tensors or shapes"
)


def run(args: argparse.Namespace) -> int:
    distinct_files(args.json, args.plot, args.html)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    workloads = [args.like] if args.like else usual(args.quick)
    rows = [_Row(workload, optimizer) for workload in workloads for optimizer in _OPTIONS]
    for row in rows:
        free = _free_memory(device)
        if free is not None and row.bytes_needed > 0.8 * free:
            raise UsageError(
                f"{row.name} needs {row.bytes_needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free: "
                f"use {'--like with a smaller network' if args.like else '--quick'}"
            )
    seconds, rounds = (0.1, 3) if args.quick else (2.0, 5)
    measured = [_measure_row(row, device, seconds, rounds) for row in progress(rows, len(rows), lambda row: row.name)]
    result = {
        "benchmark": "bench",
        "format": FORMAT,
        "environment": _environment(device),
        "quick": args.quick,
        "rows": measured,
    }

    print(_table(result))
    if args.json:
        args.json.write((json.dumps(result, indent=1) + "\n").encode())
    if args.html:
        args.html.write(page(result).encode())
    if args.plot:
        from .bench_plot import picture

        args.plot.write(picture(result, args.plot.format))
    return 0


def _measure_row(row: _Row, device: torch.device, seconds: float, min_rounds: int) -> Json:
    """The numbers of one row, as they go into the JSON file."""
    torch.manual_seed(0)
    samples = measure(_steps(row, device), device, seconds, min_rounds)
    gc.collect()  # before the next row allocates
    ratios = {name: sample.times(samples[OURS]) for name, sample in samples.items() if name != OURS}
    return {
        "name": row.name,
        "rule": row.optimizer,
        "dtype": row.workload.dtypes,
        "tensors": len(row.workload.tensors),
        "elements": row.workload.elements,
        "rounds": len(samples[OURS].seconds),
        "variants": {name: {"median_ms": 1e3 * sample.median()} for name, sample in samples.items()},
        "ratios": {name: quartiles for name, (quartiles, _) in ratios.items()},
        "busy": [name for name, (_, quiet) in ratios.items() if not quiet],  # other processes took a core
    }


def _steps(row: _Row, device: torch.device) -> dict[str, Callable[[], object]]:
    """The step of each variant: the whole `optimizer.step()` that a user calls."""
    options = _OPTIONS[row.optimizer]
    params = row.workload.parameters(device)
    steps: dict[str, Callable[[], object]] = {OURS: getattr(optim, row.optimizer)(params, **options).step}
    for path, hints in _TORCH_PATHS.items():
        if row.workload.elements <= _SHARED_ABOVE:
            params = row.workload.parameters(device)
        cls = getattr(torch.optim, row.optimizer)
        steps[path] = cls(params, **options, **hints).step
    return steps


def _table(result: Json) -> str:
    variants = [OURS, *_TORCH_PATHS]
    rows = []
    for row in result["rows"]:
        best = best_peer(row)
        low, median, high = row["ratios"][best]
        times = [milliseconds(row["variants"][name]["median_ms"]) for name in variants]
        mark = " *" if _is_unreliable(row) else ""
        rows.append([row["name"] + mark, *times, best, f"{median:.2f}x", f"{low:.2f} to {high:.2f}"])
    header = ["step", "onepass ms", *(f"{path} ms" for path in _TORCH_PATHS), "best of torch", "ratio", "quartiles"]
    notes = [
        "",
        "ms: the median of the rounds",
        "ratio: the median of the rounds' ratios, not the ratio of the medians",
    ]
    if any(map(_is_unreliable, result["rows"])):
        notes.append("* unreliable: other processes took a core, or the ratio varied much")
    return "\n".join([text_table(header, rows), *notes])


def _is_unreliable(row: Json) -> bool:
    best = best_peer(row)
    low, _, high = row["ratios"][best]
    return best in row["busy"] or high > _WIDE * low


def _environment(device: torch.device) -> Json:
    """What a reader needs to judge a number: date, machine and versions."""
    machine = {"cpu": _cpu_model(), "cores": os.cpu_count(), "arch": platform.machine()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "onepass": __version__},
        "onepass_config": show_config(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
