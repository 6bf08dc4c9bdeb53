"""The environment report, and a self-test of every kernel against torch in float64."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import _native, nn, optim
from .._config import environment, show_config
from ..optim._interchange import fused_optimizers
from ..optim._options import options_of

# Options that add states or terms to a rule. The self-test gives each optimizer those that it has.
_OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.9,
    "nesterov": True,
    "amsgrad": True,
    "centered": True,
    "weight_decay": 0.01,
    "lr_decay": 0.1,
    "eps": 0.01,  # with a small one Adadelta hardly moves
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


class _Lion(torch.optim.Optimizer):
    """Lion in torch's operations: torch.optim has none."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.moments = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for p, m in zip(group["params"], self.moments, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(m.lerp(p.grad, 1 - 0.9).sign_(), alpha=group["lr"])
            m.lerp_(p.grad, 1 - 0.99)


_TORCH_LACKS: dict[str, Any] = {"Lion": _Lion}


def _largest_difference(name: str, dtype: torch.dtype, device: str) -> float:
    """Parameters after five steps: ours against torch's in float64, from the same values and gradients."""
    torch.manual_seed(0)
    start = [torch.randn(size, dtype=dtype, device=device) for size in (1, 7, 1000)]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.double()) for p in start]
    cls = _OPTIMIZERS[name]
    options = {option: value for option, value in _OPTIONS.items() if option in options_of(cls)}
    torchs = _TORCH_LACKS.get(name) or getattr(torch.optim, name)
    first, second = cls(ours, **options), torchs(theirs, **options)
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


@dataclass(frozen=True)
class Result:
    """One kernel on one engine: its largest difference from torch for each dtype."""

    kernel: str
    device: str
    isa: str
    largest_difference: dict[torch.dtype, float]

    @property
    def ok(self) -> bool:
        return all(error <= _TOLERANCE[dtype] for dtype, error in self.largest_difference.items())

    def __str__(self) -> str:
        where = f"cpu ({self.isa})" if self.device == "cpu" else "cuda"
        figures = ", ".join(f"{_name(dtype)} {error:.0e}" for dtype, error in self.largest_difference.items())
        return f"{'ok    ' if self.ok else 'WRONG '} {self.kernel:<10} {where:<14} largest difference from torch: {figures}"

    def as_json(self) -> dict[str, Any]:
        # JSON has no infinity and no NaN.
        errors = {_name(d): e if math.isfinite(e) else None for d, e in self.largest_difference.items()}
        place = {"device": self.device, "isa": self.isa} if self.device == "cpu" else {"device": self.device}
        return {"kernel": self.kernel, **place, "largest_difference": errors, "ok": self.ok}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def self_test() -> Iterator[Result]:
    """Every optimizer and layer on every instruction set of this processor, and on the GPU if there is one."""
    engines = [("cpu", isa) for isa in _native.isas()]
    if _native.has_cuda and torch.cuda.is_available():
        engines.append(("cuda", _native.isa()))
    for device, isa in engines:
        for name in [*_OPTIMIZERS, *_LAYERS]:
            difference = _largest_difference if name in _OPTIMIZERS else _largest_layer_difference
            with _native.use_isa(isa):
                errors = {dtype: difference(name, dtype, device) for dtype in _TOLERANCE}
            yield Result(name, device, isa, errors)


def run(args: argparse.Namespace) -> int:
    if args.report_json:
        results = list(self_test())
        fine = all(result.ok for result in results)
        report = {"environment": environment(), "self_test": [result.as_json() for result in results], "ok": fine}
        print(json.dumps(report, indent=1))
        return 0 if fine else 1
    print(show_config())
    print()
    fine = True
    for result in self_test():
        print(result)
        fine = fine and result.ok
    print("\nall kernels agree with torch" if fine else "\nsome kernels disagree with torch: please report this output")
    return 0 if fine else 1
