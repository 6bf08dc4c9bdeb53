"""What the benchmarks with tables of rows (optimizers, layers, wrappers) share: the command line and the loop over rows."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import compiled
import harness
import machine
import report_rows as report
import torch
from harness import Json, Variant
from machine import onepass


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    device: torch.device
    quick: bool
    seconds: float  # per row
    compile: bool

    @property
    def no_compile(self) -> str:
        """Why torch.compile is not measured at all; empty if it is."""
        return compiled.unavailable() if self.compile else "--no-compile"


@dataclass(frozen=True)
class Job:
    """A row still to be measured."""

    name: str
    measure: Callable[[Settings], Json]
    bytes_needed: int = 0


def row(
    description: Json, variants: Sequence[Variant], limits: Sequence[Variant], compilation: Json, settings: Settings
) -> Json:
    """Measure the variants and the limit together: the row as it goes into the JSON file."""
    graphs = compiled.graphs()
    rounds = 3 if settings.quick else 5
    samples = harness.measure([*variants, *limits], settings.device, seconds=settings.seconds, min_rounds=rounds)
    if compiled.NAME in samples and compiled.graphs() != graphs:
        compilation = compiled.left_out("it compiled again while it was timed")
        del samples[compiled.NAME]
    return description | {"compile": compilation} | harness.results(samples)


def main(
    benchmark: str,
    text: str,
    jobs: Callable[[bool], Iterable[Job]],
    argv: list[str] | None = None,
    compiles: bool = True,
    device: str = "cpu",
    summary: Callable[[Json], str] = report.footnotes,
) -> int:
    """Measure the rows that the command line chooses; ``jobs(quick)`` yields them all. Gives the exit status.

    A row that fails is reported and left out. After Ctrl-C or SIGINT what there is so far is summed up.

    compiles: whether the benchmark knows torch.compile as a peer.
    device: the default of --device.
    summary: what is printed below the table.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--quick", action="store_true", help="small rows and few samples, to show that it works")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, where it is measured at all"
    )
    parser.add_argument("--seconds", type=float, help="time per row without compilation (default 4, quick 0.1)")
    parser.add_argument("--budget", type=float, default=math.inf, help="start no row after this many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    parser.add_argument("--list", action="store_true", help="only print the names of the rows")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(job.name for job in jobs(args.quick)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    try:
        wanted = re.compile(args.filter, re.IGNORECASE)
    except re.error as error:
        parser.error(f"--filter {args.filter!r}: not a regular expression ({error})")
    if onepass is None:
        print("onepass is not installed: only torch is measured", file=sys.stderr)
    seconds = args.seconds if args.seconds is not None else (0.1 if args.quick else 4.0)
    settings = Settings(torch.device(args.device), args.quick, seconds, compiles and not args.no_compile)
    end = time.monotonic() + args.budget
    rows: list[Json] = []
    failed: dict[str, str] = {}
    result = {
        "benchmark": benchmark,
        "environment": machine.environment(settings.device),
        "quick": args.quick,
        "compile": compiles,
        "rows": rows,
        "failed": failed,
    }
    name = f"{benchmark}-quick" if args.quick else benchmark

    print(report.heading(result))
    for job in jobs(args.quick):
        if not wanted.search(job.name):
            continue
        if time.monotonic() > end:
            print(f"the budget of {args.budget:g} s is used up before {job.name}", file=sys.stderr)
            break
        if job.bytes_needed > 0.8 * machine.available_memory(settings.device):
            print(f"{job.name}: skipped, needs {job.bytes_needed / 2**30:.1f} GiB", file=sys.stderr)
            continue
        if args.device == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        try:
            rows.append(job.measure(settings))
        except KeyboardInterrupt:
            print(f"stopped in {job.name}", file=sys.stderr)
            break
        except Exception as error:
            failed[job.name] = f"{type(error).__name__}: {error}"
            print(f"{job.name}: failed, {failed[job.name]}", file=sys.stderr)
            if "restart the process" in failed[job.name] or "CUDA error" in failed[job.name]:
                break  # nothing runs on the GPU any more
            continue
        finally:
            gc.collect()
        print(report.line(rows[-1], result), flush=True)
        path = harness.save(result, args.out, name)
    if not rows:
        print(f"{len(failed)} rows failed" if failed else f"--filter {args.filter!r}: no row matches", file=sys.stderr)
        return 1
    print(summary(result))
    print(f"saved {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        report.plot(result, path.with_suffix(".png"))
        print(f"saved its plot {path.with_suffix('.png').name}")
    return 1 if failed else 0
