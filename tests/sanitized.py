"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of the CPU kernels on it.

    python tests/sanitized.py [--build build/sanitized] [PYTEST_ARGUMENTS...]

A finding ends the process: reads and writes beyond an array, memory used after it was freed, arithmetic that C++ leaves
undefined. test_optim_exactness.py runs the kernels of every instruction set that this machine has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cuda_on_host.host_compiler import build, output

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


def main() -> int:
    arguments = sys.argv[1:]
    folder = ROOT / "build" / "sanitized"
    if arguments[:1] == ["--build"]:
        folder, arguments = Path(arguments[1]), arguments[2:]
    start = time.monotonic()
    build(folder, ONEPASS_CUDA="OFF", ONEPASS_SANITIZE="address,undefined")
    (extension,) = folder.glob("_C*.so")
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
    # pytest captures only Python's output: the report of a sanitizer that ends the process has to get through.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", *arguments]
    named = any(argument.startswith("tests/") for argument in arguments)
    return subprocess.run([*command, *([] if named else tests)], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
