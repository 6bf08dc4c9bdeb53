"""sum = residual + dropout(input) and the norm of sum, both returned, in one pass. Formulas: docs/layers.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _compat
from .._native import layers as native
from . import _formula
from . import _operator_checks as checks
from ._checks import check_alike, check_p, check_seed, check_tensor, norm_operands
from ._dispatch import FORMULA, KERNEL, OPERATOR, TORCH, plain, plain_or_none, route, route_back, seen, wants_grad, wide
from ._dropout import dropout, fake_mask, keeps_mask, mask_operator, seed_tensor
from ._library import define, given, wanted
from ._norm import fake_affine_gradient, layer_norm, rms_norm
from ._sharding import opener


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
    """sum = residual + dropout(input), y = layer_norm(sum): what stands between the blocks of a transformer.

    Args:
        input: what a block gives, [*, *normalized_shape].
        residual: what came past the block, of input's shape. Of another dtype: both are promoted.
        normalized_shape, weight, bias, eps: as for layer_norm.
        p, training, seed, generator, inverted: as for dropout; the mask is that of dropout(input, p, seed=seed).

    Returns:
        (y, sum), each contiguous.

    Raises: as layer_norm and dropout; RuntimeError if residual is not like input.
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
    way = route(input, residual, weight, bias)
    if way == TORCH or (way == OPERATOR and opener(input, residual, weight, bias) is not None):
        total = residual + dropout(input, p, training, seed=seed, generator=generator, inverted=inverted)
        return layer_norm(total, normalized_shape, weight, bias, eps), total
    input, residual = _operands(input, residual)
    size, weight, bias, eps = norm_operands("layer_norm", input, normalized_shape, weight, bias, eps)
    return _dropout_add_norm(
        way, input, residual, weight, bias, size, eps, False, p, training, seed, generator, inverted
    )


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
    """sum = residual + dropout(input), y = rms_norm(sum). Otherwise as dropout_add_layer_norm."""
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
    way = route(input, residual, weight)
    if way == TORCH or (way == OPERATOR and opener(input, residual, weight) is not None):
        total = residual + dropout(input, p, training, seed=seed, generator=generator, inverted=inverted)
        return rms_norm(total, normalized_shape, weight, eps), total
    input, residual = _operands(input, residual)
    size, weight, _, eps = norm_operands("rms_norm", input, normalized_shape, weight, None, eps)
    return _dropout_add_norm(
        way, input, residual, weight, None, size, eps, True, p, training, seed, generator, inverted
    )


def _operands(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("forward", "input", 1, input)
    check_alike("residual", residual, input)
    if input.dtype != residual.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        return input.to(dtype), residual.to(dtype)
    return input, residual


def _dropout_add_norm(
    way: int,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
    p: float,
    training: bool,
    seed: int | None,
    generator: Generator | None,
    inverted: bool,
) -> tuple[Tensor, Tensor]:
    p, seed = check_p(p), check_seed(seed, generator)
    if not training and not inverted:
        x = x * (1 - p)
    seeded = seed_tensor(seed, generator, x.device) if training and p > 0 else None
    if way == FORMULA or x.numel() == 0:
        keep = None if seeded is None else mask_operator(seeded, x.shape, p, False)
        total = _formula.dropout_add(x, residual, keep, p, inverted)
        return _formula.norm(total, weight, bias, size, eps, rms), total
    grad = wants_grad(x, residual, weight, bias)
    if way == KERNEL:
        x, residual, weight, bias = plain(x), plain(residual), plain_or_none(weight), plain_or_none(bias)
        if grad:
            y, total = _apply(x, residual, weight, bias, seeded, size, eps, rms, p, inverted)
        else:
            y, total, _, _ = native.dropout_add_norm(
                x, residual, weight, bias, size, eps, rms, p, seeded, inverted, False
            )
    else:
        x, residual = x.contiguous(), residual.contiguous()
        keep_mask = grad and seeded is not None and keeps_mask(x)
        y, total, _, _ = _operator(x, residual, weight, bias, seeded, size, eps, rms, p, inverted, keep_mask)
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
        seed: Tensor | None,
        size: int,
        eps: float,
        rms: bool,
        p: float,
        inverted: bool,
    ) -> tuple[Tensor, Tensor]:
        keep_mask = seed is not None and keeps_mask(x)
        y, total, stats, mask = native.dropout_add_norm(
            x, residual, weight, bias, size, eps, rms, p, seed, inverted, keep_mask
        )
        _save(ctx, weight, seed, size, eps, rms, p, inverted, total, stats, mask)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, dsum, _route_back(dy, dsum)), *(None,) * 6


_apply = _compat.applier(_DropoutAddNorm)


def _save(
    ctx: Any,
    weight: Tensor | None,
    seed: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
    p: float,
    inverted: bool,
    total: Tensor,
    stats: Tensor,
    mask: Tensor,
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, stats, seed, mask)
    ctx.rest = size, eps, rms, p, inverted


def _route_back(dy: Tensor | None, dsum: Tensor | None) -> int:
    """The less direct way of the two gradients, either of which may be missing."""
    return max(KERNEL if d is None else route_back(d) for d in (dy, dsum))


def _gradients(ctx: Any, dy: Tensor | None, dsum: Tensor | None, way: int) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight and bias."""
    total, weight, stats, seed, mask = ctx.saved_tensors
    size, eps, rms, p, inverted = ctx.rest
    want = ctx.needs_input_grad[:4]
    if dy is None:
        dy = torch.zeros_like(total)
    if way == FORMULA:
        ds, dweight, dbias = _formula.norm_backward(dy, total, weight, size, eps, rms, (True, *want[2:]))
        assert ds is not None
        if dsum is not None:
            ds = ds + dsum
        dx = ds if seed is None else _formula.dropout(ds, mask_operator(seed, total.shape, p, False), p, inverted)
        return dx, ds, dweight, dbias
    if way == KERNEL:
        dy, dsum = plain(dy), plain_or_none(dsum)
        return native.dropout_add_norm_backward(
            dy, dsum, plain(total), plain_or_none(weight), plain(stats), size, rms, p, seed, inverted, mask, want
        )
    # Without dropout both have one gradient, and the results of an operator share no memory.
    asked = want if seed is not None else (False, want[0] or want[1], *want[2:])
    dx, dresidual, dweight, dbias = _operator_backward(
        dy, dsum, total, weight, stats, seed, mask, size, rms, p, inverted, asked
    )
    return wanted((dx if seed is not None else dresidual, dresidual, dweight, dbias), want)


# --- the operators ----------------------------------------------------------------------------------------------------


def _kernel(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
    p: float,
    inverted: bool,
    keep_mask: bool,
) -> Any:
    weight, bias = plain_or_none(weight), plain_or_none(bias)
    return native.dropout_add_norm(
        plain(x), plain(residual), weight, bias, size, eps, rms, p, plain_or_none(seed), inverted, keep_mask
    )


def _fake(
    x: Tensor, residual: Tensor, weight: Any, bias: Any, seed: Any, size: int, eps: Any, rms: Any, p: Any, *rest: bool
) -> Any:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = x.new_empty((3, x.numel() // size), dtype=wide(x.dtype))
    return y, torch.empty_like(y), stats, fake_mask(x, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, seed, size, eps, rms, p, inverted, _ = inputs
    _save(ctx, weight, seed, size, eps, rms, p, inverted, *output[1:])


def _kernel_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    mask: Tensor,
    size: int,
    rms: bool,
    p: float,
    inverted: bool,
    want: Sequence[bool],
) -> Any:
    gradients = native.dropout_add_norm_backward(
        plain(dy),
        plain_or_none(dsum),
        plain(total),
        plain_or_none(weight),
        plain(stats),
        size,
        rms,
        p,
        plain_or_none(seed),
        inverted,
        plain(mask),
        tuple(want),
    )
    return given(gradients, total)


def _fake_backward(dy: Tensor, dsum: Any, total: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    size, want = rest[3], rest[-1]
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dweight = fake_affine_gradient(total, weight, size)
    return given(wanted((dx, torch.empty_like(dx), dweight, torch.empty_like(dweight)), want), total)


_operator = define(
    "dropout_add_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, SymInt size, float eps, bool rms, float p, "
    "bool inverted, bool keep_mask) -> (Tensor y, Tensor sum, Tensor stats, Tensor mask)",
    checks.dropout_add_norm,
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dsum, dstats, dmask: (*_gradients(ctx, dy, dsum, seen(_route_back(dy, dsum))), *(None,) * 7),
)
_operator_backward = define(
    "dropout_add_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor stats, Tensor? seed, Tensor mask, SymInt size, bool rms, "
    "float p, bool inverted, bool[] want) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    checks.dropout_add_norm_backward,
    _kernel_backward,
    _fake_backward,
)
