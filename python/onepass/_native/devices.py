"""What this build and machine have: CUDA devices and streams, instruction sets, threads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch  # first: the extension finds torch's OpenMP runtime in the process and links none
from torch import Tensor

from .. import _C, _compat

fast_reader: bool = _C.set_reader(_compat.exchange_api(), _compat.describe)

# Whether this build has CUDA kernels. The test build that runs them on the host has, and gives them CPU tensors; has_cuda
# is false there, because no GPU is used.
cuda_kernels: bool = bool(_C.cuda_archs)
has_cuda: bool = cuda_kernels and not _C.cuda_on_host
cuda_archs: str = _C.cuda_archs
compiler: str = _C.compiler
thread_runtime: str = _C.thread_runtime()


def no_cuda_kernels(what: str, device: object) -> str:
    """The text of the error for a tensor on a GPU in a build for the CPU alone."""
    return (
        f"{what} is on {device}, but this build of onepass has no CUDA kernels. Build it where nvcc >= 12.1 is found, in "
        f"the folder of the source: pip install --force-reinstall --no-deps . -C cmake.define.ONEPASS_CUDA=ON"
    )


def cuda_versions() -> tuple[str, str]:
    """The CUDA that the kernels were built with and the newest one that the driver supports, as "13.0"; "" for none."""
    built, driver = (f"{number // 1000}.{number % 1000 // 10}" if number else "" for number in _C.cuda_versions())
    return built, driver


def is_on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels take this tensor."""
    return tensor.is_cuda or _C.cuda_on_host


def cuda_device_count() -> int:
    """The number of CUDA devices that this build's kernels see; 0 without a driver."""
    return _C.cuda_device_count()


def torch_device(index: int) -> torch.device:
    """The device whose index the CUDA kernels know."""
    return torch.device("cpu") if _C.cuda_on_host else torch.device("cuda", index)


def current_stream(index: int) -> int:
    """The handle of torch's current stream on a CUDA device."""
    return 0 if _C.cuda_on_host else _compat.current_stream(index)


def isas() -> tuple[str, ...]:
    """The CPU instruction sets that this build has and this machine runs, best last."""
    return tuple(_C.isas())


def isa() -> str:
    """The instruction set in use."""
    return _C.isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run with another instruction set, for tests: "baseline", "v3" or "v4"."""
    before = _C.isa()
    _C.use_isa(name)
    try:
        yield
    finally:
        _C.use_isa(before)


def _choose_isa() -> None:
    requested = os.environ.get("ONEPASS_ISA") or None
    if requested is not None and requested not in isas():
        raise ImportError(f"ONEPASS_ISA={requested}: this build and machine have {', '.join(isas())}")
    _C.use_isa(requested or isas()[-1])


_choose_isa()


_LARGE_PARAMETERS = 12010  # the first CUDA whose drivers take more than 4 KB of parameters per launch


def _warn_of_old_driver() -> None:
    """At import, so that it is not the first step that fails. Within a major version any driver runs the machine code."""
    build_number, driver_number = _C.cuda_versions()
    needed = max(build_number // 1000 * 1000, _LARGE_PARAMETERS)
    if build_number and 0 < driver_number < needed:
        built, driver = cuda_versions()
        warnings.warn(
            f"onepass was built with CUDA {built}, but the GPU driver of this machine supports CUDA {driver} at most, so the "
            f"kernels for GPUs will not run; those for the CPU will. Install a newer driver, or build onepass with an nvcc "
            f"that the driver supports.",
            RuntimeWarning,
            stacklevel=2,
        )


_warn_of_old_driver()
