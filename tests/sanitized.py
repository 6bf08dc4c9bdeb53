"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of the CPU kernels on it.

    python tests/sanitized.py [--build build/sanitized] [PYTEST_ARGUMENTS...]

What it finds ends the process: reads and writes beyond an array, memory used after it was freed, arithmetic that C++
leaves undefined. Kernels of every instruction set that this machine has are run by test_optim_exactness.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CXX = os.environ.get("CXX", "g++")
TESTS = [
    "tests/test_native.py",
    "tests/test_boundary.py",
    "tests/test_boundary_fuzz.py",
    "tests/test_boundary_operators.py",
    "tests/test_clip.py",
    "tests/test_nn_batch_norm*.py",
    "tests/test_nn_dropout*.py",
    "tests/test_nn_exactness.py",
    "tests/test_nn_laws.py",
    "tests/test_nn_norm.py",
    "tests/test_optim_exactness.py",
    "tests/test_optim_layouts.py",
    "tests/test_optim_lookahead.py",
    "tests/test_optim_sam.py",
    "tests/test_optim_single_rules.py",
    "tests/test_optim_sparse.py",
    "tests/test_tensor_access.py",
]


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(folder: Path) -> Path:
    """Configures and compiles; gives the extension."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake is neither beside this Python nor on PATH"
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    options = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": output(sys.executable, "-m", "pybind11", "--cmakedir"),
        "ONEPASS_CUDA": "OFF",
        "ONEPASS_WERROR": "ON",
        "ONEPASS_SANITIZE": "address,undefined",
    }
    for command in (
        [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            *generator,
            *(f"-D{key}={value}" for key, value in options.items()),
        ],
        [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    (extension,) = folder.glob("_C*.so")
    return extension


def main() -> int:
    arguments = sys.argv[1:]
    folder = ROOT / "build" / "sanitized"
    if arguments[:1] == ["--build"]:
        folder, arguments = Path(arguments[1]), arguments[2:]
    start = time.monotonic()
    extension = build(folder)
    print(f"sanitized extension: built in {time.monotonic() - start:.0f} s", flush=True)
    libraries = (output(CXX, f"-print-file-name={library}") for library in ("libasan.so", "libstdc++.so"))
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),  # the interpreter was not linked with the sanitizer
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ONEPASS_TEST_EXTENSION": str(extension.resolve()),
    }
    tests = [str(path.relative_to(ROOT)) for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    # Only what Python writes is captured: a sanitizer that ends the process has the last word.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", *arguments]
    named = any(argument.startswith("tests/") for argument in arguments)
    return subprocess.run([*command, *([] if named else tests)], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
