"""`python -m onepass`: the environment report, and a self-test of every kernel against torch in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import _native, nn, optim, show_config
from .optim._base import fused_optimizers
from .optim._options import options_of

# Options that add states or terms to a rule. The self-test gives each optimizer those that it has.
_OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.9,
    "nesterov": True,
    "amsgrad": True,
    "centered": True,
    "weight_decay": 0.01,
    "lr_decay": 0.1,
}
_OPTIMIZERS = fused_optimizers()
_SHAPE, _SEED = (6, 5, 33), 1


def _dropout(ours: bool, x: Tensor) -> Tensor:
    if ours:
        return nn.functional.dropout(x, 0.3, seed=_SEED)
    return x * nn.functional.dropout_mask(x.shape, 0.3, _SEED, device=x.device) / 0.7


# Our layer, or torch's, on x with a weight and bias of the last dimension.
_LAYERS: dict[str, Callable[[bool, Tensor, Tensor, Tensor], Any]] = {
    "layer_norm": lambda ours, x, w, b: (nn.functional if ours else functional).layer_norm(x, w.shape, w, b),
    "rms_norm": lambda ours, x, w, b: (nn.functional if ours else functional).rms_norm(x, w.shape, w, 1e-5),
    "batch_norm": lambda ours, x, w, b: (nn.functional if ours else functional).batch_norm(
        x.transpose(1, 2), None, None, w, b, training=True
    ),
    "dropout": lambda ours, x, w, b: _dropout(ours, x),
}
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1, torch.float16: 0.02}


def _largest_difference(name: str, dtype: torch.dtype, device: str) -> float:
    """Parameters after five steps: ours against torch's in float64, from the same values and gradients."""
    torch.manual_seed(0)
    start = [torch.randn(size, dtype=dtype, device=device) for size in (1, 7, 1000)]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.double()) for p in start]
    cls = _OPTIMIZERS[name]
    options = {option: value for option, value in _OPTIONS.items() if option in options_of(cls)}
    first, second = cls(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a).to_sparse() if cls is optim.SparseAdam else torch.randn_like(a)
            b.grad = a.grad.double()
        first.step()
        second.step()
    return max((a.double() - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def _largest_layer_difference(name: str, dtype: torch.dtype, device: str) -> float:
    """Output and input gradient: ours against torch's in float64."""
    torch.manual_seed(0)
    x, dy = (torch.randn(_SHAPE, dtype=dtype, device=device) for _ in range(2))
    w, b = (torch.randn(_SHAPE[-1], dtype=dtype, device=device) for _ in range(2))
    results = []
    for ours, operands in ((True, (x, w, b, dy)), (False, tuple(t.double() for t in (x, w, b, dy)))):
        first, *affine, gradient = (t.clone() for t in operands)
        y = _LAYERS[name](ours, first.requires_grad_(), *affine)
        (dx,) = torch.autograd.grad(y, first, gradient.reshape(y.shape))
        results.append(torch.stack((y.double().flatten(), dx.double().flatten())))
    return (results[0] - results[1]).abs().max().item()


def _self_test() -> Iterator[tuple[str, bool]]:
    engines = [("cpu", isa) for isa in _native.isas()]
    if _native.has_cuda and torch.cuda.is_available():
        engines.append(("cuda", _native.isa()))
    for device, isa in engines:
        for name in [*_OPTIMIZERS, *_LAYERS]:
            difference = _largest_difference if name in _OPTIMIZERS else _largest_layer_difference
            with _native.use_isa(isa):
                errors = {dtype: difference(name, dtype, device) for dtype in _TOLERANCE}
            fine = all(error <= _TOLERANCE[dtype] for dtype, error in errors.items())
            where = f"cpu ({isa})" if device == "cpu" else "cuda"
            figures = ", ".join(f"{str(d).removeprefix('torch.')} {e:.0e}" for d, e in errors.items())
            yield (
                f"{'ok    ' if fine else 'WRONG '} {name:<10} {where:<14} largest difference from torch: {figures}",
                fine,
            )


def main() -> int:
    print(show_config())
    print()
    fine = True
    for line, ok in _self_test():
        print(line)
        fine = fine and ok
    print("\nall kernels agree with torch" if fine else "\nsome kernels disagree with torch: please report this output")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
