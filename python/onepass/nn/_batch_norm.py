"""BatchNorm, with an optional residual and activation behind it. Formulas: docs/layers.md.

NOTE: [running statistics]
Eager training updates them in the kernel that computes the batch's. Operators write to nothing, so that compilers may
move and repeat them: there the update is torch operations after the operator. Nothing is updated inside of a backward:
what runs a forward there is activation checkpointing, and the batch has been counted. (torch counts it twice.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _compat
from .._native import layers as native
from . import _formula
from ._checks import batch_norm_operands, check_batch_size
from ._dispatch import FORMULA, KERNEL, plain_or_none, route, route_back, seen, wants_grad, wide
from ._library import define, given, wanted
from ._norm import fake_affine_gradient

Running = tuple[Tensor | None, Tensor | None]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias for each channel; torch.nn.functional.batch_norm.

    Source: Ioffe & Szegedy 2015. Training: mean and biased variance over batch and space, and
    running = (1 - momentum) * running + momentum * the batch's, with its unbiased variance. Else the running ones.

    Args:
        input: [N, C] or [N, C, *space], float32, float64, bfloat16 or float16. channels_last is taken as it is.
        running_mean, running_var: [C] of any floating dtype, or both None in training.
        weight, bias: [C], of the input's dtype, or of float32 beside a 16-bit input.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: one value in a channel in training; eps out of range.
        RuntimeError, NotImplementedError, TypeError: torch's, for operands that do not fit.
    """
    return apply_batch_norm(input, running_mean, running_var, weight, bias, None, training, momentum, eps, None)


def batch_norm_activation(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(batch_norm(input) + residual) in the pass that normalises; backward reads the sign of its result.

    Args:
        input ... eps: as for batch_norm.
        activation: "relu", "leaky_relu" or None.
        negative_slope: of the leaky ReLU, not negative.
        residual: of the input's shape and dtype.

    Raises: as batch_norm; ValueError for another activation or a negative slope.
    """
    slope = activation_slope(activation, negative_slope)
    return apply_batch_norm(input, running_mean, running_var, weight, bias, residual, training, momentum, eps, slope)


def activation_slope(activation: str | None, negative_slope: float) -> float | None:
    if activation not in (None, "relu", "leaky_relu"):
        raise ValueError(f'activation has to be "relu", "leaky_relu" or None, but got {activation!r}')
    if not negative_slope >= 0:
        raise ValueError(
            f"negative_slope has to be >= 0, but got {negative_slope}: backward reads the sign of the result"
        )
    return None if activation is None else 0.0 if activation == "relu" else float(negative_slope)


def is_counted() -> bool:
    """Whether a batch in training counts for the running statistics, see NOTE: [running statistics]."""
    return is_compiling() or not _compat.in_backward()


def apply_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    slope: float | None,
) -> Tensor:
    """momentum may be a tensor where it is being traced."""
    if training:
        check_batch_size(x)
    batch_norm_operands(x, running_mean, running_var, weight, bias, residual, training, momentum, eps)
    running = (running_mean, running_var) if not training or is_counted() else (None, None)
    if weight is not None and weight.dim() != 1:
        weight = weight.reshape(-1)
    if bias is not None and bias.dim() != 1:
        bias = bias.reshape(-1)
    way = route(x, weight, bias, residual, *running)
    if way == FORMULA or x.numel() == 0:
        return _formula.batch_norm(x, running, weight, bias, residual, training, float(momentum), eps, slope)
    if (
        x.dim() == 3 and x.stride(1) == 1 and not x.is_contiguous()
    ):  # [N, L, C] in memory: channels_last with a width of 1
        residual = None if residual is None else residual.unsqueeze(-1)
        return apply_batch_norm(
            x.unsqueeze(-1), *running, weight, bias, residual, training, momentum, eps, slope
        ).squeeze(-1)
    channels_last = is_channels_last(x)
    if way == KERNEL:
        x, residual = dense(x, channels_last), None if residual is None else dense(residual, channels_last)
        weight, bias = plain_or_none(weight), plain_or_none(bias)
    operands = x, residual, weight, bias
    if not training:
        stats = _constant_statistics(running, eps, wide(x.dtype))
        if way != KERNEL:
            y: Tensor = _operator_apply(*operands, stats, slope, channels_last)
        elif wants_grad(*operands):
            y = _apply(*operands, stats, None, 0.0, eps, slope, channels_last)
        else:
            y = native.batch_norm_apply(x, stats, *operands[2:], operands[1], slope)
        return y
    if way == KERNEL and _is_plain(running):
        momentum = float(momentum)
        if wants_grad(*operands):
            y = _apply(*operands, None, running, momentum, eps, slope, channels_last)
        else:
            y, _ = native.batch_norm(x, *operands[2:], residual, *running, momentum, eps, slope)
        if running[0] is not None:
            _compat.increment_version(running)
        return y
    y, stats = _operator(*operands, eps, slope, channels_last)
    if running[0] is not None:
        var = (stats[1].square().reciprocal() - eps).clamp(min=0)
        update_running(running, stats[0], var, x.numel() // x.shape[1], momentum)
    return y


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


def _constant_statistics(running: Running, eps: float, dtype: torch.dtype) -> Tensor:
    """[2, C]: mean and 1 / sqrt(var + eps)."""
    mean, var = running
    assert mean is not None and var is not None
    return torch.stack((mean.to(dtype).reshape(-1), torch.rsqrt(var.to(dtype).reshape(-1) + eps)))


def _is_plain(running: Running) -> bool:
    """Whether the kernel may write the running statistics itself."""
    mean, var = running
    if mean is None or var is None:
        return True
    return (
        mean.dtype == var.dtype
        and mean.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and all(t.is_contiguous() and not t.is_neg() and not t.is_inference() for t in (mean, var))
    )


@torch.no_grad()
def update_running(running: Running, mean: Tensor, var: Tensor, count: int | Tensor, momentum: float | Tensor) -> None:
    """running <- (1 - momentum) * running + momentum * the batch's; `var` is the biased variance of `count` values."""
    for statistic, value in zip(running, (mean, var * (count / (count - 1))), strict=True):
        if statistic is not None:
            weight = momentum.to(statistic.dtype) if isinstance(momentum, Tensor) else momentum
            statistic.lerp_(value.to(statistic.dtype).reshape(statistic.shape), weight)


# --- autograd ---------------------------------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor | None,
        running: Running,
        momentum: float,
        eps: float,
        slope: float | None,
        channels_last: bool,
    ) -> Tensor:
        training = stats is None
        if stats is None:
            y, stats = native.batch_norm(x, weight, bias, residual, *running, momentum, eps, slope)
        else:
            y = native.batch_norm_apply(x, stats, weight, bias, residual, slope)
        _save(ctx, x, weight, stats, y, eps, slope, channels_last, training)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, route_back(dy)), *(None,) * 6


_apply = _compat.applier(_BatchNorm)


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
        y = None if y is None else dense(y, channels_last)
        return native.batch_norm_backward(dy, x, y, weight, stats, slope, training, want)
    # Without an activation the residual's gradient is dy, and the results of an operator share no memory with it.
    asked = want[0], want[1] and slope is not None, *want[2:]
    dx, dresidual, dweight, dbias = _operator_backward(dy, x, y, weight, stats, slope, training, channels_last, asked)
    return wanted((dx, dy if slope is None else dresidual, dweight, dbias), want)


# --- the operators ----------------------------------------------------------------------------------------------------


def _operands(channels_last: bool, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if t is None else dense(t, channels_last) if t.dim() > 1 else plain_or_none(t) for t in tensors]


def _kernel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float | None,
    channels_last: bool,
) -> Any:
    x_, residual, weight, bias = _operands(channels_last, (x, residual, weight, bias))
    return native.batch_norm(x_, weight, bias, residual, None, None, 0.0, eps, slope)


def _fake(x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, slope: Any, channels_last: bool) -> Any:
    y = torch.empty_like(x, memory_format=_memory_format(x, channels_last))
    return y, x.new_empty((2, x.shape[1]), dtype=wide(x.dtype))


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
    x_, residual, weight, bias = _operands(channels_last, (x, residual, weight, bias))
    return native.batch_norm_apply(x_, stats, weight, bias, residual, slope)


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
    want: tuple[bool, ...],
) -> Any:
    dy_, x_, y, weight = _operands(channels_last, (dy, x, y, weight))
    return given(native.batch_norm_backward(dy_, x_, y, weight, stats, slope, training, tuple(want)), x)


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


_operator = define(
    "batch_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float? slope, bool channels_last)"
    " -> (Tensor y, Tensor stats)",
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dstats: (*_gradients(ctx, dy, seen(route_back(dy))), None, None, None),
)
_operator_apply = define(
    "batch_norm_apply",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, float? slope, bool channels_last) -> Tensor",
    _kernel_apply,
    _fake_apply,
    _setup_context_apply,
    lambda ctx, dy: (*_gradients(ctx, dy, seen(route_back(dy))), None, None, None),
)
_operator_backward = define(
    "batch_norm_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor stats, float? slope, bool training, bool channels_last, "
    "bool[] want) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _kernel_backward,
    _fake_backward,
)
