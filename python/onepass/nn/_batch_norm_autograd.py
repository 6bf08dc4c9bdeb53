"""BatchNorm's autograd and operators: what lies between onepass.nn._batch_norm and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .._native import batch_norm as native
from . import _formula
from . import _operator_checks as checks
from ._dispatch import FORMULA, KERNEL, plain, plain_or_none, route_back, seen, wide
from ._library import define, given, wanted
from ._norm import fake_affine_gradient

Running = tuple[Tensor | None, Tensor | None]


def count(batches: Tensor | None) -> None:
    """One more batch in the running statistics."""
    if batches is not None:
        batches.add_(1)


def normalise_and_count(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Tensor]:
    """The kernel of training, and one more batch.

    The count comes first: a Ctrl-C while the kernel runs is raised after it, when the running statistics have changed.
    """
    count(batches)
    try:
        return native.batch_norm(x, weight, bias, residual, *running, momentum, eps, slope)
    except Exception:  # no memory for the result: they have not
        if batches is not None:
            batches.sub_(1)
        raise


def is_channels_last(x: Tensor) -> bool:
    """The order in memory that x has or, where it is not dense, comes nearest to."""
    return x.dim() > 3 and x.stride(1) == 1 and not x.is_contiguous()


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """Dense in one of the two orders that kernels take, no sign pending."""
    memory_format = _memory_format(x, channels_last)
    if x.is_contiguous(memory_format=memory_format) and not x.is_neg():
        return x
    return x.resolve_neg().contiguous(memory_format=memory_format)


def _memory_format(x: Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


# --- autograd ---------------------------------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        running: Running,
        batches: Tensor | None,
        momentum: float,
        eps: float,
        slope: float | None,
        channels_last: bool,
    ) -> Tensor:
        if training:
            y, stats = normalise_and_count(x, weight, bias, residual, running, batches, momentum, eps, slope)
        else:
            y, stats = native.batch_norm_running(x, weight, bias, residual, *running, eps, slope)
        _save(ctx, x, weight, stats, y, eps, slope, channels_last, training)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, route_back(dy)), *(None,) * 7


apply = _compat.applier(_BatchNorm)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    y: Tensor,
    eps: float,
    slope: float | None,
    channels_last: bool,
    training: bool,
) -> None:
    ctx.save_for_backward(x, None if slope is None else y, weight, stats)
    ctx.rest = eps, slope, channels_last, training


def _gradients(ctx: Any, dy: Tensor, way: int) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight and bias."""
    x, y, weight, stats = ctx.saved_tensors
    eps, slope, channels_last, training = ctx.rest
    want = ctx.needs_input_grad[:4]
    if way == FORMULA:
        gradients = _formula.batch_norm_backward(dy, x, y, weight, None if training else stats, eps, slope)
        return wanted(gradients, want)
    if way == KERNEL:
        dy, x = dense(dy, channels_last), dense(x, channels_last)
        y = _dense_or_none(y, channels_last)
        return native.batch_norm_backward(dy, x, y, plain_or_none(weight), plain(stats), slope, training, want)
    # Without an activation the residual's gradient is dy, and the results of an operator share no memory with it.
    asked = want[0], want[1] and slope is not None, *want[2:]
    dx, dresidual, dweight, dbias = _operator_backward(dy, x, y, weight, stats, slope, training, channels_last, asked)
    return wanted((dx, dy if slope is None else dresidual, dweight, dbias), want)


# --- the operators ----------------------------------------------------------------------------------------------------


def _dense_or_none(x: Tensor | None, channels_last: bool) -> Tensor | None:
    return None if x is None else dense(x, channels_last)


def _kernel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float | None,
    channels_last: bool,
) -> Any:
    x, residual = dense(x, channels_last), _dense_or_none(residual, channels_last)
    weight, bias = plain_or_none(weight), plain_or_none(bias)
    return native.batch_norm(x, weight, bias, residual, None, None, 0.0, eps, slope)


def _fake(x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, slope: Any, channels_last: bool) -> Any:
    y = torch.empty_like(x, memory_format=_memory_format(x, channels_last))
    return y, x.new_empty((3, x.shape[1]), dtype=wide(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, _, eps, slope, channels_last = inputs
    y, stats = output
    _save(ctx, x, weight, stats, y, eps, slope, channels_last, True)


def _kernel_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    slope: float | None,
    channels_last: bool,
) -> Any:
    x, residual = dense(x, channels_last), _dense_or_none(residual, channels_last)
    return native.batch_norm_apply(x, plain(stats), plain_or_none(weight), plain_or_none(bias), residual, slope)


def _fake_apply(x: Tensor, residual: Any, weight: Any, bias: Any, stats: Any, slope: Any, channels_last: bool) -> Any:
    return torch.empty_like(x, memory_format=_memory_format(x, channels_last))


def _setup_context_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, weight, _, stats, slope, channels_last = inputs
    _save(ctx, x, weight, stats, output, 0.0, slope, channels_last, False)


def _kernel_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    slope: float | None,
    training: bool,
    channels_last: bool,
    want: Sequence[bool],
) -> Any:
    dy, x, y = dense(dy, channels_last), dense(x, channels_last), _dense_or_none(y, channels_last)
    return given(native.batch_norm_backward(dy, x, y, plain_or_none(weight), plain(stats), slope, training, want), x)


def _fake_backward(
    dy: Any,
    x: Tensor,
    y: Any,
    weight: Tensor | None,
    stats: Any,
    slope: Any,
    training: Any,
    channels_last: bool,
    want: Any,
) -> Any:
    dx = torch.empty_like(x, memory_format=_memory_format(x, channels_last))
    dweight = fake_affine_gradient(x, weight, x.shape[1])
    return given(wanted((dx, torch.empty_like(dx), dweight, torch.empty_like(dweight)), want), x)


operator = define(
    "batch_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float? slope, bool channels_last)"
    " -> (Tensor y, Tensor stats)",
    checks.batch_norm,
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dstats: (*_gradients(ctx, dy, seen(route_back(dy))), None, None, None),
)
operator_apply = define(
    "batch_norm_apply",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, float? slope, bool channels_last) -> Tensor",
    checks.batch_norm_apply,
    _kernel_apply,
    _fake_apply,
    _setup_context_apply,
    lambda ctx, dy: (*_gradients(ctx, dy, seen(route_back(dy))), None, None, None),
)
_operator_backward = define(
    "batch_norm_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor stats, float? slope, bool training, bool channels_last, "
    "bool[] want) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    checks.batch_norm_backward,
    _kernel_backward,
    _fake_backward,
)
