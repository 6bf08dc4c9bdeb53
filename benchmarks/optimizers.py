"""How long a step takes: onepass against every path of torch.optim, on lists of tensors from one large to many tiny.

The timed call is the user's whole ``step()``, including checks and bookkeeping (and, with clipping, the code a user writes
for it). Lists small enough for the caches get new gradient tensors before each step, as after a backward pass. The columns:
milliseconds (20th percentile) of onepass and of the fastest torch path, their ratio, onepass's throughput (the bytes a step
has to move per second), and its share of the memory's limit (see limit.py).

    python benchmarks/optimizers.py --filter 'adamw'     # rows whose name matches a regular expression
    python benchmarks/optimizers.py --device cuda

Saves <out>/optimizers-<date>-<machine>.json after every row, and a plot of it at the end; report.py reads them.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import limit
import report
import torch
from harness import Json, Variant, onepass
from networks import Shapes, gpt2_small, resnet50

MAX_NORM = 1.0


@dataclass(frozen=True)
class Rule:
    """An optimizer, its arguments, and the number of states per element that they imply."""

    optimizer: str
    states: int
    options: dict[str, float]


RULES = {
    "SGD": Rule("SGD", 1, {"lr": 1e-3, "momentum": 0.9}),
    "Adam": Rule("Adam", 2, {"lr": 1e-3}),
    "AdamW": Rule("AdamW", 2, {"lr": 1e-3, "weight_decay": 0.01}),
    "NAdam": Rule("NAdam", 2, {"lr": 1e-3}),
    "RMSprop": Rule("RMSprop", 1, {"lr": 1e-3}),
    "RMSprop centered": Rule("RMSprop", 3, {"lr": 1e-3, "centered": True, "momentum": 0.9}),
    "Rprop": Rule("Rprop", 2, {"lr": 1e-3}),
    "Adagrad": Rule("Adagrad", 1, {"lr": 1e-3}),
    "SparseAdam": Rule("SparseAdam", 2, {"lr": 1e-3}),
}
USUAL_RULES = ("SGD", "Adam", "AdamW")  # those measured on whole networks
SPARSE_RULES = ("Adagrad", "SparseAdam")  # on an embedding
TORCH_PATHS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False, "fused": False}}

# A step that moves fewer bytes runs in the caches, and the memory's limit does not apply.
MEMORY_BOUND_BYTES = 64 * 2**20
# Larger lists share parameters and gradients between the variants, to fit a small machine's memory. Smaller ones must
# not: a variant would find the parameters in the cache, left there by the previous one.
SHARED_ABOVE = 64_000_000


@dataclass(frozen=True)
class Row:
    """One row of the table: a list of tensors and the step on it."""

    case: str
    shapes: Shapes
    rule: str
    dtype: torch.dtype = torch.float32
    clip: bool = False
    rows: int = 0  # of a sparse gradient; 0: the gradient is dense

    @property
    def name(self) -> str:
        words = [self.case, self.rule.lower(), "clip" * self.clip, "bf16" * (self.dtype == torch.bfloat16)]
        return " ".join(filter(None, words))

    @property
    def states(self) -> int:
        return RULES[self.rule].states

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def updated(self) -> int:
        """Elements that a step updates."""
        return self.rows * math.prod(self.shapes[0][1:]) if self.rows else self.elements

    @property
    def passes(self) -> list[limit.Pattern]:
        return limit.passes(self.dtype.itemsize, self.states, self.clip)

    @property
    def bytes_moved(self) -> int:
        return self.updated * sum(pattern.bytes_per_element for pattern in self.passes)

    def bytes_needed(self, variants: int) -> int:
        """Memory of all variants together; torch's foreach and loop paths take up to two temporaries of the whole list."""
        own = 1 if self.elements > SHARED_ABOVE else variants
        limit_streams = 4 * (2 + self.states) * min(self.elements, limit.MAX_ELEMENTS)
        return self.elements * (2 * self.dtype.itemsize * own + 4 * self.states * variants + 8) + limit_streams


def rows(quick: bool) -> Iterator[Row]:
    """The table, top to bottom. ``quick`` has the same kinds of rows on small lists."""
    big: dict[str, Shapes]
    if quick:
        big = {"1 x 4M": [(4_000_000,)], "25 x 160k": [(400, 400)] * 25}
    else:
        big = {"1 x 25M": [(25_000_000,)], "160 x 160k": [(400, 400)] * 160}
    tiny: dict[str, Shapes] = {"1000 x 256": [(256,)] * 1000}
    nets = {} if quick else {"ResNet-50": resnet50(), "GPT-2 small": gpt2_small()}
    for case, shapes in (big | tiny | nets).items():
        dense = [rule for rule in RULES if rule != "SparseAdam"]
        yield from (Row(case, shapes, rule) for rule in (USUAL_RULES if case in nets else dense))
        yield Row(case, shapes, "AdamW", clip=True)
        if case in big:
            yield Row(case, shapes, "SGD", torch.bfloat16)
            yield Row(case, shapes, "AdamW", torch.bfloat16)
        if case in tiny:  # twice as many tensors: the difference is the cost per tensor
            yield from (Row("2000 x 256", shapes * 2, rule) for rule in ("SGD", "AdamW"))
    yield from (Row("8192 of 400k rows", [(400_000, 64)], rule, rows=8192) for rule in SPARSE_RULES)


def arguments_of(rule: Rule) -> Mapping[str, object]:
    """The arguments of torch's optimizer; most have no fused path."""
    return inspect.signature(getattr(torch.optim, rule.optimizer)).parameters


def make_optimizer(
    row: Row, path: str, params: Sequence[torch.Tensor]
) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    """The optimizer of a path ("onepass" or one of TORCH_PATHS) and the step that is timed."""
    rule = RULES[row.rule]
    if path == "onepass":
        ours = getattr(onepass.optim, rule.optimizer)(params, **rule.options, max_norm=MAX_NORM if row.clip else None)
        return ours, ours.step
    hints = {key: hint for key, hint in TORCH_PATHS[path].items() if key in arguments_of(rule)}
    theirs = getattr(torch.optim, rule.optimizer)(params, **rule.options, **hints)
    if not row.clip:
        return theirs, theirs.step

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        theirs.step()

    return theirs, clip_and_step


def make_params(row: Row, device: torch.device) -> list[torch.Tensor]:
    """Parameters with gradients, with the magnitude they have in training."""
    params = []
    for shape in row.shapes:
        param = torch.randn(shape, device=device).mul_(0.02).to(row.dtype).requires_grad_()
        param.grad = some_rows(param, row.rows) if row.rows else param.detach().clone()
        params.append(param)
    return params


def some_rows(param: torch.Tensor, n: int) -> torch.Tensor:
    """A sparse gradient as backward() makes it for an embedding: rows in any order, some of them repeated."""
    rows = torch.randint(param.shape[0], (1, n), device=param.device)
    return torch.sparse_coo_tensor(rows, param.detach()[rows[0]], param.shape, check_invariants=False)


def copies(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the parameters and their gradients."""
    result = []
    for param in params:
        copy = param.detach().clone().requires_grad_()
        copy.grad = None if param.grad is None else param.grad.clone()
        result.append(copy)
    return result


def fresh_gradients(params: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Gives every parameter a new gradient tensor, as a backward pass after ``zero_grad`` does."""
    gradients = [param.grad.clone() for param in params if param.grad is not None]

    def prepare() -> None:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.clone()

    return prepare


def first_steps(optimizer: torch.optim.Optimizer, step: Callable[[], object], device: torch.device) -> Json:
    """The peak memory of the first step beyond the states it creates, and of a later step."""
    with harness.PeakMemory(device) as first:
        step()
    with harness.PeakMemory(device) as later:
        step()
    states = sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.device.type == device.type
    )
    return {
        "state_bytes": states,
        "first_step_extra_bytes": None if first.extra is None else max(0, first.extra - states),
        "step_extra_bytes": later.extra,
    }


def make_variants(row: Row, paths: Sequence[str], device: torch.device) -> tuple[list[Variant], dict[str, Json]]:
    """The variants of a row after two steps each, and the memory that these steps needed."""
    torch.manual_seed(0)
    variants: list[Variant] = []
    memory: dict[str, Json] = {}
    params = make_params(row, device)
    for path in paths:
        if path == "fused" and ("fused" not in arguments_of(RULES[row.rule]) or row.rows):
            continue
        if variants and row.elements <= SHARED_ABOVE:
            params = copies(params)
        optimizer, step = make_optimizer(row, path, params)
        memory[path] = first_steps(optimizer, step, device)
        if row.bytes_moved < MEMORY_BOUND_BYTES:
            variants.append(Variant(path, step, prepare=fresh_gradients(params)))
        else:
            variants.append(Variant(path, step))
    return variants, memory


def limit_variant(row: Row, device: torch.device) -> Variant | None:
    if row.bytes_moved < MEMORY_BOUND_BYTES:
        return None
    if device.type == "cuda":
        return Variant("limit", limit.CopyLimit(row.passes, row.elements, device).seconds)
    return Variant("limit", limit.StreamLimit(row.passes, row.elements).seconds) if limit.available() else None


def measure_row(row: Row, paths: Sequence[str], device: torch.device, seconds: float, rounds: int) -> Json:
    """The numbers of one row, as they go into the JSON file."""
    variants, memory = make_variants(row, paths, device)
    ceiling = limit_variant(row, device)
    samples = harness.measure(
        [*variants, ceiling] if ceiling else variants, device, seconds=seconds, min_rounds=rounds, warm_up=1
    )
    summaries = {name: sample.summary() | memory.get(name, {}) for name, sample in samples.items()}
    return {
        "case": row.case,
        "name": row.name,
        "rule": row.rule,
        "dtype": str(row.dtype).removeprefix("torch."),
        "clip": row.clip,
        "tensors": len(row.shapes),
        "elements": row.elements,
        "bytes_moved": row.bytes_moved,
        "limit": summaries.pop("limit", None),
        "variants": summaries,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small lists and few samples, to show that it works")
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help="only rows whose name matches, such as 'x 25M adamw'"
    )
    parser.add_argument("--seconds", type=float, help="time per row (default 4, quick 0.1)")
    parser.add_argument("--budget", type=float, default=math.inf, help="start no row after this many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return args


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    paths = (["onepass"] if onepass is not None else []) + list(TORCH_PATHS)
    if onepass is None:
        print("onepass is not installed: only torch is measured", file=sys.stderr)
    seconds, rounds = args.seconds or (0.1 if args.quick else 4.0), 3 if args.quick else 5
    end = time.monotonic() + args.budget
    result: Json = {
        "benchmark": "optimizers",
        "environment": harness.environment(device),
        "quick": args.quick,
        "rows": [],
    }
    benchmark = "optimizers-quick" if args.quick else "optimizers"

    print(report.heading(result))
    for row in rows(args.quick):
        if not re.search(args.filter, row.name, re.IGNORECASE):
            continue
        if time.monotonic() > end:
            print(f"the budget of {args.budget:g} s is used up before {row.name}", file=sys.stderr)
            break
        if row.bytes_needed(len(paths)) > 0.8 * harness.available_memory(device):
            print(f"{row.name}: skipped, needs {row.bytes_needed(len(paths)) / 2**30:.1f} GiB", file=sys.stderr)
            continue
        result["rows"].append(measure_row(row, paths, device, seconds, rounds))
        gc.collect()
        print(report.line(result["rows"][-1]), flush=True)
        path = harness.save(result, args.out, benchmark)
    if not result["rows"]:
        print("no row matches", file=sys.stderr)
        return 1
    print(report.footnotes(result))
    report.plot(result, path.with_suffix(".png"))
    print(f"saved {path} and its plot {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
