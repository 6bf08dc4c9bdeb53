"""The memory limit of this machine: how fast the streams of a step could move if arithmetic were free.

On a CPU, ``stream.c`` is compiled for this machine and sweeps memory of the same size, widths and order as the step
it is compared with. On a GPU the limit is the bandwidth of a large device-to-device copy. Both are measured in the same run
as the step, because the bandwidth of a shared machine changes by the hour.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Above this size the bandwidth no longer depends on the size: larger lists are measured at this size and scaled.
MAX_ELEMENTS = 32_000_000
COPY_BYTES = 2**30
# torch's OpenMP workers spin for some milliseconds after a parallel region and would occupy the sweep's cores.
SETTLE_SECONDS = 0.005


@dataclass(frozen=True)
class Pattern:
    """The streams of one pass, in bytes per element: what is read, each value updated in place, what is only written."""

    index: int  # in enum pattern of stream.c
    read: int
    inplace: tuple[int, ...] = ()
    write: int = 0

    @property
    def bytes_per_element(self) -> int:
        return self.read + 2 * sum(self.inplace) + self.write

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes per element of each stream, in the order of stream.c."""
        return tuple(width for width in (self.read, *self.inplace, self.write) if width)


READ = Pattern(0, read=4)
READ_HALF = Pattern(5, read=2)
# The passes of the wrappers, on float32.
SYNCHRONISE = Pattern(7, read=0, inplace=(4, 4))
PERTURB = Pattern(8, read=4, inplace=(4,), write=4)
RESTORE = Pattern(9, read=4, write=4)
_STEPS = {
    (4, 1): Pattern(1, read=4, inplace=(4, 4)),
    (4, 2): Pattern(2, read=4, inplace=(4, 4, 4)),
    (4, 3): Pattern(6, read=4, inplace=(4, 4, 4, 4)),
    (2, 1): Pattern(3, read=2, inplace=(2, 4)),
    (2, 2): Pattern(4, read=2, inplace=(2, 4, 4)),
}


def passes(param_bytes: int, states: int, clip: bool) -> list[Pattern]:
    """The passes of a step on parameters of 4 or 2 bytes and 1 to 3 float32 states; clipping reads the gradients first."""
    norm = READ if param_bytes == 4 else READ_HALF
    return [norm] * clip + [_STEPS[param_bytes, states]]


class StreamLimit:
    """Seconds that the memory of this machine needs for the given passes over ``elements`` elements on the CPU."""

    def __init__(self, patterns: Sequence[Pattern], elements: int) -> None:
        self._patterns = patterns
        self._elements = min(elements, MAX_ELEMENTS)
        self._scale = elements / self._elements
        widest = max(patterns, key=lambda pattern: pattern.bytes_per_element)
        # zero_(), not torch.zeros: untouched pages would all map to one cached page of zeros.
        self._streams = [torch.empty(self._elements * width, dtype=torch.uint8).zero_() for width in widest.widths]

    def seconds(self) -> float:
        time.sleep(SETTLE_SECONDS)
        sweep = _stream_seconds()
        pointers = (ctypes.c_void_p * len(self._streams))(*(stream.data_ptr() for stream in self._streams))
        threads = torch.get_num_threads()
        return self._scale * sum(sweep(p.index, pointers, self._elements, threads) for p in self._patterns)


class CopyLimit:
    """Seconds that the memory of a GPU needs for the given passes, from the bandwidth of a large copy."""

    def __init__(self, patterns: Sequence[Pattern], elements: int, device: torch.device) -> None:
        self._bytes = elements * sum(pattern.bytes_per_element for pattern in patterns)
        self._source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self._target.copy_(self._source)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 * self._bytes / (2 * COPY_BYTES)


def available() -> bool:
    """Whether the limit of the CPU can be measured, which requires a C compiler."""
    return _compiler() is not None


def _compiler() -> str | None:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


@functools.cache
def _stream_seconds() -> Callable[..., float]:
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C compiler (cc, gcc, clang or $CC): the memory limit cannot be measured")
    source = Path(__file__).with_name("stream.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stream.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).stream_seconds
    function.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_double

    def seconds(*arguments: object) -> float:
        result = float(function(*arguments))
        if result < 0:
            raise RuntimeError(f"stream.c does not run with {arguments[-1]} threads")
        return result

    return seconds
