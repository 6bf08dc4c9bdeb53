"""How much memory traffic each kernel keeps in flight on an SM, computed from its machine code and its launches.

    python machine_model.py BUILD_FOLDER_OR_OBJECT... [--arch 90] [--json FILE] [--shapes PROGRAM]

A GPU's memory is busy while enough bytes are under way: bandwidth times latency (Little's law). An H100 needs about 19 KB
per SM, an H200 29 KB. For the shapes that people have, this computes what there is, without a GPU:

    KB in flight = resident blocks per SM * threads that have data * bytes that one thread has loaded before it waits

The blocks per SM follow from registers, shared memory and threads by the limits of the architecture, and from the size of
the grid; the loads from the machine code, see sass.waiting_loads(); the launches from the engine's own code, which
launch_shapes.cpp runs without kernels. Exits with 1 if a case is below its floor, with 2 if there was nothing to judge.

It is an upper bound of one moment, not a speed: while a block reduces or stores it loads nothing, so twice the need is a
comfortable figure. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from host_compiler import build, cuda_include
from sass import Kernel, inspect, objects_in, readable, table

BUILD = Path(__file__).resolve().parent.parent.parent / "build" / "cuda-on-host"
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


class Machine(NamedTuple):
    """Limits of one SM (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability")."""

    code: str  # the architecture whose machine code it runs, see cmake/cuda.cmake
    card: str
    sms: int
    threads: int
    blocks: int
    shared: int  # KB
    registers: int = 65536


MACHINES = {
    "75": Machine("75", "T4", 40, 1024, 16, 64),
    "80": Machine("80", "A100", 108, 2048, 32, 164),
    "86": Machine("80", "RTX 3090", 82, 1536, 16, 100),
    "89": Machine("80", "RTX 4090", 128, 1536, 24, 100),
    "90": Machine("90", "H100", 132, 2048, 32, 228),
    "100": Machine("100", "B200", 148, 2048, 32, 228),
    "120": Machine("120", "RTX 5090", 170, 1536, 24, 100),
}
WARP = 32


def blocks_per_sm(kernel: Kernel, machine: Machine, threads: int, dynamic_shared: int) -> int:
    """Resident blocks of one SM. Registers are given out to warps in units of 256; a block reserves 1 KB of shared memory
    from sm_80 on, which nvcc counts from sm_90 on."""
    warps = -(-threads // WARP)
    registers_per_warp = -(-kernel.registers * WARP // 256) * 256
    # A quarter of the registers belongs to each of the SM's four partitions, and so does a quarter of the warps.
    by_registers = 4 * (machine.registers // 4 // registers_per_warp) // warps
    shared = kernel.shared + dynamic_shared + (1024 if machine.code == "80" else 0)
    by_shared = machine.shared * 1024 // -(-shared // 128 * 128) if shared else machine.blocks
    return min(machine.blocks, machine.threads // threads, by_registers, by_shared)


@dataclass
class Case:
    """A call whose kernels are judged."""

    name: str
    call: str  # a line for launch_shapes.cpp
    kernels: str  # a regular expression: those that move the data
    total: int = 0  # bytes that a launch loads from memory
    row: int = 0  # of them, bytes that one team loads together; a row of a norm
    floor: float = 0  # KB in flight per SM on sm_90
    share: float = 1  # of the arrays that the kernels can load, those that this call has
    narrow: int = 0  # unless 0: this call's misaligned array is loaded by accesses of so many bytes

    @property
    def dtype(self) -> str:
        return self.call.split()[1]


def norm_cases() -> Iterable[Case]:
    for dtype in ("bfloat16", "float16", "float32"):
        for size in (64, 768, 1000, 1024, 2048, 4095, 4096, 4098, 8192, 16384):
            if dtype == "float16" and size not in (768, 4096):
                continue
            rows, row = 2**25 // size, size * BYTES[dtype]
            for kind, arrays, residual in (("row_norm", 1, 0), ("row_norm", 2, 1), ("row_norm_backward", 2, 0)):
                name = f"{'LayerNorm' if not residual else 'add + LayerNorm'}{' backward' * (arrays == 2 and not residual)}"
                call = f"{kind} {dtype} {rows} {size} 0 {residual}"
                yield Case(f"{name} {rows} x {size}", call, f"^{kind}_", rows * row * arrays, row * arrays)


def batch_cases() -> Iterable[Case]:
    shapes = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))  # channels and width, as in ResNet-50
    for dtype in ("bfloat16", "float16", "float32"):
        for last in (0, 1):
            for channels, width in shapes:
                batch, space = 128, width * width
                size = batch * channels * space * BYTES[dtype]
                layout = "channels last" if last else "NCHW"
                for kind, kernels, arrays, possible, what in (
                    ("batch_norm", "^batch_moments", 1, 1, "statistics"),
                    ("batch_norm", "^batch_norm_kernel", 1, 2, "result"),  # no residual
                    ("batch_norm_backward", "^batch_sums_kernel", 2, 3, "backward, sums"),  # no activation
                    ("batch_norm_backward", "^batch_norm_backward", 2, 3, "backward, result"),
                ):
                    call = f"{kind} {dtype} {batch} {channels} {space} {last}"
                    name = f"BatchNorm {width} x {width} {layout}, {what}"
                    floor = 18 if (dtype, width, last) == ("bfloat16", 14, 0) else 0
                    yield Case(name, call, kernels, size * arrays, floor=floor, share=arrays / possible)


def list_cases() -> Iterable[Case]:
    for dtype in ("float32", "bfloat16", "float16"):
        size = BYTES[dtype]
        for tensors, elements in ((1, 25_000_000), (160, 160_000), (1000, 256), (160, 160_001)):
            n = tensors * elements
            floor = 24 if n * size >= 40e6 else 0  # lists of 64 MB and more, and their 16-bit twins
            text = f"{tensors} x {elements}"
            for offset in (0, size):
                tail = f"{dtype} {tensors} {elements} {offset}"
                note = text + ", gradients misaligned" * (offset > 0)
                for what, call, kernels, loaded in (
                    ("AdamW", "adam", "^apply", 2 * size + 8),
                    ("SGD", "sgd", "^apply", 2 * size),
                    ("norm of", "norm", "^reduce", size),
                ):
                    floored = floor if offset == 0 or call != "norm" else 0
                    yield Case(f"{what} {note}", f"{call} {tail}", kernels, n * loaded, floor=floored, narrow=offset)
        yield Case("dropout of 25000000", f"dropout {dtype} 25000000", "^dropout", 25_000_000 * size)


class Launch(NamedTuple):
    kernel: str  # its label, as sass.readable() gives
    grid: int
    threads: int
    dynamic_shared: int
    integers: list[int]


def launches_of(program: Path, cases: list[Case]) -> list[list[Launch]]:
    symbols = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    mangled = {
        int(address, 16): name for address, name in re.findall(r"^([0-9a-f]+) \w (\S*kernel\S*)$", symbols, re.M)
    }
    labels = dict(zip(mangled, readable(list(mangled.values())), strict=True))
    lines = "".join(case.call + "\n" for case in cases)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    answers: list[list[Launch]] = [[]]
    for line in done.stdout.splitlines():
        if not line:
            answers.append([])
            continue
        _, address, *numbers = line.split()
        grid, threads, shared, *integers = map(int, numbers)
        answers[-1].append(Launch(labels[int(address, 16)], grid, threads, shared, integers))
    return answers[:-1]


@dataclass
class Estimate:
    """One kernel of a case on one machine."""

    case: str
    dtype: str
    arch: str
    kernel: str
    registers: int
    threads: int
    shared: int
    blocks: int  # per SM, that fit
    resident: float  # per SM, that there are
    widths: list[int]  # bytes of a thread's loads in flight
    store: int  # bytes of the widest store
    kilobytes: float
    local: int
    floor: float

    @property
    def is_low(self) -> bool:
        return self.arch == "90" and self.kilobytes < self.floor


def estimate(case: Case, launch: Launch, kernel: Kernel, arch: str) -> Estimate:
    machine = MACHINES[arch]
    blocks = blocks_per_sm(kernel, machine, launch.threads, launch.dynamic_shared)
    resident = min(blocks, launch.grid / machine.sms)
    bursts = [
        burst
        if case.narrow
        else [width for width in burst if width == max(burst)]  # the others: rare paths, statistics
        for burst in kernel.bursts
        if not case.narrow or case.narrow in burst
    ]
    widths = max(bursts, key=lambda burst: (sum(burst), max(burst)), default=[])
    per_block = launch.threads * sum(widths) * case.share
    if case.row and launch.integers:  # a team cannot have more in flight than its row
        team = 1 << launch.integers[0]
        per_block = launch.threads // team * min(team * sum(widths), case.row)
    per_block = min(per_block, case.total / launch.grid)  # nor a block more than its part
    stores = [width for width in (16, 8, 4, 2) if kernel.stores(width)]
    return Estimate(
        case.name,
        case.dtype,
        arch,
        launch.kernel,
        kernel.registers,
        launch.threads,
        kernel.shared + launch.dynamic_shared,
        blocks,
        round(resident, 2),
        list(widths),
        max(stores, default=0),
        round(resident * per_block / 1024, 1),
        kernel.stack + kernel.local_accesses,
        case.floor,
    )


def estimates(kernels: Iterable[Kernel], cases: list[Case], launches: list[list[Launch]]) -> list[Estimate]:
    compiled = {(kernel.arch.removeprefix("sm_"), kernel.label): kernel for kernel in kernels}
    found = []
    for arch, machine in MACHINES.items():
        for case, answer in zip(cases, launches, strict=True):
            for launch in answer:
                if re.search(case.kernels, launch.kernel) and (machine.code, launch.kernel) in compiled:
                    found.append(estimate(case, launch, compiled[machine.code, launch.kernel], arch))
    return found


def short(widths: list[int]) -> str:
    """16, 16, 16, 8 as "3 x 16 + 8"."""
    counts = {width: widths.count(width) for width in sorted(set(widths), reverse=True)}
    return " + ".join(f"{n} x {width}" if n > 1 else str(width) for width, n in counts.items()) or "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="build folders or objects with CUDA code")
    parser.add_argument("--arch", action="append", choices=MACHINES, help="those to print (default: 90)")
    parser.add_argument("--json", type=Path, help="write the estimates for every architecture to this file")
    parser.add_argument("--shapes", type=Path, help="the program launch_shapes (default: built in build/cuda-on-host)")
    options = parser.parse_args(arguments)

    objects = objects_in(options.paths)
    if not objects and shutil.which("nvcc") is None:
        print("machine model: no nvcc here, nothing to judge")
        return 0
    if options.shapes is None and cuda_include() is None:
        print("machine model: CUDA's headers are missing", file=sys.stderr)
        return 2
    if options.shapes is None:
        build(BUILD, "launch_shapes", ONEPASS_CUDA_ON_HOST="ON", ONEPASS_SANITIZE="address,undefined;thread")
    cases = [*norm_cases(), *batch_cases(), *list_cases()]
    try:
        kernels = inspect(objects)
        launches = launches_of(options.shapes or BUILD / "launch_shapes", cases)
    except (FileNotFoundError, RuntimeError) as error:
        print(f"machine model: {error}", file=sys.stderr)
        return 2
    found = estimates(kernels, cases, launches)
    if not found:
        print("machine model: no kernel of these architectures", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps([asdict(e) for e in found], indent=1) + "\n")
    rows = [["case", "dtype", "sm", "kernel", "registers", "threads", "blocks", "loads", "store", "KB in flight", ""]]
    for e in found:
        if e.arch in (options.arch or ["90"]) or e.is_low:
            blocks = f"{e.blocks}" if e.resident == e.blocks else f"{e.resident:g} of {e.blocks}"
            verdict = f"BROKEN: below {e.floor:g}" if e.is_low else ""
            numbers = [str(e.registers), str(e.threads), blocks, short(e.widths), str(e.store), f"{e.kilobytes:g}"]
            rows.append([e.case, e.dtype, e.arch, e.kernel, *numbers, verdict])
    print(table(rows))
    low = sum(e.is_low for e in found)
    archs = ", ".join(f"sm_{arch}" for arch in MACHINES if any(e.arch == arch for e in found))
    print(f"machine model: {len(found)} estimates for {archs}, {low} below their floor")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
