"""Compile onepass for another processor, run its CPU engine in an emulator, and compare with this processor's.

    make cross        aarch64, with Debian's g++-aarch64-linux-gnu and qemu-user

The whole extension has to compile and link. Of the engine's baseline (NEON on aarch64, SSE2 on x86-64) the update rules
and dropout have to give the same bits, the norms and totals the same numbers up to rounding. Python and torch are not
emulated.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
# Several roundings of the storage, relative to 1 + |value|.
TOLERANCE = {"float32": 4e-6, "float64": 1e-14, "bfloat16": 2**-7, "float16": 2**-10}


def build(folder: Path, *targets: str, options: tuple[str, ...] = ()) -> Path:
    """Configure and build without CUDA; returns the program that prints what the engine computes."""
    # This Python's headers serve: those of 64-bit Linux do not depend on the processor.
    headers = f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}"
    python = [f"-DPython_EXECUTABLE={sys.executable}", headers, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    cmake = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        "-DONEPASS_CUDA=OFF",
        "-DONEPASS_WERROR=ON",
        *python,
        *options,
    ]
    subprocess.run([*cmake, "-Wno-dev", "--log-level=WARNING"], check=True)
    subprocess.run(["cmake", "--build", str(folder), "--parallel", "--target", *targets], check=True)
    return folder / "engine_report"


def report(*command: str) -> dict[str, tuple[str, list[str]]]:
    """Kind and values by name, of every line the program prints."""
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {f"{what} {dtype}": (kind, values) for kind, what, dtype, *values in map(str.split, lines)}


def difference(dtype: str, came: list[str], expected: list[str]) -> float:
    """The largest, in units of what is allowed."""
    pairs = [(float(a), float(b)) for a, b in zip(came, expected, strict=True)]
    if not all(math.isfinite(value) for value in itertools.chain(*pairs)):
        return math.inf
    return max(abs(a - b) / (1 + abs(b)) for a, b in pairs) / TOLERANCE[dtype]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processor", default="aarch64", help="as GNU names it (default aarch64)")
    parser.add_argument("--build", type=Path, default=ROOT / "build/cross", help="folder (default build/cross)")
    args = parser.parse_args()
    compiler, emulator = f"{args.processor}-linux-gnu-g++", f"qemu-{args.processor}"
    for tool, package in ((compiler, f"g++-{args.processor}-linux-gnu"), (emulator, "qemu-user")):
        if shutil.which(tool) is None:
            print(f"not run: there is no {tool} (Debian's package {package})", file=sys.stderr)
            return 2

    cross = (
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={args.processor}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    theirs = build(args.build / args.processor, "_C", "engine_report", options=cross)
    ours = build(args.build / "native", "engine_report")
    came = report(emulator, "-L", f"/usr/{args.processor}-linux-gnu", str(theirs))
    expected = report(str(ours))

    wrong = sorted(came.keys() ^ expected.keys())
    worst = 0.0
    for name in sorted(came.keys() & expected.keys()):
        (kind, values), (_, reference) = came[name], expected[name]
        if kind == "close":
            units = difference(name.split()[-1], values, reference)
            worst = max(worst, units)
            fine = units <= 1
        else:
            fine = kind == "exact" and values == reference
        if not fine:
            wrong.append(f"{name} ({kind})")
    exact = sum(kind == "exact" for kind, _ in expected.values())
    print(f"{args.processor}: {exact} results compared bit by bit, {len(expected) - exact} by value")
    print(f"largest difference: {worst:.2f} of what is allowed; wrong: {len(wrong)}", *wrong, sep="\n  ")
    return 1 if wrong or not expected else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:  # it has printed why
        sys.exit(f"failed: {' '.join(error.cmd)}")
