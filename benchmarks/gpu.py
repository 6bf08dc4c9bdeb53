"""What a GPU has to say: every kernel's time and share of a large copy's bandwidth, beside every path of torch.

    python benchmarks/gpu.py                       # an hour, nearly all of it in torch.compile
    python benchmarks/gpu.py --no-compile          # two minutes, as in `make gpu`
    python benchmarks/gpu.py --list                # the rows, without a GPU
    python benchmarks/gpu.py --filter 'BatchNorm.*14x14'

Rows come in the order of what is least certain, so a budget may end the run anywhere. A time is the GPU's, from the first
kernel to the last; "CPU ms" is until the call returns. Below the table stand the rows under 90 % of the copy, those that are
slower than torch, and how many kernels a step launches.

Saves <out>/gpu-<date>-<gpu>.json after every row.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator

import layers
import limit
import optimizers
import runner
import torch
from harness import OURS, Json, Variant
from layers import Case
from machine import onepass
from networks import Shapes
from optimizers import Row

List = tuple[str, Shapes]  # of tensors, with its name

ENOUGH = 0.9  # of the copy
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# ResNet-50's: channels and width.
STAGES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
NORM_ELEMENTS = 10**9
LARGE: List = ("1 x 25M", [(25_000_000,)])
MEDIUM: List = ("160 x 160k", [(400, 400)] * 160)
TINY: List = ("1000 x 256", [(256,)] * 1000)
QUICK: List = ("1 x 1M", [(1_000_000,)])

Pass = tuple[Case, str]


def first_updates(quick: bool) -> Iterator[Row]:
    yield from (Row(*(QUICK if quick else LARGE), "AdamW", dtype) for dtype in (FLOAT32, BFLOAT16))
    yield Row(*TINY, "AdamW")


def other_updates() -> Iterator[Row]:
    for dtype in (FLOAT32, BFLOAT16):
        yield from (Row(*MEDIUM, "AdamW", dtype, clip=clip) for clip in (False, True))
    yield Row(*LARGE, "AdamW", clip=True)
    yield from (Row(*LARGE, "AdamW", format=kept) for kept in ("bfloat16 states", "8-bit states"))
    for kept in ("8-bit states", "8-bit states, 24-bit master", "8-bit states, 32-bit master"):
        yield Row(*LARGE, "AdamW", BFLOAT16, format=kept)
    others = [rule for rule in optimizers.RULES if rule not in ("AdamW", "Adam", "SparseAdam")]
    yield from (Row(*LARGE, rule) for rule in others)
    yield from (Row(*LARGE, rule, BFLOAT16) for rule in others)
    yield from (Row(*LARGE, rule, FLOAT16) for rule in ("AdamW", "SGD"))
    yield from (Row(*TINY, "AdamW", clip=True), Row(*TINY, "SGD"), Row(*MEDIUM, "SGD"))
    yield from (Row("8192 of 400k rows", [(400_000, 64)], rule, rows=8192) for rule in optimizers.SPARSE_RULES)


def both(cases: Iterable[Case]) -> Iterator[Pass]:
    return itertools.product(cases, ("forward", "backward"))


def norms(sizes: Iterable[int], dtype: torch.dtype, rms: bool = False) -> Iterator[Pass]:
    return both(layers.norm_case(2**25 // size, size, dtype, rms) for size in sizes)


def batch_norms(stages: Iterable[tuple[int, int]], dtype: torch.dtype) -> Iterator[Pass]:
    shapes = ((128, channels, width, width) for channels, width in stages)
    return both(layers.batch_norm_case(shape, last, dtype) for shape in shapes for last in (False, True))


def first_layers(quick: bool) -> Iterator[Pass]:
    if quick:
        yield from both([layers.norm_case(256, 1024, BFLOAT16, False)])
        return
    yield from norms((1024, 4096, 8192), BFLOAT16)
    yield from batch_norms(STAGES[3:], BFLOAT16)


def other_layers() -> Iterator[Pass]:
    yield from both(layers.fused_case(8192, 4096, dtype) for dtype in (BFLOAT16, FLOAT32))
    yield from both(layers.dropout_case(8192, 4096, dtype) for dtype in (BFLOAT16, FLOAT32))
    yield from norms((768, 1000, 2048, 4095), BFLOAT16)
    yield from norms((1024, 4096), BFLOAT16, rms=True)
    yield from norms((768, 4096, 4095), FLOAT32)
    yield from batch_norms(STAGES[:3], BFLOAT16)
    yield from batch_norms(STAGES[1:4], FLOAT32)
    yield from norms((4096,), FLOAT16)


def measure_norm(elements: int, settings: runner.Settings) -> Json:
    """clip_grad_norm_ of one gradient, which reads it and then scales it."""
    param = torch.zeros(elements, dtype=BFLOAT16, device=settings.device, requires_grad=True)
    param.grad = torch.ones_like(param)
    variants = [Variant("torch", lambda: torch.nn.utils.clip_grad_norm_([param], 1e30))]
    if onepass is not None:
        variants.insert(0, Variant(OURS, lambda: onepass.optim.clip_grad_norm_([param], 1e30)))
    passes = [limit.Pattern(read=(2,)), limit.Pattern(update=(2,))]
    description = {
        "case": norm_name(elements),
        "name": norm_name(elements),
        "rule": "clip_grad_norm_",
        "dtype": "bfloat16",
        "clip": True,
        "elements": elements,
        "bytes_moved": elements * sum(pattern.bytes_per_element for pattern in passes),
    }
    limits = limit.variants(passes, elements, settings.device)
    return runner.row(description, variants, limits, {"left_out": "it is an optimizer's business"}, settings)


def norm_name(elements: int) -> str:
    return f"clip_grad_norm_ of {elements / 1e6:g}M bf16"


def jobs(quick: bool) -> Iterator[runner.Job]:
    def update_job(row: Row) -> runner.Job:
        needed = row.bytes_needed(len(optimizers.paths_of(row)))
        return runner.Job(row.name, functools.partial(optimizers.measure, row), needed)

    def layer_job(case: Case, what: str) -> runner.Job:
        return runner.Job(layers.row_name(case, what), functools.partial(layers.measure, case, what))

    elements = 10**6 if quick else NORM_ELEMENTS
    yield from map(update_job, first_updates(quick))
    yield from itertools.starmap(layer_job, first_layers(quick))
    yield runner.Job(norm_name(elements), functools.partial(measure_norm, elements), 8 * elements)
    if not quick:
        yield from map(update_job, other_updates())
        yield from itertools.starmap(layer_job, other_layers())


def summary(result: Json) -> str:
    """What there is to mend, in the order of the rows."""
    lines = []
    shares = [(row["name"], row["of_limit"][1]) for row in result["rows"] if row["of_limit"]]
    below = [f"  {name}: {100 * share:.0f} %" for name, share in shares if share < ENOUGH]
    lines += [f"Under {100 * ENOUGH:.0f} % of the copy, {len(below)} of {len(shares)} rows:", *below]
    slower = []
    for row in result["rows"]:
        for name, (_, median, upper) in row["ratios"].items():
            if upper < 1 and not name.startswith(OURS):
                slower.append(f"  {row['name']}: {1 / median:.2f} times the time of {name}")
    lines += [f"Slower than torch, {len(slower)}:", *slower]
    for row in result["rows"]:
        if row.get("kernels"):
            each = ", ".join(f"{name} {n}" for name, n in row["kernels"].items())
            lines.append(f"Kernels of a step, {row['name']}: {each}.")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return runner.main("gpu", __doc__ or "", jobs, argv, device="cuda", summary=summary)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
