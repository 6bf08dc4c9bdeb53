"""The memory limit of this machine: how fast the streams of a step could move if arithmetic were free.

On a CPU, ``stream.c`` is compiled for this machine and touches memory of the same size and widths as the step it is
compared with, in several ways: in which order the streams take turns, whether stores go around the caches. The fastest
way in a round is its limit. On a GPU the limit is the bandwidth of a large device-to-device copy. Each way is a variant like the
others, in the same rounds, because the bandwidth of a shared machine changes by the second.
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

import harness
import torch
from harness import Timed, Variant

# Above this size the bandwidth no longer depends on the size: larger lists are measured at this size and scaled.
MAX_ELEMENTS = 32_000_000
COPY_BYTES = 2**30
# torch's OpenMP workers spin for some milliseconds after a parallel region and would occupy the sweep's cores. Sleeping
# meanwhile would cost the sweep, and only the sweep, some percent: a core takes its time to wake up.
SETTLE_SECONDS = 0.005
# Elements of one stream that are touched before the next stream's turn.
BLOCKS = (64, 128)
# Streams whose addresses are equal modulo a power of 2 are up to 1.4 times slower: their lines compete for the same places
# in the caches, and loads seem to depend on stores to another stream. So each stream starts this many bytes further than
# the one before.
STAGGER = 2**16 + 33 * 64
PAGE = 4096
LINE = 64  # of stream.c


@dataclass(frozen=True)
class Pattern:
    """The streams of one pass, each in bytes per element: what is read, updated in place, overwritten."""

    read: tuple[int, ...] = ()
    update: tuple[int, ...] = ()
    overwrite: tuple[int, ...] = ()

    @property
    def bytes_per_element(self) -> int:
        return sum(self.read) + 2 * sum(self.update) + sum(self.overwrite)

    @property
    def streams(self) -> list[tuple[int, int]]:
        """Width and access (as numbered in stream.c) of each stream."""
        accesses = enumerate((self.read, self.update, self.overwrite))
        return [(width, access) for access, widths in accesses for width in widths]


# The passes of the wrappers, on float32.
SYNCHRONISE = Pattern(update=(4, 4))
NORM = Pattern(read=(4,))
PERTURB = Pattern(read=(4,), update=(4,), overwrite=(4,))
RESTORE = Pattern(read=(4,), overwrite=(4,))


def passes(param_bytes: int, states: int, clip: bool, state_bytes: int = 4, remainder: int = 0) -> list[Pattern]:
    """The passes of a step on parameters of 4 or 2 bytes and some states; clipping reads the gradients first.

    remainder: bytes of what a bfloat16 parameter has beside it (``master_bits``). The scales of 8-bit states are left out.
    """
    gradient = (param_bytes,)
    update = (param_bytes, *(state_bytes,) * states, *(remainder,) * (remainder > 0))
    return [Pattern(read=gradient)] * clip + [Pattern(read=gradient, update=update)]


def variants(patterns: Sequence[Pattern], elements: int, device: torch.device) -> list[Variant]:
    """The ways of measuring the limit of the passes over ``elements`` elements; none without a C compiler."""
    if device.type == "cuda":
        return [Variant(harness.LIMIT, CopyLimit(patterns, elements, device).copy)]
    if _compiler() is None:
        return []
    streams = Streams(patterns, elements)
    around_caches = (False, True) if any(pattern.overwrite for pattern in patterns) else (False,)
    return [
        Variant(
            f"{harness.LIMIT}, blocks of {block}{', around the caches' * around}",
            functools.partial(streams.sweep, block, around),
        )
        for block in BLOCKS
        for around in around_caches
    ]


class _Stream(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("width", ctypes.c_size_t), ("access", ctypes.c_int))


class _Pass(ctypes.Structure):
    _fields_ = (("streams", ctypes.POINTER(_Stream)), ("n_streams", ctypes.c_int))


class Streams:
    """Memory to sweep over on the CPU. The passes share it, as those of a step do."""

    def __init__(self, patterns: Sequence[Pattern], elements: int) -> None:
        self._elements = min(elements, MAX_ELEMENTS) // LINE * LINE
        self._scale = elements / self._elements
        widest = max(patterns, key=lambda pattern: pattern.bytes_per_element).streams
        # zero_(), not torch.zeros: untouched pages would all map to one cached page of zeros.
        self._memory = [
            torch.empty(self._elements * width + PAGE + i * STAGGER, dtype=torch.uint8).zero_()
            for i, (width, _) in enumerate(widest)
        ]
        starts = [-(-memory.data_ptr() // PAGE) * PAGE + i * STAGGER for i, memory in enumerate(self._memory)]
        self._passes = (_Pass * len(patterns))()
        for i, pattern in enumerate(patterns):
            streams = [_Stream(start, *stream) for start, stream in zip(starts, pattern.streams, strict=False)]
            self._passes[i] = _Pass((_Stream * len(streams))(*streams), len(streams))

    def sweep(self, block: int, around: bool) -> Timed:
        settled = time.perf_counter() + SETTLE_SECONDS
        while time.perf_counter() < settled:
            pass
        waited = ctypes.c_double()
        seconds = _stream_seconds()(
            self._passes,
            len(self._passes),
            self._elements,
            block,
            around,
            torch.get_num_threads(),
            ctypes.byref(waited),
        )
        if seconds < 0:
            raise RuntimeError(f"stream.c does not run with {torch.get_num_threads()} threads")
        return Timed(self._scale * seconds, self._scale * max(0.0, waited.value))


class CopyLimit:
    """What the memory of a GPU needs for the given passes, from the bandwidth of a large copy."""

    def __init__(self, patterns: Sequence[Pattern], elements: int, device: torch.device) -> None:
        self._bytes = elements * sum(pattern.bytes_per_element for pattern in patterns)
        self._source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def copy(self) -> Timed:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self._target.copy_(self._source)
        end.record()
        end.synchronize()
        return Timed(float(start.elapsed_time(end)) * 1e-3 * self._bytes / (2 * COPY_BYTES))


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
    size, number = ctypes.c_size_t, ctypes.c_int
    function.argtypes = [ctypes.POINTER(_Pass), number, size, size, number, number, ctypes.POINTER(ctypes.c_double)]
    function.restype = ctypes.c_double
    return function
