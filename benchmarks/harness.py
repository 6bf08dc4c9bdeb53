"""How every benchmark here measures.

Variants run in rounds, one run of each per round (A B C, B C A, ...), so that a slow minute of the machine affects all of
them. A ratio is the median over the rounds of the ratio within a round, and its quartiles say how far to trust it. A round
in which threads had to wait for a core counts only where there are too few others: a program that synchronises its threads
a hundred times loses a hundred times as much then as one that does it once, which says nothing about either. Results are
plain dictionaries, saved as JSON with the versions and the machine; report.py presents them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces every start and stop otherwise

import machine
import torch

OURS, LIMIT = "onepass", "limit"
# A low percentile says what the code costs when nothing else runs; a median would include the other processes.
LOW_PERCENTILE = 20
# A run is quiet if its threads, ready to run, waited for a core for less than this share of its time, all together.
QUIET_SHARE = 0.05
# As many quiet rounds are needed. While there are fewer, a row goes on for up to PATIENCE times its time; then it takes as
# many of the least disturbed ones, and the result says so.
MIN_QUIET = 5
PATIENCE = 3
# Before a run is timed on a GPU, it is kept busy for half a millisecond, or for longer than the run before took to launch its
# kernels: they are waiting by then, and their time does not include that of the launches, which ``Samples.cpu`` says.
BUSY_CYCLES, MOST_BUSY_CYCLES, CYCLES_PER_SECOND = 1_000_000, 100_000_000, 2.5e9
_TASKS = Path("/proc/self/task")

Json = dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """What a run returns that measures its own time: seconds, and for how many its threads had to wait for a core."""

    seconds: float
    waited: float = 0.0


@dataclass
class Variant:
    """Something to measure: ``run`` is timed, unless it returns ``Timed``; ``prepare``, called before each run, is not."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Samples:
    """Seconds per run of one variant; entry i is from round i.

    On a GPU they are the GPU's time, and ``cpu`` is the time until the call returned. ``waited`` is how long threads of this
    process waited for a core meanwhile.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def disturbance(self) -> list[float]:
        return [waited / seconds for waited, seconds in zip(self.waited, self.seconds, strict=True)]

    def summary(self) -> Json:
        rounds, _ = calmest(self.disturbance)
        seconds = [self.seconds[i] for i in rounds]
        result: Json = {
            "p20_ms": 1e3 * percentile(seconds, LOW_PERCENTILE),
            "median_ms": 1e3 * statistics.median(seconds),
        }
        if self.cpu:
            result["cpu_p20_ms"] = 1e3 * percentile(self.cpu, LOW_PERCENTILE)
        return result

    def times(self, other: Samples) -> Ratio:
        """How many times as long as ``other`` this variant takes."""
        worse = [max(pair) for pair in zip(self.disturbance, other.disturbance, strict=True)]
        rounds, quiet = calmest(worse)
        ratios = [self.seconds[i] / other.seconds[i] for i in rounds]
        return Ratio(statistics.quantiles(ratios, n=4, method="inclusive"), quiet)


@dataclass(frozen=True)
class Ratio:
    """Lower quartile, median and upper quartile over rounds, and whether these were quiet."""

    quartiles: list[float]
    quiet: bool


def calmest(disturbance: Sequence[float]) -> tuple[list[int], bool]:
    """The rounds that count, and whether they are quiet."""
    quiet = [i for i, share in enumerate(disturbance) if share <= QUIET_SHARE]
    if len(quiet) >= MIN_QUIET:
        return quiet, True
    return sorted(range(len(disturbance)), key=disturbance.__getitem__)[:MIN_QUIET], False


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that ``percent`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def measure(
    variants: Sequence[Variant],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    warm_up: int = 2,
) -> dict[str, Samples]:
    """Run the variants in turn for about ``seconds``, preparations included, after ``warm_up`` unrecorded rounds."""
    for _ in range(warm_up):
        for variant in variants:
            variant.prepare()
            variant.run()
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    samples = {variant.name: Samples() for variant in variants}
    start, quiet_rounds = time.perf_counter(), 0
    for round_ in range(max_rounds):
        patience = 1 if quiet_rounds >= min(min_rounds, MIN_QUIET) else PATIENCE
        if round_ >= min_rounds and time.perf_counter() - start > patience * seconds:
            break
        first = round_ % len(variants)
        for variant in [*variants[first:], *variants[:first]]:
            sample(variant, samples[variant.name])
        quiet_rounds += all(sample.disturbance[-1] <= QUIET_SHARE for sample in samples.values())
    return samples


def results(samples: Mapping[str, Samples]) -> Json:
    """What a row says about its variants: milliseconds of each, ratios, and the share of the limit that onepass reaches.

    The limit is measured in several ways (see limit.py); that of a round is the fastest: the memory was able to do it.
    """
    peers = {name: sample for name, sample in samples.items() if not name.startswith(LIMIT)}
    result: Json = {
        "rounds": len(next(iter(samples.values())).seconds),
        "variants": {name: sample.summary() for name, sample in peers.items()},
        "ratios": {},
        "busy": [],  # peers whose ratio is from rounds in which other processes took a core
        "of_limit": None,
    }
    ours = peers.pop(OURS, None)
    if ours is None:
        return result
    for name, peer in peers.items():
        ratio = peer.times(ours)
        result["ratios"][name] = ratio.quartiles
        result["busy"] += [] if ratio.quiet else [name]
    limits = [list(zip(s.seconds, s.waited, strict=True)) for name, s in samples.items() if name.startswith(LIMIT)]
    if limits:
        fastest = [min(ways) for ways in zip(*limits, strict=True)]
        limit = Samples([seconds for seconds, _ in fastest], [waited for _, waited in fastest])
        share = limit.times(ours)
        if share.quiet:
            result["of_limit"] = share.quartiles
        else:  # it would be the limit of what others leave, not of the machine
            result["busy"].append(LIMIT)
    return result


def _sample_cpu(variant: Variant, samples: Samples) -> None:
    variant.prepare()
    waited = _waited()
    start = time.perf_counter()
    result = variant.run()
    elapsed = time.perf_counter() - start
    timed = result if isinstance(result, Timed) else Timed(elapsed, _waited() - waited)
    samples.seconds.append(timed.seconds)
    samples.waited.append(timed.waited)


def _sample_cuda(variant: Variant, samples: Samples) -> None:
    variant.prepare()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    cycles = int(CYCLES_PER_SECOND * samples.cpu[-1]) if samples.cpu else 0
    torch.cuda._sleep(min(max(cycles, BUSY_CYCLES), MOST_BUSY_CYCLES))  # type: ignore[no-untyped-call]
    begin.record()
    start = time.perf_counter()
    result = variant.run()
    cpu = time.perf_counter() - start
    end.record()
    end.synchronize()
    elapsed = float(begin.elapsed_time(end)) * 1e-3
    samples.seconds.append(result.seconds if isinstance(result, Timed) else elapsed)
    samples.waited.append(0.0)
    samples.cpu.append(cpu)


def _waited() -> float:
    """Seconds that the threads of this process have been ready to run without a core; 0 if the system does not count it."""
    total = 0
    for thread in _TASKS.iterdir() if _TASKS.exists() else ():
        with contextlib.suppress(OSError, IndexError):  # a thread that ends, a kernel without these numbers
            total += int((thread / "schedstat").read_text().split()[1])
    return 1e-9 * total


def cache_eviction(device: torch.device) -> Callable[[], object]:
    """A function that leaves nothing of the variants in the caches: memory-bound runs should all start from memory."""
    if device.type == "cuda":
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    else:
        size = 2 * _last_level_cache()
    filler = torch.zeros(size // 4, device=device)
    # On a GPU only read: what is written would be stored while the next run is timed.
    return filler.sum if device.type == "cuda" else lambda: filler.add_(1)


def _last_level_cache() -> int:
    """Bytes of a core's largest cache; 32 MiB if the system does not say."""
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) * 1024 for size in sizes), default=32 * 2**20)


def path_of(result: Mapping[str, Any], folder: Path, benchmark: str) -> Path:
    """Where save() writes."""
    environment = result["environment"]
    return folder / f"{benchmark}-{environment['date'][:10]}-{machine.slug(environment)}.json"


def save(result: Mapping[str, Any], folder: Path, benchmark: str) -> Path:
    """Write ``<folder>/<benchmark>-<date>-<machine>.json`` atomically and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(result, folder, benchmark)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(_rounded(result), indent=1) + "\n")
    unfinished.replace(path)
    return path


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most that ``run`` has allocated at any one time, in bytes. What was there before counts neither way.

    On a CPU torch's profiler lists every allocation of torch's allocator, from which onepass takes its memory as well. So
    the number is exact, other than the process's resident memory, which the C library does not give back.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: float(event["ts"]))
    held: dict[int, int] = {}
    total = peak = 0
    for event in events:
        address, size = event["args"]["Addr"], int(event["args"]["Bytes"])
        if size > 0:
            held[address] = size
        else:
            size = -held.pop(address, 0)  # 0: it was there before
        total += size
        peak = max(peak, total)
    return peak


def _rounded(value: Any) -> Any:
    """Round to five significant digits: more is noise, and a diff of two results should be readable."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
