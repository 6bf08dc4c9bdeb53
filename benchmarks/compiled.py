"""torch.compile as a peer: compiles before the timing starts, says how long that took or why it is left out."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Json

NAME = "compile"


def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for shapes that stay as they are. Forgets what was compiled for earlier rows."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def first_call(function: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Json:
    """Call a compiled function until nothing new is compiled: ``{"seconds": ...}``, or ``{"left_out": reason}``.

    ``prepare`` is called before each call.
    """
    seconds = 0.0
    for _ in range(4):  # the second call may find gradients or states that the first one has made
        before = graphs()
        prepare()
        start = time.perf_counter()
        try:
            function()
        except Exception as error:  # compilers fail in many ways, and the other variants are still to be measured
            return left_out(f"it fails with {type(error).__name__}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if graphs() == before:
            return {"seconds": seconds}
        seconds += time.perf_counter() - start
    return left_out("every call compiles again")


def left_out(reason: str) -> Json:
    return {"left_out": reason}


def graphs() -> int:
    """Functions compiled so far. If the number grows while something is timed, the time is not the compiled code's."""
    from torch._dynamo.utils import counters

    return int(counters["frames"]["total"])


@functools.cache
def unavailable() -> str:
    """Why nothing can be compiled here; empty if it can. Also does what every process has to do once."""
    # A cache of this process alone: a row shows what compilation takes, not what an earlier run has left on disk.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache().name
    logging.getLogger("torch._dynamo").setLevel(
        logging.ERROR
    )  # torch's optimizers have profiler ranges, which it drops
    warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor|functorch)")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64))
    except Exception as error:
        cause = str(error).strip().splitlines()
        return f"torch.compile does not work here: {cause[0] if cause else type(error).__name__}"
    return ""


@functools.cache
def _cache() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="onepass-compiled-", ignore_cleanup_errors=True)
