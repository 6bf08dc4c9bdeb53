"""Which way a call of a layer goes: the one place that asks.

A call takes the shortest way to the kernel, unless somebody has to see it. NOTE: [the order of the questions]

1. A torch.func transform is active, also in what torch.compile is tracing: the formula in torch operations, which every
   transform and every nesting of them takes.
2. torch.export or torch.jit.trace: torch's own function, which whoever gets the program knows: ONNX, TensorRT, AOTInductor,
   C++. It needs no onepass where it runs.
3. torch.compile is tracing: the operator.
4. Forward-mode AD with a tangent among the tensors: the formula.
5. A tensor with a meaning of its own (subclass, fake, meta), an active dispatch mode, a device without kernels: the
   operator, which subclasses and modes see and devices refuse by name.
6. Otherwise: the kernel.

Before all of them public functions ask who overrides torch's functions (__torch_function__), as torch's own do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import _native
from .._compat import (
    active_dispatch_modes,
    in_transform,
    innermost_transform,
    is_batched_gradient,
    is_exporting,
    jit_tracing,
)

KERNEL: Final = 0
OPERATOR: Final = 1
FORMULA: Final = 2
TORCH: Final = 3

_EXACT = frozenset((Tensor, torch.nn.Parameter))
_EXACT_OR_NONE = _EXACT | {type(None)}
_HAS_CUDA = _native.has_cuda


def is_exact(tensor: Tensor) -> bool:
    """Whether a tensor's memory is its value: it is no subclass, such as the fake ones of compilers."""
    return type(tensor) in _EXACT


def route(first: Tensor, *others: Tensor | None) -> int:
    """KERNEL, OPERATOR, FORMULA or TORCH for a call with these tensors, all on one device."""
    if is_compiling():
        return FORMULA if in_transform() else TORCH if is_exporting() else OPERATOR
    if innermost_transform() is not None or (forward_ad._current_level >= 0 and _has_tangent(first, *others)):
        return FORMULA
    if jit_tracing() is not None:
        return TORCH
    if type(first) not in _EXACT or active_dispatch_modes():
        return OPERATOR
    for tensor in others:
        if type(tensor) not in _EXACT_OR_NONE:
            return OPERATOR
    return KERNEL if first.is_cpu or (_HAS_CUDA and first.is_cuda) else OPERATOR


def _has_tangent(*tensors: Tensor | None) -> bool:
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    return any(isinstance(t, Tensor) and unpack(t).tangent is not None for t in tensors)


def route_back(gradient: Tensor) -> int:
    """The same for a backward: the formula also if it is going to be differentiated itself (create_graph=True) or has a
    batch of gradients (is_grads_batched=True)."""
    if torch.is_grad_enabled() or is_batched_gradient(gradient):
        return FORMULA
    way = route(gradient)
    return way if way < FORMULA else FORMULA


def seen(way: int) -> int:
    """The same for the backward of an operator, which took its operands as they were: never the kernel itself."""
    return OPERATOR if way == KERNEL else way


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with the tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what kernels compute and keep statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, no sign pending: what kernels take."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def plain_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else plain(tensor)
