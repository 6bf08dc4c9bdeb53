"""How `bench` measures: in rounds, and with an eye on other processes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

_MAX_ROUNDS = 1000
# A run is disturbed if its threads, ready to run, waited for a core for more than this share of its time, all together. A
# step that synchronises its threads a hundred times loses a hundred times as much then as one that does it once.
_DISTURBED_SHARE = 0.05
# With fewer undisturbed rounds than this, all rounds count, and the result says so.
_MIN_QUIET = 3
_THREADS = Path("/proc/self/task")


@dataclass
class Samples:
    """Seconds per call of one variant, and whether the call was disturbed; entry i is from round i."""

    seconds: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    def median(self) -> float:
        rounds, _ = quiet_rounds(self.disturbed)
        return statistics.median(self.seconds[i] for i in rounds)

    def times(self, other: Samples) -> tuple[list[float], bool]:
        """How many times as long as `other` this takes: the quartiles over the rounds, and whether these were quiet."""
        rounds, quiet = quiet_rounds([a or b for a, b in zip(self.disturbed, other.disturbed, strict=True)])
        ratios = [self.seconds[i] / other.seconds[i] for i in rounds]
        return statistics.quantiles(ratios, n=4, method="inclusive"), quiet


def quiet_rounds(disturbed: Sequence[bool]) -> tuple[list[int], bool]:
    """The rounds that count, and whether they were quiet."""
    quiet = [i for i, was_disturbed in enumerate(disturbed) if not was_disturbed]
    return (quiet, True) if len(quiet) >= _MIN_QUIET else (list(range(len(disturbed))), False)


def measure(
    steps: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, min_rounds: int
) -> dict[str, Samples]:
    """Call each step once per round, for about `seconds` in all and at least `min_rounds` rounds.

    Each round starts with another one (A B C, B C A, ...), so that a slow minute of the machine affects all of them.
    """
    names = list(steps)
    for _ in range(2):  # the first step creates the states
        for name in names:
            steps[name]()
    samples = {name: Samples() for name in names}
    end = time.perf_counter() + seconds
    for round_ in range(_MAX_ROUNDS):
        if round_ >= min_rounds and time.perf_counter() > end:
            break
        for i in range(len(names)):
            name = names[(round_ + i) % len(names)]
            waited = _waited()
            elapsed = _time(steps[name], device)
            samples[name].seconds.append(elapsed)
            samples[name].disturbed.append(_waited() - waited > _DISTURBED_SHARE * elapsed)
    return samples


def _time(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _waited() -> float:
    """Seconds that this process's threads have been ready to run without a core; 0 if the system does not count them."""
    nanoseconds = 0
    with contextlib.suppress(OSError):
        for thread in _THREADS.iterdir():
            with contextlib.suppress(OSError, IndexError):  # a thread that ends; a kernel without the number
                nanoseconds += int((thread / "schedstat").read_text().split()[1])
    return 1e-9 * nanoseconds
