"""sum = residual + dropout(input) and the norm of sum, both in one pass. Formulas: docs/layers.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _compat
from .._dtypes import compute_dtype
from .._native import layers as native
from .._native.layers import DropoutOptions, NormOptions
from . import _formula
from . import _operator_checks as checks
from ._checks import check_alike, check_norm_operands, check_p, check_seed, check_tensor
from ._dispatch import (
    FORMULA,
    KERNEL,
    OPERATOR,
    TORCH,
    choose_backward_route,
    choose_route,
    for_kernel,
    for_kernel_or_none,
    never_kernel,
    wants_grad,
)
from ._dropout import (
    dropout,
    fake_mask,
    keeps_mask,
    mask_operator,
    options_for_kernel,
    run_formula,
    save_dropout,
    saved_dropout,
    seed_tensor,
)
from ._library import define, drop_unwanted, pad_missing
from ._norm import fake_affine_gradient, layer_norm, rms_norm
from ._sharding import find_unwrapper


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    inverted: bool = True,
) -> tuple[Tensor, Tensor]:
    """sum = residual + dropout(input) and y = layer_norm(sum), the operations between the blocks of a transformer.

    Args:
        input: the output of a block, [*, *normalized_shape], float32, float64, bfloat16 or float16.
        residual: of the input's shape; if the dtypes differ, both are promoted.
        normalized_shape, weight, bias, eps: as for layer_norm.
        p, training, seed, generator, inverted: as for dropout, with the same mask as dropout(input, p, seed=seed).

    Returns:
        (y, sum), both contiguous, of the input's shape and the promoted dtype.

    Raises: as layer_norm and dropout; RuntimeError if the residual has another shape or device than input.
    """
    if has_torch_function_variadic(input, residual, weight, bias):
        overridden: tuple[Tensor, Tensor] = handle_torch_function(
            dropout_add_layer_norm,
            (input, residual, weight, bias),
            input,
            residual,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
            p=p,
            training=training,
            seed=seed,
            generator=generator,
            inverted=inverted,
        )
        return overridden
    route = choose_route(input, residual, weight, bias)
    if route == TORCH or (route == OPERATOR and find_unwrapper(input, residual, weight, bias) is not None):
        total = residual + dropout(input, p, training, seed=seed, generator=generator, inverted=inverted)
        return layer_norm(total, normalized_shape, weight, bias, eps), total
    input, residual = _promote(input, residual)
    size, weight, bias, eps = check_norm_operands("layer_norm", input, normalized_shape, weight, bias, eps)
    input, drop = _draw_dropout(input, p, training, seed, generator, inverted)
    return _run_route(route, input, residual, weight, bias, drop, NormOptions(size, eps, False))


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    inverted: bool = True,
) -> tuple[Tensor, Tensor]:
    """sum = residual + dropout(input) and y = rms_norm(sum). weight and eps as for rms_norm, the rest as for
    dropout_add_layer_norm."""
    if has_torch_function_variadic(input, residual, weight):
        overridden: tuple[Tensor, Tensor] = handle_torch_function(
            dropout_add_rms_norm,
            (input, residual, weight),
            input,
            residual,
            normalized_shape,
            weight=weight,
            eps=eps,
            p=p,
            training=training,
            seed=seed,
            generator=generator,
            inverted=inverted,
        )
        return overridden
    route = choose_route(input, residual, weight)
    if route == TORCH or (route == OPERATOR and find_unwrapper(input, residual, weight) is not None):
        total = residual + dropout(input, p, training, seed=seed, generator=generator, inverted=inverted)
        return rms_norm(total, normalized_shape, weight, eps), total
    input, residual = _promote(input, residual)
    size, weight, _, eps = check_norm_operands("rms_norm", input, normalized_shape, weight, None, eps)
    input, drop = _draw_dropout(input, p, training, seed, generator, inverted)
    return _run_route(route, input, residual, weight, None, drop, NormOptions(size, eps, True))


def _promote(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("forward", "input", 1, input)
    check_alike("residual", residual, input)
    if input.dtype != residual.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        return input.to(dtype), residual.to(dtype)
    return input, residual


def _draw_dropout(
    x: Tensor, p: float, training: bool, seed: int | None, generator: Generator | None, inverted: bool
) -> tuple[Tensor, DropoutOptions]:
    """(x, the options with the seed drawn). In evaluation the paper's form scales x by 1 - p."""
    p, seed = check_p(p), check_seed(seed, generator)
    if not training and not inverted:
        x = x * (1 - p)
    return x, DropoutOptions(seed_tensor(seed, generator, x.device) if training and p > 0 else None, p, inverted)


def _run_route(
    route: int,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    drop: DropoutOptions,
    options: NormOptions,
) -> tuple[Tensor, Tensor]:
    if route == FORMULA or x.numel() == 0:
        keep = None if drop.seed is None else mask_operator(drop.seed, x.shape, drop.p, False)
        total = _formula.dropout_add(x, residual, keep, drop.p, drop.inverted)
        return _formula.norm(total, weight, bias, options), total
    needs_grad = wants_grad(x, residual, weight, bias)
    if route != KERNEL:
        keep_mask = needs_grad and drop.seed is not None and keeps_mask(x)
        y, total, _, _ = _operator(x.contiguous(), residual.contiguous(), weight, bias, *drop, *options, keep_mask)
        return y, total
    tensors = for_kernel(x), for_kernel(residual), for_kernel_or_none(weight), for_kernel_or_none(bias)
    if needs_grad:
        y, total = _apply(*tensors, drop, options)
    else:
        y, total, _, _ = native.dropout_add_norm(*tensors, drop, options, False)
    return y, total


# --- autograd ---------------------------------------------------------------------------------------------------------


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        drop: DropoutOptions,
        options: NormOptions,
    ) -> tuple[Tensor, Tensor]:
        keep_mask = drop.seed is not None and keeps_mask(x)
        output = native.dropout_add_norm(x, residual, weight, bias, drop, options, keep_mask)
        _setup_context(ctx, (x, residual, weight, bias, drop, options), output)
        return output[:2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, dsum, _choose_backward_route(dy, dsum)), None, None


_apply = _compat.fast_apply(_DropoutAddNorm)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, drop, options, *_ = inputs
    _, total, stats, mask = output
    ctx.options = options
    ctx.set_materialize_grads(False)
    save_dropout(ctx, drop, total, weight, stats, mask)


def _choose_backward_route(dy: Tensor | None, dsum: Tensor | None) -> int:
    """The less direct of the two gradients' routes. Either gradient may be None."""
    return max(KERNEL if d is None else choose_backward_route(d) for d in (dy, dsum))


def _gradients(ctx: Any, dy: Tensor | None, dsum: Tensor | None, route: int) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, weight and bias."""
    (total, weight, stats, mask), drop = saved_dropout(ctx)
    options: NormOptions = ctx.options
    want = ctx.needs_input_grad[:4]
    if dy is None:
        dy = torch.zeros_like(total)
    if route == FORMULA:
        ds, dweight, dbias = _formula.norm_backward(dy, total, weight, options, (True, *want[2:]))
        assert ds is not None
        if dsum is not None:
            ds = ds + dsum
        return ds if drop.seed is None else run_formula(ds, drop), ds, dweight, dbias
    if route == KERNEL:
        saved = for_kernel(total), for_kernel_or_none(weight), for_kernel(stats), mask
        return native.dropout_add_norm_backward((for_kernel(dy), for_kernel_or_none(dsum)), saved, drop, options, want)
    # Without dropout x and residual have the same gradient, but an operator's results must not share memory.
    operator_want = want if drop.seed is not None else (False, want[0] or want[1], *want[2:])
    saved = total, weight, stats, mask
    dx, dresidual, dweight, dbias = _operator_backward(dy, dsum, *saved, *drop, *options, operator_want)
    return drop_unwanted((dx if drop.seed is not None else dresidual, dresidual, dweight, dbias), want)


# --- the operators ----------------------------------------------------------------------------------------------------


def _kernel(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    drop: DropoutOptions,
    options: NormOptions,
    keep_mask: bool,
) -> Any:
    weight, bias = for_kernel_or_none(weight), for_kernel_or_none(bias)
    drop = options_for_kernel(drop)
    return native.dropout_add_norm(for_kernel(x), for_kernel(residual), weight, bias, drop, options, keep_mask)


def _fake(x: Tensor, residual: Tensor, weight: Any, bias: Any, drop: Any, options: NormOptions, keep_mask: bool) -> Any:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = x.new_empty((3, x.numel() // options.size), dtype=compute_dtype(x.dtype))
    return y, torch.empty_like(y), stats, fake_mask(x, keep_mask)


def _kernel_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    mask: Tensor,
    *rest: Any,
) -> Any:
    drop, options, want = rest
    saved = for_kernel(total), for_kernel_or_none(weight), for_kernel(stats), for_kernel(mask)
    gradients = native.dropout_add_norm_backward(
        (for_kernel(dy), for_kernel_or_none(dsum)), saved, options_for_kernel(drop), options, want
    )
    return pad_missing(gradients, total)


def _fake_backward(dy: Tensor, dsum: Any, total: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    *_, options, want = rest
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dweight = fake_affine_gradient(total, weight, options.size)
    return pad_missing(drop_unwanted((dx, torch.empty_like(dx), dweight, torch.empty_like(dweight)), want), total)


_operator = define(
    "dropout_add_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, float p, bool inverted, SymInt size, "
    "float eps, bool rms, bool keep_mask) -> (Tensor y, Tensor sum, Tensor stats, Tensor mask)",
    checks.dropout_add_norm,
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dsum, dstats, dmask: (
        *_gradients(ctx, dy, dsum, never_kernel(_choose_backward_route(dy, dsum))),
        *(None,) * 7,
    ),
    options=[DropoutOptions, NormOptions],
)
_operator_backward = define(
    "dropout_add_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor stats, Tensor mask, Tensor? seed, float p, "
    "bool inverted, SymInt size, float eps, bool rms, bool[] want) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    checks.dropout_add_norm_backward,
    _kernel_backward,
    _fake_backward,
    options=[DropoutOptions, NormOptions],
)
