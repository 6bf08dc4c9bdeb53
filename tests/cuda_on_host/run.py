"""Builds the extension with the CUDA kernels for the host, with and without sanitizers, and runs the tests on it.

    python tests/cuda_on_host/run.py [--build build/cuda-on-host] [REGEX]    # of the names of some runs

The whole suite runs once, in random thread order; test_*kernels.py, which launch every kernel, also in the other orders
and under the sanitizers. Prints one line per run, and the output of failed runs. cuda_on_host.hpp says what a run can show.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from host_compiler import build, cuda_include, output

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ["tests/cuda_on_host/test_*kernels.py"]
SUITE = [
    *KERNELS,
    "tests/cuda_on_host/test_same_bits.py",
    "tests/test_clip.py",
    "tests/test_optim_*.py",
    "tests/test_nn_*.py",
]
CXX = os.environ.get("CXX", "g++")


@dataclass
class Run:
    name: str
    order: str
    tests: list[str]
    module: str = "."  # folder of the extension in the build
    preload: tuple[str, ...] = ()  # the interpreter was not linked with the sanitizer
    environment: dict[str, str] = field(default_factory=dict)
    select: str = ""  # for pytest -k; without it the run has to launch every kernel


SANITIZED = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},  # the interpreter leaks
    # ThreadSanitizer sees neither the code that runs beside the kernels nor OpenMP's barriers.
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0:ignore_noninstrumented_modules=1"},
}
RUNS = [  # longest first
    Run("the whole suite", "random:1", SUITE),
    Run(
        "kernels, ThreadSanitizer",
        "forward",
        KERNELS,
        "thread",
        ("libtsan.so",),
        SANITIZED["thread"],
        # Threads synchronise at the same points for every dtype, and are 20 times slower here.
        select="not (float64 or float16 or turn or every_width or large_chunks)",
    ),
    Run(
        "kernels, Address- and UndefinedBehaviorSanitizer",
        "random:2",
        KERNELS,
        "address",
        ("libasan.so", "libstdc++.so"),  # the sanitizer looks up throw when the process starts
        SANITIZED["address"],
    ),
    Run("kernels", "forward", KERNELS),
    Run("kernels", "reverse", KERNELS),
]


def preload(run: Run) -> dict[str, str]:
    return {"LD_PRELOAD": " ".join(output(CXX, f"-print-file-name={library}") for library in run.preload)}


def prefix(run: Run) -> list[str]:
    """A command before the interpreter: older versions of ThreadSanitizer abort if addresses are too random."""
    if not run.preload or not shutil.which("setarch"):
        return []
    command = [sys.executable, "-S", "-c", ""]
    started = subprocess.run(command, env={**os.environ, **preload(run)}, capture_output=True, check=False)
    return [] if started.returncode == 0 else ["setarch", "-R"]


def execute(run: Run, folder: Path) -> tuple[Run, subprocess.CompletedProcess[str], float]:
    start = time.monotonic()
    extensions = list((folder / run.module).glob("_C*.so"))
    assert len(extensions) == 1, f"one extension expected in {folder / run.module}, found {extensions}"
    environment = {
        **os.environ,
        **run.environment,
        **(preload(run) if run.preload else {}),
        "ONEPASS_TEST_BACKEND": "cuda-on-host",
        "ONEPASS_TEST_EXTENSION": str(extensions[0].resolve()),
        "ONEPASS_TEST_EVERY_KERNEL": "" if run.select else "1",
        "ONEPASS_HOST_ORDER": run.order,
        "OMP_NUM_THREADS": "1",  # there are already as many runs as cores
    }
    tests = [str(path.relative_to(ROOT)) for pattern in run.tests for path in sorted(ROOT.glob(pattern))]
    # pytest captures only Python's output: the report of a sanitizer that ends the process has to get through.
    command = [*prefix(run), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys"]
    command += ["-k", run.select] if run.select else []
    done = subprocess.run([*command, *tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return run, done, time.monotonic() - start


def first(pattern: str, text: str, default: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else default


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda-on-host", help="folder of the build")
    parser.add_argument("runs", nargs="?", default="", metavar="REGEX", help="only the runs whose names match")
    options = parser.parse_args()
    folder, runs = options.build, [run for run in RUNS if re.search(options.runs, run.name)]
    if cuda_include() is None:
        print("CUDA's headers are missing: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl")
        return 1
    start = time.monotonic()
    build(folder, ONEPASS_CUDA_ON_HOST="ON", ONEPASS_SANITIZE="address,undefined;thread")
    print(f"CUDA kernels on the host: built in {time.monotonic() - start:.0f} s", flush=True)
    line = "{:50} {:>9} {:>6} {:>8} {:>8} {:>9} {:>11} {:>6}"
    print(line.format("run", "order", "passed", "failed", "kernels", "launches", "threads", "time"), flush=True)
    cases, failed = 0, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for run, done, seconds in pool.map(lambda run: execute(run, folder), runs):
            passed = first(r"(\d+) passed", done.stdout, "0")
            failures = first(r"(\d+) failed", done.stdout, "0" if done.returncode == 0 else "-")
            kernels = first(r"(\d+ of \d+) kernels", done.stdout, "-")
            launches, threads = (first(rf"(\d+) {what}", done.stdout, "-") for what in ("launches", "threads"))
            print(line.format(run.name, run.order, passed, failures, kernels, launches, threads, f"{seconds:.0f} s"))
            sys.stdout.flush()
            cases += int(passed)
            if done.returncode != 0:
                failed.append((run, done))
    for run, done in failed:
        print(f"\n=== {run.name}, {run.order}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-12000:]}")
    print(f"{cases} cases passed on the CUDA kernels, {len(failed)} of {len(runs)} runs failed", end=", ")
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
