"""BatchNorm, with an optional residual and activation behind it. Formulas: docs/layers.md.

NOTE: [running statistics]
Eager training updates them in the kernel that computes the batch's. Operators write to nothing, so that compilers may
move and repeat them: there the update is torch operations after the operator. The count of batches rises where the
statistics change, so that nothing that fails in between leaves one without the other. Where activation
checkpointing runs a forward a second time nothing is updated: the batch has been counted. (torch counts it twice.)

Autograd saves the same number of tensors on every way, for checkpointing may take another one the second time: the update
is nothing that it records. For the same reason dispatch modes see the same operations both times, except for the writes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _compat
from .._native import batch_norm as native
from . import _formula
from ._batch_norm_autograd import (
    Running,
    apply,
    count,
    dense,
    is_channels_last,
    normalise_and_count,
    operator,
    operator_apply,
)
from ._batch_norm_checks import batch_norm_operands, check_batch_size
from ._checks import number
from ._dispatch import FORMULA, KERNEL, OPERATOR, TORCH, plain_or_none, route, wants_grad, wide
from ._nested import refuse_nested
from ._sharding import batch_norm_on_parts, holds_parts


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
    operands = input, running_mean, running_var, weight, bias
    if has_torch_function_variadic(*operands):
        y: Tensor = handle_torch_function(
            batch_norm, operands, *operands, training=training, momentum=momentum, eps=eps
        )
        return y
    return apply_batch_norm(*operands, None, training, momentum, eps, None)


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
    operands = input, running_mean, running_var, weight, bias
    if has_torch_function_variadic(*operands, residual):
        y: Tensor = handle_torch_function(
            batch_norm_activation,
            (*operands, residual),
            *operands,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
        )
        return y
    slope = activation_slope(activation, negative_slope)
    return apply_batch_norm(*operands, residual, training, momentum, eps, slope)


def activation_slope(activation: str | None, negative_slope: float) -> float | None:
    if activation not in (None, "relu", "leaky_relu"):
        raise ValueError(f'activation has to be "relu", "leaky_relu" or None, but got {activation!r}')
    if type(negative_slope) is not float:
        negative_slope = number("leaky_relu", "negative_slope", 2, negative_slope)
    if not negative_slope >= 0:
        raise ValueError(
            f"negative_slope has to be >= 0, but got {negative_slope}: backward reads the sign of the result"
        )
    return None if activation is None else 0.0 if activation == "relu" else negative_slope


def is_counted() -> bool:
    """Whether a batch in training counts for the running statistics, see NOTE: [running statistics]."""
    return is_compiling() or not _compat.is_recomputing()


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
    batches: Tensor | None = None,
) -> Tensor:
    """momentum may be a tensor where it is being traced. batches: the count that rises with the running statistics."""
    y: Tensor
    way = route(x, weight, bias, residual, running_mean, running_var)
    if way == TORCH:
        running = running_mean, running_var
        y = _by_formula(x, running, weight, bias, residual, training, momentum, eps, slope)
        count(batches)
        return y
    if way == OPERATOR and holds_parts(x, weight, bias, residual, running_mean, running_var):
        y = batch_norm_on_parts(
            lambda x, residual, weight, bias, mean, var: apply_batch_norm(
                x, mean, var, weight, bias, residual, training, momentum, eps, slope, batches
            ),
            {"input": x, "residual": residual},
            {"weight": weight, "bias": bias},
            {"running_mean": running_mean, "running_var": running_var},
            training,
        )
        return y
    if isinstance(x, Tensor) and x.is_nested:
        refuse_nested("batch_norm", "input")
    if training:
        check_batch_size(x)
    momentum, eps = batch_norm_operands(x, running_mean, running_var, weight, bias, residual, training, momentum, eps)
    counted = not training or is_counted()
    running = (running_mean, running_var) if counted else (None, None)
    batches = batches if counted else None
    weight, bias = _flat(weight), _flat(bias)
    if way == FORMULA or x.numel() == 0:
        y = _by_formula(x, running, weight, bias, residual, training, momentum, eps, slope)
        count(batches)
        return y
    if (
        x.dim() == 3 and x.stride(1) == 1 and not x.is_contiguous()
    ):  # [N, L, C] in memory: channels_last with a width of 1
        residual = None if residual is None else residual.unsqueeze(-1)
        return apply_batch_norm(
            x.unsqueeze(-1), running_mean, running_var, weight, bias, residual, training, momentum, eps, slope, batches
        ).squeeze(-1)
    channels_last = is_channels_last(x)
    if way == KERNEL:
        x, residual = dense(x, channels_last), None if residual is None else dense(residual, channels_last)
        weight, bias = plain_or_none(weight), plain_or_none(bias)
    operands = x, residual, weight, bias
    if not training:
        return _by_running_statistics(way, operands, running, eps, slope, channels_last)
    if way == KERNEL and _is_plain(running, written=True):
        momentum = float(momentum)
        if wants_grad(*operands):
            y = apply(*operands, training, running, batches, momentum, eps, slope, channels_last)
        else:
            y, _ = normalise_and_count(x, *operands[2:], residual, running, batches, momentum, eps, slope)
        _compat.increment_version([statistic for statistic in running if statistic is not None])
        return y
    y, stats = operator(*operands, eps, slope, channels_last)
    if running_mean is not None:
        _update_by_operator(running_mean, running_var, stats, eps, x.numel() // x.shape[1], momentum, counted)
    count(batches)
    return y


def _flat(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 1 else tensor.reshape(-1)


def _by_running_statistics(
    way: int,
    operands: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    running: Running,
    eps: float,
    slope: float | None,
    channels_last: bool,
) -> Tensor:
    y: Tensor
    x, residual, weight, bias = operands
    if way != KERNEL:
        y = operator_apply(*operands, _constant_statistics(running, eps, wide(x.dtype)), slope, channels_last)
        return y
    if not _is_plain(running, written=False):
        running = _plain_copy(running[0], x), _plain_copy(running[1], x)
    if wants_grad(*operands):
        y = apply(*operands, False, running, None, 0.0, eps, slope, channels_last)
    else:
        y, _ = native.batch_norm_running(x, weight, bias, residual, *running, eps, slope)
    return y


def _by_formula(
    x: Tensor,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    slope: float | None,
) -> Tensor:
    mean, var = running
    if not isinstance(momentum, Tensor):
        return _formula.batch_norm(x, running, weight, bias, residual, training, momentum, eps, slope)
    if not training or mean is None or var is None:
        return _formula.batch_norm(x, running, weight, bias, residual, training, 0.0, eps, slope)
    batch = torch.zeros_like(mean), torch.zeros_like(var)  # momentum 1 leaves the batch's own
    y = _formula.batch_norm(x, batch, weight, bias, residual, training, 1.0, eps, slope)
    for statistic, value in zip((mean, var), batch, strict=True):
        statistic.lerp_(value, momentum.to(value.dtype))
    return y


def _constant_statistics(running: Running, eps: float, dtype: torch.dtype) -> Tensor:
    """[3, C]: mean, 1 / sqrt(var + eps) and the rest of the mean, as the kernel makes them in float64."""
    mean, var = running
    assert mean is not None
    assert var is not None
    rstd = (var.to(torch.float64) + eps).sqrt().reciprocal()
    mean = mean.to(torch.float64)
    return torch.stack([t.to(dtype).reshape(-1) for t in (mean, rstd, mean - mean.to(dtype))])


def _is_plain(running: Running, written: bool) -> bool:
    """Whether the kernel may read, or write, the running statistics where they are."""
    mean, var = running
    if mean is None or var is None:
        return True
    return (
        mean.dtype == var.dtype
        and mean.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and all(t.is_contiguous() and not t.is_neg() and not (written and t.is_inference()) for t in (mean, var))
    )


def _plain_copy(statistic: Tensor | None, x: Tensor) -> Tensor:
    assert statistic is not None
    return statistic.detach().to(wide(x.dtype)).resolve_neg().contiguous()


@torch.no_grad()
def _update_by_operator(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stats: Tensor,
    eps: float,
    values: int,
    momentum: float | Tensor,
    counted: bool,
) -> None:
    var = (stats[1].square().reciprocal() - eps).clamp(min=0)
    update_running((running_mean, running_var), stats[0], var, values, momentum, counted)


@torch.no_grad()
def update_running(
    running: Running, mean: Tensor, var: Tensor, values: int | Tensor, momentum: float | Tensor, counted: bool = True
) -> None:
    """running <- (1 - momentum) * running + momentum * the batch's; `var` is the biased variance of `values` values."""
    for statistic, value in zip(running, (mean, var * (values / (values - 1))), strict=True):
        if statistic is not None:
            weight = momentum.to(statistic.dtype) if isinstance(momentum, Tensor) else momentum
            updated = statistic.lerp(value.to(statistic.dtype).reshape(statistic.shape), weight)
            if counted:
                statistic.copy_(updated)
