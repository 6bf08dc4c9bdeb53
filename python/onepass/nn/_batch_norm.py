"""BatchNorm, optionally followed by a residual and an activation. Formulas: docs/layers.md.

NOTE: [running statistics]
In eager training the kernel that computes the batch's statistics also updates the running ones. Operators write to no
argument, so that compilers may move and repeat them; on that route torch operations after the operator do the update.
The batch is counted next to the update, so that a failure cannot leave one without the other. When activation
checkpointing runs a forward a second time, nothing is updated: the batch has already been counted. (torch counts it
twice.)

Checkpointing may recompute on another route, so autograd saves the same number of tensors on every route and does not
record the update. For the same reason dispatch modes see the same operations both times, except for the writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _compat
from .._dtypes import FLOATS, compute_dtype
from .._native import batch_norm as native
from .._native.batch_norm import BatchNormOptions, Operands, Running
from . import _formula
from ._batch_norm_autograd import (
    apply_with_autograd,
    batch_norm_apply_operator,
    batch_norm_operator,
    count_batch,
    dense_operands,
    is_channels_last,
    normalise_and_count,
)
from ._batch_norm_checks import check_batch_norm_operands, check_batch_size
from ._checks import as_float
from ._dispatch import FORMULA, KERNEL, OPERATOR, TORCH, choose_route, wants_grad
from ._nested import refuse_nested
from ._sharding import batch_norm_on_local, has_dtensor


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
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel, as torch.nn.functional.batch_norm.

    Source: Ioffe & Szegedy 2015. Training normalises by the batch's mean and biased variance over N and space, and
    updates running = (1 - momentum) * running + momentum * batch, with the unbiased variance. Evaluation normalises by
    the running statistics.

    Args:
        input: [N, C] or [N, C, *space], float32, float64, bfloat16 or float16. channels_last needs no copy.
        running_mean, running_var: [C] of any floating dtype, or both None in training.
        weight, bias: [C], of the input's dtype; float32 is allowed with a 16-bit input.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: only one value per channel in training; eps out of range.
        RuntimeError, NotImplementedError, TypeError: the same as torch, for operands of a wrong shape, device or dtype.
    """
    operands = input, running_mean, running_var, weight, bias
    if has_torch_function_variadic(*operands):
        y: Tensor = handle_torch_function(
            batch_norm, operands, *operands, training=training, momentum=momentum, eps=eps
        )
        return y
    running = Running(running_mean, running_var, None, momentum)
    return apply_batch_norm(Operands(input, None, weight, bias), running, training, eps, None)


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
    """activation(batch_norm(input) + residual) in one pass. Backward uses the sign of the result.

    Args:
        input ... eps: as for batch_norm.
        activation: "relu", "leaky_relu" or None.
        negative_slope: of the leaky ReLU, >= 0.
        residual: of the input's shape and dtype.

    Returns: as batch_norm.

    Raises: as batch_norm; ValueError for an unknown activation or a negative slope.
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
    running = Running(running_mean, running_var, None, momentum)
    slope = activation_slope(activation, negative_slope)
    return apply_batch_norm(Operands(input, residual, weight, bias), running, training, eps, slope)


def activation_slope(activation: str | None, negative_slope: float) -> float | None:
    """The slope of the leaky ReLU that equals the activation: 0 for ReLU, None without one. Checks both arguments."""
    if activation not in (None, "relu", "leaky_relu"):
        raise ValueError(f'activation has to be "relu", "leaky_relu" or None, but got {activation!r}')
    if type(negative_slope) is not float:
        negative_slope = as_float("leaky_relu", "negative_slope", 2, negative_slope)
    if not negative_slope >= 0:
        raise ValueError(
            f"negative_slope has to be >= 0, but got {negative_slope}: backward reads the sign of the result"
        )
    return None if activation is None else 0.0 if activation == "relu" else negative_slope


def counts_batch() -> bool:
    """Whether a training batch enters the running statistics; see NOTE: [running statistics]."""
    return is_compiling() or not _compat.is_recomputing()


def apply_batch_norm(operands: Operands, running: Running, training: bool, eps: float, slope: float | None) -> Tensor:
    """batch_norm_activation, once __torch_function__ has been handled. While tracing, the momentum may be a tensor."""
    y: Tensor
    x, residual, weight, bias = operands
    statistics = running.mean, running.var
    route = choose_route(x, residual, weight, bias, *statistics)
    if route == TORCH:
        y = _formula.batch_norm(operands, running, BatchNormOptions(eps, slope, False), training)
        count_batch(running.batches)
        return y
    if route == OPERATOR and has_dtensor(*operands, *statistics):
        return _apply_to_dtensors(operands, running, training, eps, slope)
    if isinstance(x, Tensor) and x.is_nested:
        refuse_nested("batch_norm", "input")
    if training:
        check_batch_size(x)
    momentum, eps = check_batch_norm_operands(operands, running, training, eps)
    if momentum is not running.momentum:
        running = running._replace(momentum=momentum)
    if (weight is not None and weight.dim() != 1) or (bias is not None and bias.dim() != 1):
        operands = _flatten_affine(operands)
    options = BatchNormOptions(eps, slope, is_channels_last(x))
    if route == FORMULA or x.numel() == 0:
        to_update = running if not training or counts_batch() else Running(None, None)
        y = _formula.batch_norm(operands, to_update, options, training)
        count_batch(to_update.batches)
        return y
    if x.dim() == 3 and x.stride(1) == 1 and not x.is_contiguous():
        # [N, L, C] in memory is channels_last with a width of 1.
        operands = operands._replace(x=x.unsqueeze(-1), residual=None if residual is None else residual.unsqueeze(-1))
        return apply_batch_norm(operands, running, training, eps, slope).squeeze(-1)
    if route == KERNEL:
        operands = dense_operands(operands, options.channels_last)
    if not training:
        return _normalise_by_running(route, operands, running, options)
    return _normalise_by_batch(route, operands, running, options)


def _apply_to_dtensors(operands: Operands, running: Running, training: bool, eps: float, slope: float | None) -> Tensor:
    def call(x: Tensor, residual: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Tensor:
        local_running = running._replace(mean=mean, var=var)
        return apply_batch_norm(Operands(x, residual, weight, bias), local_running, training, eps, slope)

    inputs = {"input": operands.x, "residual": operands.residual}
    affine = {"weight": operands.weight, "bias": operands.bias}
    statistics = {"running_mean": running.mean, "running_var": running.var}
    y: Tensor = batch_norm_on_local(call, inputs, affine, statistics, training)
    return y


def _flatten_affine(operands: Operands) -> Operands:
    """Weight and bias as [C]; torch allows any shape of C elements."""
    x, residual, weight, bias = operands
    weight, bias = (None if tensor is None else tensor.reshape(-1) for tensor in (weight, bias))
    return Operands(x, residual, weight, bias)


def _normalise_by_batch(route: int, operands: Operands, running: Running, options: BatchNormOptions) -> Tensor:
    y: Tensor
    x = operands.x
    counts = counts_batch()
    to_update = running if counts else Running(None, None)
    if route == KERNEL and _is_accessible(to_update, for_writing=True):
        if wants_grad(*operands):
            y = apply_with_autograd(*operands, to_update, options, True)
        else:
            y, _ = normalise_and_count(operands, to_update, options)
        _compat.increment_version([t for t in (to_update.mean, to_update.var) if t is not None])
        return y
    y, stats = batch_norm_operator(*operands, *options)
    if running.mean is not None:
        with torch.no_grad():
            var = (stats[1].square().reciprocal() - options.eps).clamp(min=0)
            update_running(running, stats[0], var, x.numel() // x.shape[1], write=counts)
    count_batch(to_update.batches)
    return y


def _normalise_by_running(route: int, operands: Operands, running: Running, options: BatchNormOptions) -> Tensor:
    y: Tensor
    dtype = compute_dtype(operands.x.dtype)
    if route != KERNEL:
        y = batch_norm_apply_operator(*operands, _constant_statistics(running, options.eps, dtype), *options)
        return y
    if not _is_accessible(running, for_writing=False):
        running = Running(_accessible_copy(running.mean, dtype), _accessible_copy(running.var, dtype))
    if wants_grad(*operands):
        y = apply_with_autograd(*operands, running, options, False)
    else:
        y, _ = native.batch_norm_running(operands, running, options)
    return y


def _constant_statistics(running: Running, eps: float, dtype: torch.dtype) -> Tensor:
    """[3, C]: mean, 1 / sqrt(var + eps) and the rounding error of the mean, computed in float64 as in the kernel."""
    assert running.mean is not None
    assert running.var is not None
    rstd = (running.var.to(torch.float64) + eps).sqrt().reciprocal()
    mean = running.mean.to(torch.float64)
    return torch.stack([t.to(dtype).reshape(-1) for t in (mean, rstd, mean - mean.to(dtype))])


def _is_accessible(running: Running, for_writing: bool) -> bool:
    """Whether the kernel can read the running statistics in place and, if `for_writing`, write them."""
    mean, var = running.mean, running.var
    if mean is None or var is None:
        return True
    return (
        mean.dtype == var.dtype
        and mean.dtype in FLOATS
        and all(t.is_contiguous() and not t.is_neg() and not (for_writing and t.is_inference()) for t in (mean, var))
    )


def _accessible_copy(statistic: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert statistic is not None
    return statistic.detach().to(dtype).resolve_neg().contiguous()


@torch.no_grad()
def update_running(running: Running, mean: Tensor, var: Tensor, values: int | Tensor, *, write: bool = True) -> None:
    """running <- (1 - momentum) * running + momentum * batch.

    var: biased, of `values` values per channel.
    write: False computes the new values without storing them, see NOTE: [running statistics].
    """
    for statistic, value in ((running.mean, mean), (running.var, var * (values / (values - 1)))):
        if statistic is not None:
            momentum = running.momentum
            weight = momentum.to(statistic.dtype) if isinstance(momentum, Tensor) else momentum
            updated = statistic.lerp(value.to(statistic.dtype).reshape(statistic.shape), weight)
            if write:
                statistic.copy_(updated)
