"""How long the layers take, forward and backward: onepass against torch.nn.functional and the memory's limit.

The timed call is the user's, including the allocation of outputs: forward without gradients, backward as autograd runs it
after a new forward, and for tiny inputs both together in grad mode. The columns are those of optimizers.py; the limit
is a sweep that reads the inputs once and writes the outputs once, into memory that is already allocated.

    python benchmarks/layers.py --filter 'LayerNorm.*backward'

Saves <out>/layers-<date>-<machine>.json after every row, and a plot of it at the end; report.py reads them.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import limit
import report
import torch
from harness import Json, Variant, onepass
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


def batch_norm_case(shape: tuple[int, ...], channels_last: bool) -> Case:
    def operands(device: torch.device) -> list[Tensor]:
        x = torch.randn(shape, device=device)
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

    name = f"BatchNorm {'x'.join(map(str, shape))}{' last' if channels_last else ''}"
    return Case(name, operands, implementations(layer))


def dropout_case(rows: int, size: int, dtype: torch.dtype) -> Case:
    return Case(
        f"Dropout {rows}x{size}{suffix(dtype)}",
        lambda device: [torch.randn(rows, size, device=device).to(dtype)],
        implementations(lambda functional: lambda x: functional.dropout(x, P)),
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
            "onepass": lambda x, residual, w, b: ours.dropout_add_layer_norm(x, residual, (size,), w, b, p=P),
            "onepass, three calls": separate(ours),
            **layers,
        }
    return Case(f"dropout_add_layer_norm {rows}x{size}{suffix(dtype)}", operands, layers, activations=2, outputs=2)


def implementations(layer: Callable[[Any], Layer]) -> dict[str, Layer]:
    ours = {"onepass": layer(onepass.nn.functional)} if onepass is not None else {}
    return {**ours, "torch": layer(F)}


def suffix(dtype: torch.dtype) -> str:
    return " bf16" if dtype == torch.bfloat16 else ""


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


def variants(case: Case, what: str, device: torch.device) -> list[Variant]:
    """One per implementation, each on its own operands and gradients."""
    result = []
    for name, layer in case.layers.items():
        operands = case.operands(device)
        if what == "forward":
            result.append(Variant(name, forward(layer, operands)))
            continue
        for operand in operands:
            operand.requires_grad_()
        gradients = [torch.randn_like(output) for output in first(layer(*operands))]
        both = Both(layer, operands, gradients)
        if what == "backward":
            result.append(Variant(name, both.backward, prepare=both.forward))
        else:
            result.append(Variant(name, both.both))
    return result


def forward(layer: Layer, operands: list[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(*operands)

    return call


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


def bytes_moved(case: Case, what: str, x: Tensor) -> int:
    """Bytes if inputs are read once and outputs written once; backward reads the gradients and the normalised input."""
    size = x.numel() * x.element_size()
    there = (case.activations + case.outputs) * size
    # Dropout's backward needs no input.
    back = (2 if case.name.startswith("Dropout") else 1 + case.outputs + case.activations) * size
    return {"forward": there, "backward": back, "both": there + back}[what]


def measure(case: Case, what: str, device: torch.device, seconds: float, rounds: int) -> Json:
    torch.manual_seed(0)
    x = case.operands(device)[0]
    moved = bytes_moved(case, what, x)
    ceiling: list[Variant] = []
    if moved >= MEMORY_BOUND_BYTES:
        passes, elements = [limit.RESTORE], moved // limit.RESTORE.bytes_per_element
        if device.type == "cuda":
            ceiling = [Variant("limit", limit.CopyLimit(passes, elements, device).seconds)]
        elif limit.available():
            ceiling = [Variant("limit", limit.StreamLimit(passes, elements).seconds)]
    samples = harness.measure(
        [*variants(case, what, device), *ceiling], device, seconds=seconds, min_rounds=rounds, max_rounds=1000
    )
    summaries = {name: sample.summary() for name, sample in samples.items()}
    result: Json = {
        "case": case.name,
        "name": f"{case.name} {'forward + backward' if what == 'both' else what}",
        "rule": case.name.split()[0],
        "dtype": str(x.dtype).removeprefix("torch."),
        "clip": False,
        "elements": x.numel(),
        "bytes_moved": moved,
        "limit": summaries.pop("limit", None),
        "variants": summaries,
    }
    if what == "backward":
        result["kept_bytes"] = {name: kept_bytes(case, layer, device) for name, layer in case.layers.items()}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes and few samples, to show that it works")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument("--seconds", type=float, help="time per row (default 2, quick 0.1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    args = parser.parse_args()
    device = torch.device(args.device)
    result: Json = {
        "benchmark": "layers",
        "environment": harness.environment(device),
        "quick": args.quick,
        "rows": [],
    }
    print(report.heading(result))
    for case in cases(args.quick):
        tiny = case.name.endswith("32x64")
        for what in ("both",) if tiny else ("forward", "backward"):
            if not re.search(args.filter, f"{case.name} {what}", re.IGNORECASE):
                continue
            seconds = args.seconds or (0.1 if args.quick else 2.0)
            result["rows"].append(measure(case, what, device, seconds, 3 if args.quick else 5))
            gc.collect()
            print(report.line(result["rows"][-1]), flush=True)
            path = harness.save(result, args.out, "layers-quick" if args.quick else "layers")
    if not result["rows"]:
        print("no row matches", file=sys.stderr)
        return 1
    print(report.footnotes(result))
    report.plot(result, path.with_suffix(".png"))
    print(f"saved {path} and its plot {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
