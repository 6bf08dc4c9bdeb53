"""How long a step takes: onepass against every path of torch.optim, on lists of tensors from one large to many tiny.

The timed call is the user's whole ``step()``, including checks and bookkeeping (and, with clipping, the code a user writes
for it). Lists small enough for the caches get new gradient tensors before each step, as after a backward pass. docs/speed.md
explains the columns.

    python benchmarks/optimizers.py --filter 'adamw'     # rows whose name matches a regular expression
    python benchmarks/optimizers.py --device cuda

Saves <out>/optimizers-<date>-<machine>.json after every row, and a plot of it at the end; report.py reads them. Most of the
time goes into torch.compile: --no-compile takes a tenth of it.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import compiled
import harness
import limit
import runner
import torch
from harness import OURS, Json, Variant
from machine import onepass
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
    "RAdam": Rule("RAdam", 2, {"lr": 1e-3}),
    "Adamax": Rule("Adamax", 2, {"lr": 1e-3}),
    "Adadelta": Rule("Adadelta", 2, {"lr": 1.0}),
    "ASGD": Rule("ASGD", 1, {"lr": 1e-3}),
    "SparseAdam": Rule("SparseAdam", 2, {"lr": 1e-3}),
}
USUAL_RULES = ("SGD", "Adam", "AdamW")  # those measured on whole networks
SPARSE_RULES = ("Adagrad", "SparseAdam")  # on an embedding
# How onepass keeps states and parameters; torch has nothing like it, and is measured without. "": states in float32.
FORMATS: dict[str, dict[str, Any]] = {
    "": {},
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "8-bit states": {"state_dtype": "8bit"},
    "8-bit states, stochastic rounding": {"state_dtype": "8bit", "stochastic_rounding": True},
    "8-bit states, 24-bit master": {"state_dtype": "8bit", "master_bits": 24},
    "8-bit states, 32-bit master": {"state_dtype": "8bit", "master_bits": 32},
}
STATE_BYTES: dict[object, int] = {None: 4, torch.bfloat16: 2, "8bit": 1}
REMAINDER_BYTES: dict[object, int] = {None: 0, 24: 1, 32: 2}
DTYPE_WORDS = {torch.float32: "", torch.bfloat16: "bf16", torch.float16: "fp16"}
TORCH_PATHS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False, "fused": False},
    compiled.NAME: {},  # what torch chooses
}
# torch.compile takes about half a second per tensor.
MAX_COMPILED_TENSORS, MANY_TENSORS, COMPILED_RULES = 200, 32, ("SGD", "AdamW")

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
    format: str = ""

    @property
    def name(self) -> str:
        words = [self.case, self.rule.lower(), "clip" * self.clip, DTYPE_WORDS[self.dtype], self.format]
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
        kept = FORMATS[self.format]
        states, remainder = STATE_BYTES[kept.get("state_dtype")], REMAINDER_BYTES[kept.get("master_bits")]
        return limit.passes(self.dtype.itemsize, self.states, self.clip, states, remainder)

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
    if path == OURS:
        options = {**rule.options, **FORMATS[row.format], "max_norm": MAX_NORM if row.clip else None}
        ours = getattr(onepass.optim, rule.optimizer)(params, **options)
        return ours, ours.step
    hints = {key: hint for key, hint in TORCH_PATHS[path].items() if key in arguments_of(rule)}
    theirs = getattr(torch.optim, rule.optimizer)(params, **rule.options, **hints)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        theirs.step()

    step = clip_and_step if row.clip else theirs.step
    # In a lambda, because torch would not compile the method of an optimizer as a whole.
    return theirs, compiled.compile_(lambda: step()) if path == compiled.NAME else step


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
    first, later = (harness.peak_memory(step, device) for _ in range(2))
    states = sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.device.type == device.type
    )
    return {"state_bytes": states, "first_step_extra_bytes": max(0, first - states), "step_extra_bytes": later}


def kernels_of(step: Callable[[], object]) -> int:
    """How many kernels a step launches on the GPU."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


def paths_of(row: Row) -> list[str]:
    paths = [OURS] * (onepass is not None) + list(TORCH_PATHS)
    if row.rows or "fused" not in arguments_of(RULES[row.rule]):
        paths.remove("fused")
    return paths


def why_not_compiled(row: Row, settings: runner.Settings) -> str:
    if row.rows:
        return "it does not take sparse gradients"
    if len(row.shapes) > MAX_COMPILED_TENSORS:
        return f"compilation takes minutes for more than {MAX_COMPILED_TENSORS} tensors"
    if len(row.shapes) > MANY_TENSORS and row.rule not in COMPILED_RULES:
        return f"compilation is slow for more than {MANY_TENSORS} tensors, so only {' and '.join(COMPILED_RULES)} are compiled"
    return settings.no_compile


def measure(row: Row, settings: runner.Settings) -> Json:
    """The numbers of one row, as they go into the JSON file."""
    device = settings.device
    in_caches = row.bytes_moved < MEMORY_BOUND_BYTES
    reason = why_not_compiled(row, settings)
    compilation = compiled.left_out(reason)
    variants: list[Variant] = []
    memory: dict[str, Json] = {}
    kernels: dict[str, int] = {}
    params = make_params(row, device)
    for path in paths_of(row):
        if path == compiled.NAME and reason:
            continue
        if variants and row.elements <= SHARED_ABOVE:
            params = copies(params)
        optimizer, step = make_optimizer(row, path, params)
        prepare = fresh_gradients(params) if in_caches else lambda: None
        if path == compiled.NAME:
            compilation = compiled.first_call(step, prepare)
            if "left_out" in compilation:
                continue
        else:
            memory[path] = first_steps(optimizer, step, device)
            if device.type == "cuda" and len(row.shapes) > 1:
                kernels[path] = kernels_of(step)
        variants.append(Variant(path, step, prepare))
    description = {
        "case": row.case,
        "name": row.name,
        "rule": row.rule,
        "dtype": str(row.dtype).removeprefix("torch."),
        "clip": row.clip,
        "tensors": len(row.shapes),
        "elements": row.elements,
        "bytes_moved": row.bytes_moved,
        "memory": memory,
        "kernels": kernels,
    }
    limits = [] if in_caches else limit.variants(row.passes, row.elements, device)
    return runner.row(description, variants, limits, compilation, settings)


def jobs(quick: bool) -> Iterator[runner.Job]:
    for row in rows(quick):
        needed = row.bytes_needed(len(paths_of(row)))
        yield runner.Job(row.name, functools.partial(measure, row), needed)


if __name__ == "__main__":
    sys.exit(runner.main("optimizers", __doc__, jobs))
