"""LayerNorm and RMSNorm, one body with a flag. Arithmetic: csrc/rows; formulas: docs/layers.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _compat
from .._native import is_usual_norm
from .._native import layers as native
from . import _formula
from . import _operator_checks as checks
from ._checks import default_eps, norm_operands
from ._dispatch import FORMULA, KERNEL, OPERATOR, TORCH, is_exact, plain, plain_or_none, route, route_back, wide
from ._library import define, given, wanted
from ._sharding import opener


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimensions; torch.nn.functional.layer_norm.

    Source: Ba, Kiros & Hinton 2016. The variance is the biased one.

    Args:
        input: [*, *normalized_shape], float32, float64, bfloat16 or float16, any strides.
        normalized_shape: the dimensions normalised together, the last ones of input.
        weight, bias: of normalized_shape or 0-d, of the input's dtype, or of float32 beside a 16-bit input.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape and dtype, under autocast too.

    Raises:
        RuntimeError, NotImplementedError, TypeError: torch's, for operands that do not fit.
    """
    if has_torch_function_variadic(input, weight, bias):
        y: Tensor = handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight=weight, bias=bias, eps=eps
        )
        return y
    return row_norm("layer_norm", input, normalized_shape, weight, bias, eps, False)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimensions; torch.nn.functional.rms_norm.

    Source: Zhang & Sennrich 2019.

    Args:
        input, normalized_shape: as for layer_norm.
        weight: of normalized_shape or 0-d, of any floating dtype.
        eps: None is float32's machine epsilon, float64's for a float64 input.

    Returns, raises: as layer_norm.
    """
    if has_torch_function_variadic(input, weight):
        y: Tensor = handle_torch_function(rms_norm, (input, weight), input, normalized_shape, weight=weight, eps=eps)
        return y
    return row_norm("rms_norm", input, normalized_shape, weight, None, eps, True)


def row_norm(
    function: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
) -> Tensor:
    """layer_norm, or rms_norm with rms, where nobody overrides it."""
    way = route(x, weight, bias)
    if way == KERNEL and is_usual_norm(x, normalized_shape, weight, bias, eps):
        return _on_kernel(x, weight, bias, normalized_shape[0], cast(float, eps), rms)
    if way == TORCH and rms and is_compiling() and not _compat.RMS_NORM_TAKES_SYMBOLS:
        way = FORMULA  # or the exported program would take one size of batch
    if way == TORCH:
        eps = default_eps(x) if eps is None else eps
        return _formula.norm_by_torch(x, normalized_shape, weight, bias, eps, rms)
    if way == OPERATOR and (open_up := opener(x, weight, bias)) is not None:
        y: Tensor = open_up(
            function,
            lambda x, weight, bias: row_norm(function, x, normalized_shape, weight, bias, eps, rms),
            {"input": x},
            {"weight": weight, "bias": bias},
            len(normalized_shape) if isinstance(normalized_shape, Sequence) else 0,
        )
        return y
    size, weight, bias, eps = norm_operands(function, x, normalized_shape, weight, bias, eps)
    if way == FORMULA or x.numel() == 0:
        return _formula.norm(x, weight, bias, size, eps, rms)
    if way == KERNEL:
        return _on_kernel(plain(x), plain_or_none(weight), plain_or_none(bias), size, eps, rms)
    y = _operator(x.contiguous(), weight, bias, size, eps, rms)[0]
    return y


def _on_kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float, rms: bool) -> Tensor:
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _apply(x, weight, bias, (size, eps, rms))
        return y
    return native.norm_alone(x, weight, bias, size, eps, rms)


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[int, float, bool]
    ) -> Tensor:
        y, stats = native.norm_for_backward(x, weight, bias, *rest)
        ctx.save_for_backward(x, weight, stats)
        ctx.rest = rest
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if route_back(dy) != KERNEL:
            return *_gradients(ctx, dy), None
        x, weight, stats = ctx.saved_tensors
        size, eps, rms = ctx.rest
        return *native.norm_backward(
            plain(dy),
            plain(x),  # as forward had it, but hooks of saved tensors may have laid it out anew
            plain_or_none(weight),
            plain_or_none(stats),
            size,
            eps,
            rms,
            ctx.needs_input_grad,
        ), None


_apply = _compat.applier(_Norm)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """For everyone but the kernel."""
    x, weight, stats = ctx.saved_tensors
    size, eps, rms = ctx.rest
    want = ctx.needs_input_grad[:3]
    if route_back(dy) == FORMULA:
        return _formula.norm_backward(dy, x, weight, size, eps, rms, want)
    if stats is None:
        stats = _operator(x.contiguous(), None, None, size, eps, rms)[1]
    return wanted(_operator_backward(dy.contiguous(), x, weight, stats, size, rms, want), want)


# --- the operators ----------------------------------------------------------------------------------------------------


def _kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float, rms: bool) -> Any:
    return native.norm(plain(x), plain_or_none(weight), plain_or_none(bias), size, eps, rms)


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float, rms: bool) -> Any:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((3, x.numel() // size), dtype=wide(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *rest = inputs
    # What checkpointing computes a second time may go straight to the kernel, and has to save as many tensors.
    is_tiny = is_exact(x) and x.is_cpu and x.numel() <= native.TINY
    ctx.save_for_backward(x, weight, None if is_tiny else output[1])
    ctx.rest = tuple(rest)


def _kernel_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, size: int, rms: bool, want: tuple[bool, ...]
) -> Any:
    gradients = native.norm_backward(
        plain(dy), plain(x), plain_or_none(weight), plain(stats), size, 0.0, rms, tuple(want)
    )
    return given(gradients, x)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, size: int, rms: bool, want: tuple[bool, ...]
) -> Any:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = fake_affine_gradient(x, weight, size)
    return given(wanted((dx, dweight, torch.empty_like(dweight)), want), x)


def fake_affine_gradient(x: Tensor, weight: Tensor | None, size: int) -> Tensor:
    """Like the weight; that of a bias without one is of the arithmetic's dtype, autograd rounds it."""
    if weight is None:
        return x.new_empty(size, dtype=wide(x.dtype))
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_operator = define(
    "norm",
    "(Tensor x, Tensor? weight, Tensor? bias, SymInt size, float eps, bool rms) -> (Tensor y, Tensor stats)",
    checks.norm,
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dstats: (*_gradients(ctx, dy), None, None, None),
)
_operator_backward = define(
    "norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor stats, SymInt size, bool rms, bool[] want)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    checks.norm_backward,
    _kernel_backward,
    _fake_backward,
)
