"""Which constants of csrc/cuda/tuned.hpp a GPU prefers: builds with other values, measured in turn with the usual one.

    python benchmarks/gpu_variants.py build/gpu-variants --build      # compiles the others, can run beside tests
    python benchmarks/gpu_variants.py build/gpu-variants              # measures; tune.py then writes the best values

Each build runs in a process of its own, which waits while the others are measured. A ratio is a build's time over that of
the installed package, within a round. Saves <out>/gpu-variants-<date>-<gpu>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import layers
import machine
import optimizers
import torch
import tune
from harness import OURS, Json, Variant
from optimizers import Row

ROOT = Path(__file__).parent.parent
# Values in place of the present ones, the most promising first; each build changes at most one constant that a row depends on.
BUILDS: list[tune.Values] = [
    {"ONEPASS_STATE_STORE": 1, "ONEPASS_OUTPUT_STORE": 1},
    {"ONEPASS_STATE_STORE": 2, "ONEPASS_OUTPUT_STORE": 2},
    {"ONEPASS_REVERSE_AFTER_NORM": 0},
    {"ONEPASS_CHUNK_BYTES": 65536},
    {"ONEPASS_CHUNK_BYTES": 262144},
]
RUNS = 5  # of a row, one after the other in a process; their median is the time of a round
ROUNDS = 5
DEVICE = torch.device("cuda")


# ---- the rows, in a process of one build


def update_row(row: Row) -> Callable[[], Variant]:
    def make() -> Variant:
        return Variant(row.name, optimizers.make_optimizer(row, OURS, optimizers.make_params(row, DEVICE))[1])

    return make


def layer_row(case: layers.Case, what: str, then_read: bool = False) -> Callable[[], Variant]:
    """``then_read``: the result is read at once, as by the next layer: what stores left in the caches counts."""

    def make() -> Variant:
        operands = [operand.requires_grad_(what == "backward") for operand in case.operands(DEVICE)]
        layer = case.layers[OURS]
        if what == "backward":
            gradients = [torch.randn_like(output) for output in layers.first(layer(*operands))]
            both = layers.Both(layer, operands, gradients)
            return Variant("", both.backward, both.forward)
        forward = layers.Forward(layer, operands)
        if not then_read:
            return layers.after(Variant("", forward), harness.cache_eviction(DEVICE))
        return Variant("", lambda: [output.sum() for output in layers.first(forward())])

    return make


def rows() -> dict[str, tuple[str, Callable[[], Variant]]]:
    """{name: (kind, maker of what is timed)}"""
    large: list[tuple[int, ...]] = [(25_000_000,)]
    medium: list[tuple[int, ...]] = [(400, 400)] * 160
    bfloat16 = torch.bfloat16
    updates = [
        Row("1 x 25M", large, "AdamW"),
        Row("1 x 25M", large, "AdamW", bfloat16),
        Row("1 x 25M", large, "SGD"),
        Row("1 x 25M", large, "AdamW", format="8-bit states"),
        Row("160 x 160k", medium, "AdamW"),
        Row("160 x 160k", medium, "AdamW", clip=True),
        Row("1 x 25M", large, "AdamW", clip=True),
    ]
    norm = layers.norm_case(8192, 4096, bfloat16, False)
    batch_norm = layers.batch_norm_case((128, 1024, 14, 14), False, bfloat16)
    small = layers.norm_case(2048, 4096, bfloat16, False)  # 16 MB stay in the cache for whoever reads next
    result = {row.name: (tune.CLIPPED if row.clip else tune.UPDATES, update_row(row)) for row in updates}
    for case in (norm, batch_norm, layers.dropout_case(8192, 4096, bfloat16)):
        for what in ("forward", "backward"):
            result[layers.row_name(case, what)] = (tune.LAYERS, layer_row(case, what))
    result[f"{small.name} forward, then read"] = (tune.LAYERS, layer_row(small, "forward", then_read=True))
    return result


def serve() -> None:
    """Measure a row for each line of the input that names one: its seconds are a line of the output."""
    made: dict[str, Variant] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in made:
            made.clear()
            made[name] = rows()[name][1]()
        samples = harness.measure([made[name]], DEVICE, seconds=0, min_rounds=RUNS, max_rounds=RUNS, warm_up=1)
        (sample,) = samples.values()
        print(json.dumps(statistics.median(sample.seconds)), flush=True)


# ---- the builds


def folder_of(folder: Path, values: tune.Values) -> Path:
    return folder / "-".join(f"{name.removeprefix('ONEPASS_').lower()}-{value}" for name, value in values.items())


def build(folder: Path, archs: str, builds: Sequence[tune.Values]) -> None:
    """Into folders of their own. They share compiled files, and only CUDA's are compiled again."""
    for values in builds:
        tuning = ";".join(f"{name}={value}" for name, value in values.items())
        settings = {
            "build-dir": "build/gpu-{wheel_tag}",
            "cmake.define.ONEPASS_CUDA": "ON",
            "cmake.define.ONEPASS_CUDA_ARCHS": archs,
            "cmake.define.ONEPASS_TUNING": tuning,
        }
        target = folder_of(folder, values)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
        command += ["--target", str(target), *(f"--config-settings={key}={value}" for key, value in settings.items())]
        done = subprocess.run([*command, str(ROOT)], check=False, stdin=subprocess.DEVNULL)
        print(f"{tuning}: {'built' if done.returncode == 0 else 'does not compile'}", flush=True)


class Worker:
    """A process that measures with one build; None: the installed package."""

    def __init__(self, site: Path | None) -> None:
        path = os.environ.get("PYTHONPATH", "")
        environment = {
            **os.environ,
            "PYTHONPATH": path if site is None else os.pathsep.join([str(site.resolve()), path]),
        }
        command = [sys.executable, __file__, ".", "--serve"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def seconds(self, row: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(row + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


def measure(workers: Sequence[Worker], names: Sequence[str], seconds: float) -> dict[str, list[list[float]]]:
    """{row: [seconds of each round, per worker]}; rows that do not begin in time, or fail, are left out."""
    end = time.monotonic() + seconds
    times: dict[str, list[list[float]]] = {}
    for name in names:
        if time.monotonic() > end:
            print(f"the {seconds:g} s are used up before {name}", file=sys.stderr)
            break
        each: list[list[float]] = [[] for _ in workers]
        try:
            for round_ in range(ROUNDS):
                for i in range(len(workers)):
                    which = (i + round_) % len(workers)
                    each[which].append(workers[which].seconds(name))
        except (KeyboardInterrupt, OSError, ValueError) as error:  # the last two: a process has ended
            print(f"stopped in {name}: {type(error).__name__}", file=sys.stderr)
            break
        times[name] = each
    return times


def results(builds: Sequence[tune.Values], times: dict[str, list[list[float]]], kinds: dict[str, str]) -> Json:
    """What tune.py reads. times: of the present values first, then of each build."""
    described: list[Json] = []
    for i, values in enumerate(builds, 1):
        found = []
        for name, each in times.items():
            ratios = [other / base for other, base in zip(each[i], each[0], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
            found.append({"name": name, "kind": kinds[name], "ratio": quartiles})
        described.append({"values": values, "rows": found})
    return {
        "benchmark": "gpu-variants",
        "present": tune.present(tune.HEADER.read_text()),
        "median_ms": {name: 1e3 * statistics.median(each[0]) for name, each in times.items()},
        "builds": described,
    }


def text_of(result: Json) -> str:
    """A table: a line per row, a column per build."""
    labels = [" ".join(f"{k.removeprefix('ONEPASS_')}={v}" for k, v in b["values"].items()) for b in result["builds"]]
    lines = [f"{'row':44} {'ms':>8}  time over that of the present values, by build"]
    lines += [f"  build {i}: {label}" for i, label in enumerate(labels, 1)]
    for i, (name, ms) in enumerate(result["median_ms"].items()):
        ratios = "".join(f" {build['rows'][i]['ratio'][1]:>8.3f}" for build in result["builds"])
        lines.append(f"{name:44} {ms:>8.3f}{ratios}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the builds")
    parser.add_argument("--build", action="store_true", help="make the builds instead of measuring them")
    parser.add_argument("--archs", default="native", help="CUDA architectures to build for")
    parser.add_argument("--seconds", type=float, default=60, help="start no row after so many")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.build:
        build(args.folder, args.archs, BUILDS)
        return 0
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    if args.serve:
        serve()
        return 0
    builds = [values for values in BUILDS if any(folder_of(args.folder, values).glob("onepass/_C*.so"))]
    if not builds:
        parser.error(f"{args.folder} has no builds: make them with --build")
    workers = [Worker(None), *(Worker(folder_of(args.folder, values)) for values in builds)]
    kinds: dict[str, Any] = {name: kind for name, (kind, _) in rows().items()}
    try:
        times = measure(workers, list(kinds), args.seconds)
    finally:
        for worker in workers:
            worker.process.kill()
    if not times:
        print("no row was measured", file=sys.stderr)
        return 1
    result = results(builds, times, kinds) | {"environment": machine.environment(DEVICE)}
    print(text_of(result))
    print(f"saved {harness.save(result, args.out, 'gpu-variants')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
