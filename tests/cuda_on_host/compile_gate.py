"""Checks compiled CUDA kernels without a GPU: no local memory, 16-byte accesses, registers within a budget.

    python compile_gate.py BUILD_FOLDER_OR_OBJECT... [--registers 64] [--budget 'layer_norm=128'] [--brief]

Reads the machine code of every kernel for every architecture with cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm, both required). In a build folder it reads the objects that nvcc compiled from csrc/cuda. Exits
with 1 if a kernel breaks a rule, with 2 if nvcc is installed but there was nothing to check.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path


@dataclass
class Kernel:
    """A kernel compiled for one architecture."""

    arch: str
    symbol: str
    label: str = ""  # readable: name and template arguments
    registers: int = 0
    shared: int = 0
    stack: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label.partition("<")[0]

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))

    @property
    def local_accesses(self) -> int:
        return self.count(r"(LDL|STL)\b")

    @property
    def wide_loads(self) -> int:  # LD: the compiler could not infer that the address is global
        return self.count(r"LDG?\..*(128|256)")

    @property
    def wide_stores(self) -> int:
        return self.count(r"STG?\..*(128|256)")

    def faults(self, budget: int, wide_loads: bool, wide_stores: bool) -> list[str]:
        faults = []
        if self.stack or self.local_accesses:
            faults.append(f"local memory: {self.stack} B of stack, {self.local_accesses} accesses")
        if self.registers > budget:
            faults.append(f"{self.registers} registers")
        if wide_loads and not self.wide_loads:
            faults.append("no 16-byte load")
        if wide_stores and not self.wide_stores:
            faults.append("no 16-byte store")
        return faults


def find_tool(name: str) -> Path | None:
    """From a wheel in this environment, otherwise from PATH."""
    for entry in sys.path:
        for candidate in sorted(Path(entry or ".").glob(f"nvidia/*/bin/{name}")):
            return candidate
    found = shutil.which(name)
    return Path(found) if found else None


def disassemble(path: Path) -> str:
    tools = [find_tool("cuobjdump"), find_tool("nvdisasm")]
    if None in tools:
        raise FileNotFoundError("cuobjdump or nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    folders = [str(tool.parent) for tool in tools if tool]  # cuobjdump calls nvdisasm
    env = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}
    command = [str(tools[0]), "-res-usage", "-sass", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "does not contain device code" not in done.stdout + done.stderr:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def parse(listing: str) -> list[Kernel]:
    kernels: dict[tuple[str, str], Kernel] = {}
    arch, kernel = "", None
    for line in listing.splitlines():
        if m := re.match(r"\s*arch = (sm_\w+)", line):
            arch, kernel = m[1], None
        elif m := re.match(r"\s*Function\s*:?\s+([\w$.]+?):?\s*$", line):
            kernel = kernels.setdefault((arch, m[1]), Kernel(arch, m[1]))
        elif kernel and (m := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            registers, stack, shared, local = map(int, m.groups())
            kernel.registers, kernel.stack, kernel.shared = registers, stack + local, shared
        elif kernel and (m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            kernel.instructions[m[1]] = kernel.instructions.get(m[1], 0) + 1
    return list(kernels.values())


def without_parameters(name: str) -> str:
    depth = 0
    for end, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            return name[:end]
    return name


def readable(symbols: list[str]) -> list[str]:
    """Demangled names without return type, parameters and onepass's own namespaces."""
    if shutil.which("c++filt") is None:
        return symbols
    names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = names.replace("(anonymous namespace)::", "").splitlines()
    labels = [without_parameters(name.removeprefix("void ")) for name in names]
    return [re.sub(r"\bonepass::(\w+::)*", "", label) for label in labels]


def inspect(paths: Iterable[Path]) -> list[Kernel]:
    kernels = [kernel for path in paths for kernel in parse(disassemble(path))]
    for kernel, label in zip(kernels, readable([k.symbol for k in kernels]), strict=True):
        kernel.label = label
    return sorted(kernels, key=lambda k: (k.label, int(re.sub(r"\D", "", k.arch))))


def objects_in(paths: Iterable[Path]) -> list[Path]:
    """A file itself; for a folder, the objects of CMake's target cuda_kernels."""
    found: list[Path] = []
    for path in paths:
        found += sorted(path.glob("**/cuda_kernels.dir/**/*.cu.o")) if path.is_dir() else [path] * path.exists()
    return found


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def each(values: Iterable[int]) -> str:
    """One number per architecture, or a single one if they agree."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="build folders, object files or libraries with CUDA code")
    parser.add_argument("--registers", type=int, default=64, help="budget a thread, 64 unless stated otherwise")
    parser.add_argument("--budget", action="append", default=[], metavar="REGEX=N", help="another one for some kernels")
    parser.add_argument(
        "--narrow", default="prepare|join|finish|narrow", metavar="REGEX", help="need no 16-byte access"
    )
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
            found = kernel.faults(budget, wide_loads=not narrow, wide_stores=not (narrow or reads))
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
