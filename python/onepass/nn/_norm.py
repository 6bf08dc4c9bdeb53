"""LayerNorm and RMSNorm: the same code with a flag. Arithmetic: csrc/rows; formulas: docs/layers.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _compat
from .._dtypes import compute_dtype
from .._native import layers as native
from .._native.layers import NormOptions
from . import _formula
from . import _operator_checks as checks
from ._checks import check_norm_operands, default_eps
from ._dispatch import (
    FORMULA,
    KERNEL,
    OPERATOR,
    TORCH,
    choose_backward_route,
    choose_route,
    for_kernel,
    for_kernel_or_none,
    is_exact,
    never_kernel,
    wants_grad,
)
from ._library import define, drop_unwanted, pad_missing
from ._sharding import find_unwrapper


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dims, as torch.nn.functional.layer_norm.

    Source: Ba, Kiros & Hinton 2016. The variance is biased.

    Args:
        input: [*, *normalized_shape], float32, float64, bfloat16 or float16, any strides.
        normalized_shape: the sizes of the last dimensions of input, which are normalised together.
        weight, bias: normalized_shape or 0-d, of the input's dtype; float32 is allowed with a 16-bit input.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape and dtype, also under autocast.

    Raises:
        RuntimeError, NotImplementedError, TypeError: the same as torch, for operands of a wrong shape, device or dtype.
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
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimensions, as torch.nn.functional.rms_norm.

    Source: Zhang & Sennrich 2019.

    Args:
        input, normalized_shape: as for layer_norm.
        weight: normalized_shape or 0-d, of any floating dtype.
        eps: None is the machine epsilon of float32, or of float64 for a float64 input.

    Returns, raises: as layer_norm; ValueError if input has fewer dimensions than normalized_shape.
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
    """layer_norm or, if `rms`, rms_norm, once __torch_function__ has been handled."""
    route = choose_route(x, weight, bias)
    if route == KERNEL:
        if eps is None and rms:
            eps = default_eps(x)
        result = _run_kernel(x, normalized_shape, weight, bias, eps, rms)
        if result is not None:
            return result
    if route == TORCH and rms and is_compiling() and not _compat.RMS_NORM_TAKES_SYMBOLS:
        route = FORMULA  # torch's function would fix the batch size in the exported program
    if route == TORCH:
        eps = default_eps(x) if eps is None else eps
        return _formula.norm_by_torch(x, normalized_shape, weight, bias, eps, rms)
    if route == OPERATOR and (call_unwrapped := find_unwrapper(x, weight, bias)) is not None:
        y: Tensor = call_unwrapped(
            function,
            lambda x, weight, bias: row_norm(function, x, normalized_shape, weight, bias, eps, rms),
            {"input": x},
            {"weight": weight, "bias": bias},
            len(normalized_shape) if isinstance(normalized_shape, Sequence) else 0,
        )
        return y
    size, weight, bias, eps = check_norm_operands(function, x, normalized_shape, weight, bias, eps)
    options = NormOptions(size, eps, rms)
    if route == FORMULA or x.numel() == 0:
        return _formula.norm(x, weight, bias, options)
    if route == KERNEL:
        x, weight, bias = for_kernel(x), for_kernel_or_none(weight), for_kernel_or_none(bias)
        rows = x.reshape(-1, size) if weight is None else x  # without a weight, the bias is [size] by now
        shape = (size,) if weight is None else tuple(normalized_shape)
        result = _run_kernel(rows, shape, weight, bias, eps, rms)
        if result is None:
            raise RuntimeError(
                f"{function}(): input, weight or bias has no memory (its storage was freed or never allocated)."
            )
        return result.view(x.shape)
    y = _operator(x.contiguous(), weight, bias, *options)[0]
    return y


def _run_kernel(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float | None, rms: bool
) -> Tensor | None:
    """The norm, or None without doing anything if the operands need checks or copies first."""
    if wants_grad(x, weight, bias):
        y: Tensor | None = _apply(x, weight, bias, normalized_shape, eps, rms)
        return y
    y, size = native.try_norm(x, normalized_shape, weight, bias, eps, rms, None)
    return y if size else None


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        rms: bool,
    ) -> Tensor | None:
        stats = None
        if (x.numel() > native.TINY or not x.is_cpu) and (row := native.row_size(x, normalized_shape)):  # see TINY
            stats = native.row_statistics(x, row)
        y, size = native.try_norm(x, normalized_shape, weight, bias, eps, rms, stats)
        if not size:
            return None
        ctx.save_for_backward(x, weight, stats)
        ctx.options = NormOptions(size, eps, rms)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, choose_backward_route(dy)), None, None, None


_apply = _compat.fast_apply(_Norm)


def _gradients(ctx: Any, dy: Tensor, route: int) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias."""
    x, weight, stats = ctx.saved_tensors
    options: NormOptions = ctx.options
    want = ctx.needs_input_grad[:3]
    if route == KERNEL:
        # Saved-tensor hooks may have changed the layout.
        x, weight, stats = for_kernel(x), for_kernel_or_none(weight), for_kernel_or_none(stats)
        return native.norm_backward(for_kernel(dy), x, weight, stats, options, want)
    if route == FORMULA:
        return _formula.norm_backward(dy, x, weight, options, want)
    if stats is None:
        stats = _operator(x.contiguous(), None, None, *options)[1]
    return drop_unwanted(_operator_backward(dy.contiguous(), x, weight, stats, *options, want), want)


# --- the operators ----------------------------------------------------------------------------------------------------


def _kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Any:
    return native.norm(for_kernel(x), for_kernel_or_none(weight), for_kernel_or_none(bias), options)


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Any:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((3, x.numel() // options.size), dtype=compute_dtype(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, options = inputs
    ctx.options = options
    # Checkpointing may recompute on another route, and both have to save the same number of tensors.
    is_tiny = is_exact(x) and x.is_cpu and x.numel() <= native.TINY
    ctx.save_for_backward(x, weight, None if is_tiny else output[1])


def _kernel_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: NormOptions, want: Sequence[bool]
) -> Any:
    x, weight, stats = for_kernel(x), for_kernel_or_none(weight), for_kernel(stats)
    return pad_missing(native.norm_backward(for_kernel(dy), x, weight, stats, options, want), x)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: NormOptions, want: Sequence[bool]
) -> Any:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = fake_affine_gradient(x, weight, options.size)
    return pad_missing(drop_unwanted((dx, dweight, torch.empty_like(dweight)), want), x)


def fake_affine_gradient(x: Tensor, weight: Tensor | None, size: int) -> Tensor:
    """An empty gradient like the weight; without one, for the bias, in the compute dtype, which autograd rounds."""
    if weight is None:
        return x.new_empty(size, dtype=compute_dtype(x.dtype))
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_operator = define(
    "norm",
    "(Tensor x, Tensor? weight, Tensor? bias, SymInt size, float eps, bool rms) -> (Tensor y, Tensor stats)",
    checks.norm,
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dstats: (*_gradients(ctx, dy, never_kernel(choose_backward_route(dy))), None, None, None),
    options=[NormOptions],
)
_operator_backward = define(
    "norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor stats, SymInt size, float eps, bool rms, bool[] want)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    checks.norm_backward,
    _kernel_backward,
    _fake_backward,
    options=[NormOptions],
)
