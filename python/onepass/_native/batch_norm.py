"""The kernels of BatchNorm as functions of tensors; see layers.py, which has what they share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from .layers import affine_gradients, arithmetic, place_of

# Phases of a call; between STATISTICS and APPLY SyncBatchNorm sums over the processes.
_ALL, _STATISTICS, _APPLY, _APPLY_RUNNING = 0, 1, 2, 3


def _batch_shape(x: Tensor) -> tuple[int, int, int, bool]:
    """(batch, channels, space, whether the channels are the innermost dimension in memory)."""
    batch, channels = x.shape[:2]
    space = math.prod(x.shape[2:])
    return batch, channels, space, space == 1 or not x.is_contiguous()


def _channel_stats(x: Tensor) -> Tensor:
    make = torch.empty if x.numel() else torch.zeros  # of an empty batch a kernel writes nothing
    return make((3, x.shape[1]), dtype=arithmetic(x), device=x.device)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Tensor]:
    """BatchNorm in training over a [N, C, ...] x, contiguous or dense channels_last: (y, stats).

    Then + residual and the leaky ReLU of `slope` (0 is ReLU), where they are not None. residual, y: laid out as x.
    weight, bias: [C], of x's dtype or of F. stats: [3, C]. The running statistics, of one floating dtype, are updated in
    place.
    """
    y, stats = torch.empty_like(x), _channel_stats(x)
    outputs = y, stats, running_mean, running_var
    _C.batch_norm((x, weight, bias, residual), outputs, _batch_shape(x), (_ALL, eps, momentum, slope), place_of(x))
    return y, stats


def batch_norm_running(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Tensor]:
    """The same by the running statistics, of one floating dtype: (y, stats)."""
    y, stats = torch.empty_like(x), _channel_stats(x)
    outputs = y, stats, running_mean, running_var
    options = _APPLY_RUNNING, eps, 0.0, slope
    _C.batch_norm((x, weight, bias, residual), outputs, _batch_shape(x), options, place_of(x))
    return y, stats


def batch_norm_apply(
    x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, slope: float | None
) -> Tensor:
    """The same by stats that are given."""
    y = torch.empty_like(x)
    outputs = y, stats, None, None
    _C.batch_norm((x, weight, bias, residual), outputs, _batch_shape(x), (_APPLY, 0.0, 0.0, slope), place_of(x))
    return y


def batch_norm_moments(x: Tensor) -> Tensor:
    """[3, C]: mean, biased variance and the rest of the mean of the channels."""
    stats = _channel_stats(x)
    outputs = None, stats, None, None
    _C.batch_norm((x, None, None, None), outputs, _batch_shape(x), (_STATISTICS, 0.0, 0.0, None), place_of(x))
    return stats


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    slope: float | None,
    training: bool,
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, residual, weight and bias; dy laid out as x. y: the result, with an activation."""
    dx = torch.empty_like(x) if want[0] else None
    # Without an activation the residual's gradient is dy itself.
    dresidual = torch.empty_like(x) if want[1] and slope is not None else None
    dweight, dbias = affine_gradients(x, weight, x.shape[1], want[2], want[3])
    shape = _batch_shape(x)
    options = _ALL, training, float(shape[0] * shape[2]), slope
    outputs = None, dx, dresidual, dweight, dbias
    _C.batch_norm_backward((dy, x, y, weight, stats), outputs, shape, options, place_of(x))
    return dx, dy if want[1] and slope is None else dresidual, dweight, dbias


def batch_norm_backward_sums(dy: Tensor, x: Tensor, y: Tensor | None, stats: Tensor, slope: float | None) -> Tensor:
    """[2, C]: sums over this process of dz, the gradient before the activation, and of dz * xhat."""
    sums = torch.empty((2, x.shape[1]), dtype=arithmetic(x), device=x.device)
    options = _STATISTICS, True, 1.0, slope
    outputs = sums, None, None, None, None
    _C.batch_norm_backward((dy, x, y, None, stats), outputs, _batch_shape(x), options, place_of(x))
    return sums


def batch_norm_backward_apply(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    sums: Tensor,
    count: float,
    slope: float | None,
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and residual, by the sums and the number of elements a channel of all processes."""
    dx = torch.empty_like(x) if want[0] else None
    dresidual = torch.empty_like(x) if want[1] and slope is not None else None
    options = _APPLY, True, count, slope
    outputs = sums, dx, dresidual, None, None
    _C.batch_norm_backward((dy, x, y, weight, stats), outputs, _batch_shape(x), options, place_of(x))
    return dx, dy if want[1] and slope is None else dresidual
