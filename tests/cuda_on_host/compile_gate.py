"""Checks compiled CUDA kernels without a GPU: no local memory, 16-byte accesses, registers within a budget.

    python compile_gate.py BUILD_FOLDER_OR_OBJECT... [--registers 64] [--budget 'layer_norm=128'] [--brief]

Reads the machine code of every kernel for every architecture, see sass.py. In a build folder it reads the objects that
nvcc compiled from csrc/cuda. Exits with 1 if a kernel breaks a rule, with 2 if nvcc is installed but there was nothing to check.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from sass import Kernel, inspect, objects_in, table

# Kernels of a few bytes, and those compiled for accesses of fewer than 16: the second template argument is the width.
NARROW = r"prepare|join|finish|_kernel<(float, [12]|double, 1|__half, [124]|__nv_bfloat16, [124])[,>]"


def faults_of(kernel: Kernel, budget: int, wide_loads: bool, wide_stores: bool) -> list[str]:
    faults = []
    if kernel.stack or kernel.local_accesses:
        faults.append(f"local memory: {kernel.stack} B of stack, {kernel.local_accesses} accesses")
    if kernel.registers > budget:
        faults.append(f"{kernel.registers} registers")
    if wide_loads and not kernel.wide_loads:
        faults.append("no 16-byte load")
    if wide_stores and not kernel.wide_stores:
        faults.append("no 16-byte store")
    return faults


def each(values: Iterable[int]) -> str:
    """One number per architecture, or a single one if they agree."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="build folders, object files or libraries with CUDA code")
    parser.add_argument("--registers", type=int, default=64, help="budget a thread, 64 unless stated otherwise")
    parser.add_argument("--budget", action="append", default=[], metavar="REGEX=N", help="another one for some kernels")
    parser.add_argument("--narrow", default=NARROW, metavar="REGEX", help="need no 16-byte access")
    parser.add_argument(
        "--reads", default="reduce|moments|sums|columns", metavar="REGEX", help="need 16-byte loads, but no such stores"
    )
    parser.add_argument("--brief", action="store_true", help="print only the kernels that break a rule")
    options = parser.parse_args(arguments)
    budgets = [(pattern, int(n)) for pattern, _, n in (entry.rpartition("=") for entry in options.budget)]

    objects = objects_in(options.paths)
    if not objects and shutil.which("nvcc") is None:
        print("compile gate: no nvcc here, nothing to judge")
        return 0
    try:
        kernels = inspect(objects)
    except (FileNotFoundError, RuntimeError) as error:
        print(f"compile gate: {error}", file=sys.stderr)
        return 2
    rows = [["kernel", "registers", "stack", "shared", "local", "wide loads", "wide stores", "verdict"]]
    broken = 0
    for label, group in groupby(kernels, lambda kernel: kernel.label):
        same = list(group)  # one per architecture
        budget = next((n for pattern, n in budgets if re.search(pattern, label)), options.registers)
        narrow = bool(re.search(options.narrow, label, re.IGNORECASE))
        reads = bool(re.search(options.reads, label))
        faults = []
        for kernel in same:
            found = faults_of(kernel, budget, wide_loads=not narrow, wide_stores=not (narrow or reads))
            faults += [f"{kernel.arch}: {fault}" for fault in found]
            broken += bool(found)
        if options.brief and not faults:
            continue
        verdict = "BROKEN: " + "; ".join(faults) if faults else "ok" + ", narrow" * narrow + ", reads" * reads
        numbers = [
            each(getattr(kernel, key) for kernel in same)
            for key in ("registers", "stack", "shared", "local_accesses", "wide_loads", "wide_stores")
        ]
        rows.append([label, *numbers, verdict])
    if len(rows) > 1:
        print(table(rows))
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    print(f"compile gate: {len(kernels)} kernels for {', '.join(archs) or 'no architecture'}, {broken} broken")
    if not kernels:
        return 2
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
