"""The version and the build configuration of this installation."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import _native

try:
    __version__ = metadata.version("onepass")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

has_cuda: bool = _native.has_cuda


def environment() -> dict[str, str]:
    """The facts about this build and machine that a bug report needs, by name."""
    if not has_cuda:
        cuda = "not in this build (rebuild where nvcc >= 12.1 is found, with -C cmake.define.ONEPASS_CUDA=ON)"
    else:
        devices = _native.cuda_device_count()
        built, driver = _native.cuda_versions()
        versions = f"{built} (driver {driver or 'missing'}, torch {torch.version.cuda or 'without'})"
        cuda = f"{versions}; architectures {_native.cuda_archs}; {devices} device{'' if devices == 1 else 's'} visible"
    runtime = _native.thread_runtime
    threads = (
        "1 (no OpenMP runtime in this process)" if runtime == "none" else f"{torch.get_num_threads()} of {runtime}"
    )
    reader = "DLPack exchange" if _native.fast_reader else "Python attributes (torch >= 2.10 has a faster way)"
    return {
        "onepass": __version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": _native.compiler,
        "instruction set": f"{_native.isa()} (of {', '.join(_native.isas())})",
        "threads": threads,
        "cuda": cuda,
        "tensor access": reader,
        "rules": ", ".join(_native.rules()),
    }


def show_config() -> str:
    """A report on this build and machine for bug reports, one fact per line."""
    facts = environment()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
