"""Reads what nvcc compiled kernels to: their registers, their instructions, and the loads that wait together.

cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, both required) print the machine code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def is_streaming_load(self) -> bool:
        """A load from global memory, of data that is read once: the kernels read what stays in the caches (weights,
        statistics, tables) by __ldg, whose instruction says CONSTANT. Without the G, nvcc could not tell that it is global."""
        return bool(re.match(r"LDG?\.E?", self.opcode)) and "CONSTANT" not in self.opcode

    @property
    def width(self) -> int:
        """Bytes that a load or store moves for each thread."""
        for part in self.opcode.split("."):
            if part in WIDTHS:
                return WIDTHS[part]
        return 4

    @property
    def registers(self) -> set[int]:
        """Those it names; a wide access names the first of several adjacent ones."""
        span = max(1, self.width // 4) if re.match(r"(LD|ST)", self.opcode) else 1
        named = re.findall(r"\bR(\d+)(\.64)?", self.operands)
        return {int(n) + i for n, pair in named for i in range(2 if pair else min(span, 4))}

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if self.opcode.startswith("BRA") and found else None


WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def waiting_loads(instructions: list[tuple[str, Instruction]]) -> set[tuple[int, ...]]:
    """The widths of the streaming loads that wait for memory together, at each point where a thread stops for one.

    Only loads inside loops count: what stands before them runs once. The instructions are followed in their order in
    memory, as if every predicate were true. Of what cannot be known the smaller number is taken: a use of a load waits
    for all that were issued before it; no load stays in flight across a jump back or an unconditional branch.
    """
    loops = [(i.target, i.address) for _, i in instructions if i.target is not None and i.target < i.address]
    bursts: set[tuple[int, ...]] = set()
    flying: list[tuple[set[int], int]] = []  # registers and width of each load, in order

    def land(n: int) -> None:
        bursts.add(tuple(sorted(width for _, width in flying)))
        del flying[:n]

    for predicate, instruction in instructions:
        if flying:
            touched = instruction.registers
            waits = [n for n, (registers, _) in enumerate(flying, 1) if registers & touched]
            if waits:
                land(waits[-1])
        target = instruction.target
        leaves = not predicate and re.match(r"(BRA|EXIT|RET)\b", instruction.opcode)
        if flying and (leaves or (target is not None and target <= instruction.address)):
            land(len(flying))
        if instruction.is_streaming_load and any(a <= instruction.address <= b for a, b in loops):
            first = instruction.operands.split(",")[0]
            loaded = Instruction(0, instruction.opcode, first).registers
            flying.append((loaded, instruction.width))
    return bursts - {()}


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
    bursts: set[tuple[int, ...]] = field(default_factory=set)  # see waiting_loads()

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

    def stores(self, width: int) -> int:
        return sum(
            n
            for opcode, n in self.instructions.items()
            if re.match(r"STG?\b", opcode) and Instruction(0, opcode, "").width == width
        )


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
    code: dict[tuple[str, str], list[tuple[str, Instruction]]] = {}
    for line in listing.splitlines():
        if m := re.match(r"\s*arch = (sm_\w+)", line):
            arch, kernel = m[1], None
        elif m := re.match(r"\s*Function\s*:?\s+([\w$.]+?):?\s*$", line):
            kernel = kernels.setdefault((arch, m[1]), Kernel(arch, m[1]))
        elif kernel and (m := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            registers, stack, shared, local = map(int, m.groups())
            kernel.registers, kernel.stack, kernel.shared = registers, stack + local, shared
        elif kernel and (m := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line)):
            kernel.instructions[m[3]] = kernel.instructions.get(m[3], 0) + 1
            instruction = Instruction(int(m[1], 16), m[3], m[4].strip())
            code.setdefault((arch, kernel.symbol), []).append((m[2] or "", instruction))
    for key, instructions in code.items():
        kernels[key].bursts = waiting_loads(instructions)
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
