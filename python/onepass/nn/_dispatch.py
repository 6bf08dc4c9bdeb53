"""Chooses the route of a layer's call. (Empty inputs take the formula, whatever the route.)

A call goes straight to the kernel unless something else has to see it. The first condition that holds decides:

1. A torch.func transform is active, also one inside code that torch.compile traces, or forward-mode AD with a tangent
   among the tensors: the formula in torch operations, which every transform and every nesting of transforms understands.
2. torch.export or torch.jit.trace is tracing: torch's own function, so that the program runs without onepass (ONNX,
   TensorRT, AOTInductor, C++).
3. torch.compile is tracing: the operator.
4. A tensor whose value is not just its memory (subclass, fake, meta), an active dispatch mode, a device without
   kernels: the operator, which subclasses and modes intercept and which names the device it refuses.
5. Otherwise: the kernel.

Before all of these, public functions handle __torch_function__, as torch's own functions do.
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
    """Whether the tensor is of torch's own type: the memory of a subclass, e.g. a fake tensor, may not be its value."""
    return type(tensor) in _EXACT


def choose_route(first: Tensor, *others: Tensor | None) -> int:
    """KERNEL, OPERATOR, FORMULA or TORCH for a call with these tensors, see the conditions above."""
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


def choose_backward_route(gradient: Tensor) -> int:
    """The route of a backward. Never TORCH; also FORMULA if backward is differentiated itself (create_graph=True) or
    receives a batch of gradients (is_grads_batched=True)."""
    if torch.is_grad_enabled() or is_batched_gradient(gradient):
        return FORMULA
    return min(choose_route(gradient), FORMULA)


def never_kernel(route: int) -> int:
    """The route of an operator's backward: its saved operands are not laid out for the kernel."""
    return OPERATOR if route == KERNEL else route


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def for_kernel(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and with no pending negation, as the kernels of row norms and dropout need it."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def for_kernel_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else for_kernel(tensor)
