"""Builds native code for tests (the extension by CMake, CUDA sources as host code) and reads the reports of their runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

# -ffp-contract=off corresponds to nvcc's -fmad=false. -fno-strict-aliasing: kernels access memory as 16-byte words.
FLAGS = ["-std=c++17", "-g1", "-O1", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing", "-DONEPASS_CUDA_ON_HOST"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZERS = {
    "plain": [],
    "asan+ubsan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "tsan": ["-fsanitize=thread"],
}
# atexit_sleep_ms: otherwise ThreadSanitizer waits a second for late races.
SANITIZER_ENVIRONMENT = {"TSAN_OPTIONS": "atexit_sleep_ms=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(folder: Path, *targets: str, **options: str) -> None:
    """Configure and compile the project, or some targets, with these CMake options; an up-to-date build takes a second or two."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake is neither beside this Python nor on PATH"
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    options |= {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": output(sys.executable, "-m", "pybind11", "--cmakedir"),
        "ONEPASS_WERROR": "ON",
    }
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    for command in (
        [cmake, "-S", str(CSRC.parent), "-B", str(folder), *generator, *definitions],
        [
            cmake,
            "--build",
            str(folder),
            "--parallel",
            str(os.cpu_count()),
            *(["--target", *targets] if targets else []),
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def cuda_include() -> Path | None:
    """CUDA's headers, from a toolkit or the PyPI wheels nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl."""

    def candidates() -> Iterator[Path]:
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            if os.environ.get(variable):
                yield Path(os.environ[variable]) / "include"
        yield Path("/usr/local/cuda/include")
        for entry in sys.path:
            yield Path(entry or ".") / "nvidia" / "cu13" / "include"

    needed = ("cuda_fp16.h", "cuda_bf16.h", "vector_functions.h", "crt/host_defines.h", "nv/target")
    return next((path for path in candidates() if all((path / header).exists() for header in needed)), None)


def compile_program(source: Path, program: Path, include: Path, extra_flags: list[str], csrc: Path = CSRC) -> None:
    flags = [*FLAGS, *WARNINGS, *extra_flags]
    folders = ["-I", str(csrc), "-I", str(HERE), "-isystem", str(include)]
    command = [os.environ.get("CXX", "g++"), *flags, *folders, "-x", "c++", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def run_program(command: list[str], order: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **SANITIZER_ENVIRONMENT, "ONEPASS_HOST_ORDER": order}

    def run(*prefix: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*prefix, *command], env=env, capture_output=True, text=True, timeout=60, check=False)

    done = run()
    # The operating system randomises more address bits than ThreadSanitizer supports.
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        done = run("setarch", "-R")
    return done


# The possible reports of a run, in one or two words.
REPORTS = {
    "data race": "ThreadSanitizer: data race",
    "heap overflow": "AddressSanitizer: heap-buffer-overflow",
    "shared overflow": "AddressSanitizer: use-after-poison|beyond the end of a shared array",
    "index out of bounds": "out of bounds for type",
    "misaligned access": "misaligned address",
    "fault": "Sanitizer: SEGV",
    "divergent barrier": "divergent __syncthreads",
    "deadlock": "deadlock",
    "early return": "returned, but|have returned$",
    "wrong result": "wrong result",
}


def verdict(done: subprocess.CompletedProcess[str]) -> str:
    """The reports of a run; empty if it passed."""
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    output = done.stdout + done.stderr
    return next((word for word, text in REPORTS.items() if re.search(text, output, re.MULTILINE)), output)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
