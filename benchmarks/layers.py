"""How long the layers take, forward and backward: onepass against torch.nn.functional and the memory's limit.

The timed call is the user's, including the allocation of outputs: forward without gradients, backward as autograd runs it
after a new forward, and for tiny inputs both together in grad mode. Inputs larger than the caches are read from memory: the
caches are emptied before each run. The limit is a sweep that reads the inputs once and writes the outputs once, into memory
that is already allocated. docs/speed.md explains the columns.

    python benchmarks/layers.py --filter 'LayerNorm.*backward'

Saves <out>/layers-<date>-<machine>.json after every row, and a plot of it at the end; report.py reads them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import compiled
import harness
import limit
import runner
import torch
from harness import OURS, Json, Variant
from machine import onepass
from torch import Tensor
from torch.nn import functional as F

# Below this many bytes a call runs in the caches, and the memory's limit does not apply.
MEMORY_BOUND_BYTES = 8 * 2**20
P = 0.1

Layer = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """Operands, and several implementations of one layer: {name: function of the operands that require gradients}."""

    name: str
    operands: Callable[[torch.device], list[Tensor]]
    layers: dict[str, Layer]
    activations: int = 1  # operands as large as the input, read in forward
    outputs: int = 1
    reads_back: bool = True  # whether backward reads the input (or its normalised form) as well
    # Whether everything is read once more, for sums over it: what a GPU reads is too much for its caches.
    reads_twice_on_gpu: bool = False


def norm_case(rows: int, size: int, dtype: torch.dtype, rms: bool) -> Case:
    def operands(device: torch.device) -> list[Tensor]:
        x = torch.randn(rows, size, device=device).to(dtype)
        affine = [torch.randn(size, device=device).to(dtype) for _ in range(1 if rms else 2)]
        return [x, *affine]

    def layer(functional: Any) -> Layer:
        if rms:
            return lambda x, w: functional.rms_norm(x, (size,), w, 1e-5)
        return lambda x, w, b: functional.layer_norm(x, (size,), w, b)

    return Case(f"{'RMSNorm' if rms else 'LayerNorm'} {rows}x{size}{suffix(dtype)}", operands, implementations(layer))


def batch_norm_case(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype = torch.float32) -> Case:
    def operands(device: torch.device) -> list[Tensor]:
        x = torch.randn(shape, device=device).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return [x, torch.randn(shape[1], device=device), torch.randn(shape[1], device=device)]

    def layer(functional: Any) -> Layer:
        running: list[Tensor] = []

        def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            if not running:
                running.extend([torch.zeros_like(w), torch.ones_like(w)])
            return functional.batch_norm(x, *running, w, b, True)  # type: ignore[no-any-return]

        return call

    name = f"BatchNorm {'x'.join(map(str, shape))}{' last' if channels_last else ''}{suffix(dtype)}"
    return Case(name, operands, implementations(layer), reads_twice_on_gpu=True)


def dropout_case(rows: int, size: int, dtype: torch.dtype) -> Case:
    return Case(
        f"Dropout {rows}x{size}{suffix(dtype)}",
        lambda device: [torch.randn(rows, size, device=device).to(dtype)],
        implementations(lambda functional: lambda x: functional.dropout(x, P)),
        reads_back=False,
    )


def fused_case(rows: int, size: int, dtype: torch.dtype) -> Case:
    def operands(device: torch.device) -> list[Tensor]:
        x, residual = (torch.randn(rows, size, device=device).to(dtype) for _ in range(2))
        return [x, residual, *(torch.randn(size, device=device).to(dtype) for _ in range(2))]

    def separate(functional: Any) -> Layer:
        def call(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
            total = residual + functional.dropout(x, P)
            return functional.layer_norm(total, (size,), w, b), total  # type: ignore[return-value]

        return call

    layers = {"torch": separate(F)}
    if onepass is not None:
        ours = onepass.nn.functional
        layers = {
            OURS: lambda x, residual, w, b: ours.dropout_add_layer_norm(x, residual, (size,), w, b, p=P),
            "onepass, three calls": separate(ours),
            **layers,
        }
    return Case(f"dropout_add_layer_norm {rows}x{size}{suffix(dtype)}", operands, layers, activations=2, outputs=2)


def implementations(layer: Callable[[Any], Layer]) -> dict[str, Layer]:
    ours = {OURS: layer(onepass.nn.functional)} if onepass is not None else {}
    return {**ours, "torch": layer(F)}


def suffix(dtype: torch.dtype) -> str:
    return {torch.float32: "", torch.bfloat16: " bf16", torch.float16: " fp16"}[dtype]


def cases(quick: bool) -> Iterator[Case]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    shapes = [(4096, 1024), (1024, 4096), (16384, 256)]
    if quick:
        yield norm_case(256, 1024, float32, False)
        yield batch_norm_case((8, 16, 28, 28), False)
        yield dropout_case(64, 1024, float32)
        yield fused_case(256, 1024, float32)
        return
    for dtype in (float32, bfloat16):
        yield from (norm_case(*shape, dtype, False) for shape in shapes)
    yield norm_case(16384, 1024, float32, False)  # an output above 32 MB
    yield norm_case(32, 64, float32, False)
    yield from (norm_case(*shape, float32, True) for shape in shapes)
    for shape in ((32, 64, 56, 56), (32, 256, 14, 14)):
        yield from (batch_norm_case(shape, last) for last in (False, True))
    yield batch_norm_case((4096, 512), False)
    yield from (dropout_case(*shape, float32) for shape in ((4096, 1024), (64, 1024)))
    yield dropout_case(4096, 1024, bfloat16)
    yield fused_case(4096, 1024, float32)
    yield fused_case(4096, 1024, bfloat16)


def first(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Forward:
    def __init__(self, layer: Layer, operands: list[Tensor]) -> None:
        self.layer, self.operands = layer, operands

    @torch.no_grad()
    def __call__(self) -> object:
        return self.layer(*self.operands)


class Both:
    """A forward and its backward, to be measured separately or together."""

    def __init__(self, layer: Layer, operands: list[Tensor], gradients: list[Tensor]) -> None:
        self.layer, self.operands, self.gradients = layer, operands, gradients
        self.outputs: tuple[Tensor, ...] = ()

    def forward(self) -> None:
        self.outputs = first(self.layer(*self.operands))

    def backward(self) -> object:
        return torch.autograd.grad(self.outputs, self.operands, self.gradients)

    def both(self) -> object:
        self.forward()
        return self.backward()


def kept_bytes(case: Case, layer: Layer, device: torch.device) -> int:
    """Bytes that the layer saves for backward beyond its operands and outputs."""
    operands = [operand.requires_grad_() for operand in case.operands(device)]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = first(layer(*operands))
    for tensor in (*operands, *outputs):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def variants(case: Case, what: str, settings: runner.Settings) -> tuple[list[Variant], Json]:
    """One per implementation, each on its own operands and gradients, and what was found out about torch.compile."""
    result = []
    compilation = compiled.left_out(settings.no_compile)
    layers = dict(case.layers)
    if not settings.no_compile:
        layers[compiled.NAME] = compiled.compile_(case.layers["torch"])
    for name, layer in layers.items():
        operands = case.operands(settings.device)
        if what == "forward":
            everything: Callable[[], object] = Forward(layer, operands)
            variant = Variant(name, everything)
        else:
            gradients = [torch.randn_like(output) for output in first(case.layers["torch"](*operands))]
            both = Both(layer, [operand.requires_grad_() for operand in operands], gradients)
            everything = both.both
            variant = Variant(name, both.backward, both.forward) if what == "backward" else Variant(name, both.both)
        if name == compiled.NAME:
            compilation = compiled.first_call(everything)
            if "left_out" in compilation:
                continue
        result.append(variant)
    return result, compilation


def after(variant: Variant, action: Callable[[], object]) -> Variant:
    """The variant with ``action`` between its preparation and its run."""

    def prepare() -> None:
        variant.prepare()
        action()

    return Variant(variant.name, variant.run, prepare)


def pattern_of(case: Case, what: str, width: int) -> limit.Pattern:
    """Inputs are read once and outputs written once; backward reads the gradients and the input."""
    if what == "forward":
        return limit.Pattern(read=(width,) * case.activations, overwrite=(width,) * case.outputs)
    return limit.Pattern(read=(width,) * (case.outputs + case.reads_back), overwrite=(width,) * case.activations)


def measure(case: Case, what: str, settings: runner.Settings) -> Json:
    device = settings.device
    x = case.operands(device)[0]
    passes = ["forward", "backward"] if what == "both" else [what]
    patterns = [pattern_of(case, one, x.element_size()) for one in passes]
    if case.reads_twice_on_gpu and device.type == "cuda":
        patterns += [limit.Pattern(read=pattern.read) for pattern in patterns]
    moved = x.numel() * sum(pattern.bytes_per_element for pattern in patterns)
    ours_and_theirs, compilation = variants(case, what, settings)
    limits: list[Variant] = []
    if moved >= MEMORY_BOUND_BYTES:
        evict = harness.cache_eviction(device)
        limits = [after(variant, evict) for variant in limit.variants(patterns, x.numel(), device)]
        ours_and_theirs = [after(variant, evict) for variant in ours_and_theirs]
    description: Json = {
        "case": case.name,
        "name": row_name(case, what),
        "rule": case.name.split()[0],
        "dtype": str(x.dtype).removeprefix("torch."),
        "clip": False,
        "elements": x.numel(),
        "bytes_moved": moved,
    }
    if what == "backward":
        description["kept_bytes"] = {name: kept_bytes(case, layer, device) for name, layer in case.layers.items()}
    return runner.row(description, ours_and_theirs, limits, compilation, settings)


def row_name(case: Case, what: str) -> str:
    return f"{case.name} {'forward + backward' if what == 'both' else what}"


def jobs(quick: bool) -> Iterator[runner.Job]:
    for case in cases(quick):
        tiny = case.name.endswith("32x64")
        for what in ("both",) if tiny else ("forward", "backward"):
            yield runner.Job(row_name(case, what), functools.partial(measure, case, what))


if __name__ == "__main__":
    sys.exit(runner.main("layers", __doc__ or "", jobs))
