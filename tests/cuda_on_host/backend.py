"""Chooses the native code of a test process: the installed extension, another build, or the CUDA kernels on the host.

ONEPASS_TEST_EXTENSION names a module that replaces onepass._C. With ONEPASS_TEST_BACKEND=cuda-on-host it contains the
CUDA kernels built for the host, and every step on a CPU tensor goes through the CUDA binding, its launches and its
kernels. Call choose() before `import onepass`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys

import torch  # first: the extension finds torch's OpenMP runtime in the process

BACKENDS = ("native", "cuda-on-host")


def choose() -> str:
    name = os.environ.get("ONEPASS_TEST_BACKEND", "native")
    if name not in BACKENDS:
        raise ValueError(f"ONEPASS_TEST_BACKEND is {name!r}, expected one of {BACKENDS}")
    path = os.environ.get("ONEPASS_TEST_EXTENSION")
    if name == "cuda-on-host" and path is None:
        raise ValueError("ONEPASS_TEST_BACKEND is 'cuda-on-host', but no ONEPASS_TEST_EXTENSION names the extension")
    if path is not None and "onepass._C" not in sys.modules:
        if "onepass" in sys.modules:
            raise RuntimeError("onepass was imported before its backend was chosen")
        spec = importlib.util.spec_from_file_location("onepass._C", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"ONEPASS_TEST_EXTENSION is {path!r}: no extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if module.cuda_on_host != (name == "cuda-on-host"):
            raise ImportError(f"{path} was built with -DONEPASS_CUDA_ON_HOST={'ON' if module.cuda_on_host else 'OFF'}")
        sys.modules["onepass._C"] = module
    return name


def kernel_device() -> torch.device | None:
    """The device whose tensors the CUDA kernels accept in this process; None without a GPU and with the native backend."""
    from onepass import _native

    if _native.cuda_kernels and not _native.has_cuda:
        return torch.device("cpu")
    return torch.device("cuda") if _native.has_cuda and torch.cuda.is_available() else None


def counters() -> dict[str, int]:
    """Counters over all launches on the host so far."""
    numbers = (ctypes.c_uint64 * 3)()
    ctypes.CDLL(sys.modules["onepass._C"].__file__).onepass_host_counters(numbers)
    return dict(zip(("launches", "blocks", "threads"), numbers, strict=True))


def kernels() -> dict[str, bool]:
    """Every kernel in the host's extension, and whether it was launched."""
    path = sys.modules["onepass._C"].__file__
    offsets = (ctypes.c_uint64 * 4096)()
    n = ctypes.CDLL(path).onepass_host_kernels(offsets, len(offsets))
    launched = set(offsets[:n])
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # nm must run without the sanitizer
    command = ["nm", "-C", "--defined-only", path]
    symbols = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tTwW] (?:void )?(onepass::cuda::.*_kernel\b.*)$", symbols, re.MULTILINE)
    # The class that launches a kernel has it as a template argument.
    return {name: int(address, 16) in launched for address, name in found if "Launcher<" not in name}
