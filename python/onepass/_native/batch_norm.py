"""The kernels of BatchNorm as functions of tensors, under the conventions of layers.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._dtypes import compute_dtype
from .layers import allocate_affine_gradients, resources_for

# The phases of a call, numbered as in csrc/core/layers.hpp. SyncBatchNorm communicates between _STATISTICS and _APPLY.
_ALL, _STATISTICS, _APPLY, _APPLY_RUNNING = 0, 1, 2, 3


class Operands(NamedTuple):
    """x: [N, C, ...], contiguous or dense channels_last. residual: like x. weight, bias: [C], of x's dtype or of F."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Running(NamedTuple):
    """The running statistics, [C] of one floating dtype; the number of batches in them; the momentum of an update."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None = None
    momentum: float | Tensor = 0.0


class BatchNormOptions(NamedTuple):
    """slope: of the leaky ReLU that follows, 0 for ReLU, None for no activation. channels_last: the memory format."""

    eps: float
    slope: float | None
    channels_last: bool


class Saved(NamedTuple):
    """What backward needs. y: None without an activation. stats: [3, C], see layers.py."""

    x: Tensor
    y: Tensor | None
    weight: Tensor | None
    stats: Tensor


def batch_norm(operands: Operands, running: Running, options: BatchNormOptions) -> tuple[Tensor, Tensor]:
    """Normalise by the batch's statistics, add the residual, apply the activation: (y, stats). Updates mean and var of
    `running`."""
    x = operands.x
    y, stats = torch.empty_like(x), _channel_statistics(x)
    outputs, shape = (y, stats, running.mean, running.var), _batch_shape(x, options.channels_last)
    _C.batch_norm(
        operands, outputs, shape, (_ALL, options.eps, float(running.momentum), options.slope), resources_for(x)
    )
    return y, stats


def batch_norm_running(operands: Operands, running: Running, options: BatchNormOptions) -> tuple[Tensor, Tensor]:
    """The same by the running statistics: (y, stats)."""
    x = operands.x
    y, stats = torch.empty_like(x), _channel_statistics(x)
    outputs, shape = (y, stats, running.mean, running.var), _batch_shape(x, options.channels_last)
    _C.batch_norm(operands, outputs, shape, (_APPLY_RUNNING, options.eps, 0.0, options.slope), resources_for(x))
    return y, stats


def batch_norm_apply(operands: Operands, stats: Tensor, options: BatchNormOptions) -> Tensor:
    """The same by the statistics given."""
    x = operands.x
    y, shape = torch.empty_like(x), _batch_shape(x, options.channels_last)
    _C.batch_norm(operands, (y, stats, None, None), shape, (_APPLY, 0.0, 0.0, options.slope), resources_for(x))
    return y


def batch_norm_moments(x: Tensor, channels_last: bool) -> Tensor:
    """[3, C]: mean, biased variance and rounding error of the mean per channel."""
    stats, shape = _channel_statistics(x), _batch_shape(x, channels_last)
    _C.batch_norm(
        (x, None, None, None), (None, stats, None, None), shape, (_STATISTICS, 0.0, 0.0, None), resources_for(x)
    )
    return stats


def batch_norm_backward(
    dy: Tensor, saved: Saved, options: BatchNormOptions, training: bool, want: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, residual, weight and bias, None where `want` is False. dy has x's memory format."""
    x = saved.x
    dx, dresidual = _input_gradients(x, options, want)
    dweight, dbias = allocate_affine_gradients(x, saved.weight, x.shape[1], want[2], want[3])
    shape = _batch_shape(x, options.channels_last)
    rest = _ALL, training, float(shape[0] * shape[2]), options.slope
    _C.batch_norm_backward((dy, *saved), (None, dx, dresidual, dweight, dbias), shape, rest, resources_for(x))
    return dx, dy if want[1] and options.slope is None else dresidual, dweight, dbias


def batch_norm_backward_sums(dy: Tensor, saved: Saved, options: BatchNormOptions) -> Tensor:
    """[2, C]: this process's sums of dz, the gradient before the activation, and of dz * xhat."""
    x = saved.x
    sums = torch.empty((2, x.shape[1]), dtype=compute_dtype(x.dtype), device=x.device)
    shape, rest = _batch_shape(x, options.channels_last), (_STATISTICS, True, 1.0, options.slope)
    _C.batch_norm_backward(
        (dy, *saved._replace(weight=None)), (sums, None, None, None, None), shape, rest, resources_for(x)
    )
    return sums


def batch_norm_backward_apply(
    dy: Tensor, saved: Saved, sums: Tensor, count: float, options: BatchNormOptions, want: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and residual, from the sums over all processes and their number of elements per channel."""
    dx, dresidual = _input_gradients(saved.x, options, want)
    shape, rest = _batch_shape(saved.x, options.channels_last), (_APPLY, True, count, options.slope)
    _C.batch_norm_backward((dy, *saved), (sums, dx, dresidual, None, None), shape, rest, resources_for(saved.x))
    return dx, dy if want[1] and options.slope is None else dresidual


def _batch_shape(x: Tensor, channels_last: bool) -> tuple[int, int, int, bool]:
    """(batch, channels, space, whether channels are innermost in memory)."""
    batch, channels = x.shape[:2]
    space = math.prod(x.shape[2:])
    return batch, channels, space, space == 1 or channels_last


def _channel_statistics(x: Tensor) -> Tensor:
    allocate = torch.empty if x.numel() else torch.zeros  # no kernel runs for an empty batch
    return allocate((3, x.shape[1]), dtype=compute_dtype(x.dtype), device=x.device)


def _input_gradients(x: Tensor, options: BatchNormOptions, want: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Tensors for the gradients of x and residual. Without an activation the residual's gradient is dy itself."""
    dx = torch.empty_like(x) if want[0] else None
    return dx, torch.empty_like(x) if want[1] and options.slope is not None else None
