"""The layers in torch operations, for what the kernels cannot do: every transform and derivatives of every order.

Formulas and symbols as in docs/layers.md. The arithmetic is float32 (float64 for float64), as in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm  # by name: patch() replaces attributes
from torch.nn.functional import dropout as torch_dropout
from torch.nn.functional import layer_norm as torch_layer_norm
from torch.nn.functional import leaky_relu, relu
from torch.nn.functional import rms_norm as torch_rms_norm

from .._dtypes import compute_dtype
from .._native.batch_norm import BatchNormOptions, Operands, Running, Saved
from .._native.layers import NormOptions


def _centre(h: Tensor, dims: tuple[int, ...], eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """h - mean(h) (h itself for RMSNorm) and 1 / standard deviation."""
    centred = h if rms else h - h.mean(dims, keepdim=True)
    return centred, torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _input_gradient(g: Tensor, xhat: Tensor, rstd: Tensor, dims: tuple[int, ...], rms: bool) -> Tensor:
    """dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd with g = weight * dy; RMSNorm has no mean(g)."""
    dx = g - xhat * (g * xhat).mean(dims, keepdim=True)
    if not rms:
        dx = dx - g.mean(dims, keepdim=True)
    return dx * rstd


# --- norms over rows --------------------------------------------------------------------------------------------------


def _rows(x: Tensor, size: int) -> Tensor:
    return x.to(compute_dtype(x.dtype)).reshape(x.numel() // max(size, 1), size)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Tensor:
    """LayerNorm or RMSNorm over rows; weight and bias have one element or as many as a row."""
    centred, rstd = _centre(_rows(x, options.size), (1,), options.eps, options.rms)
    y = centred * rstd
    if weight is not None:
        y = y * weight.reshape(-1)
    if bias is not None:
        y = y + bias.reshape(-1)
    return y.to(x.dtype).reshape(x.shape)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, options: NormOptions, want: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias; the last two are of the compute dtype and rounded by autograd."""
    size, eps, rms = options
    g = _rows(dy, size)
    centred, rstd = _centre(_rows(x, size), (1,), eps, rms)
    xhat = centred * rstd
    affine_shape = (size,) if weight is None else weight.shape
    affine_size = torch.Size(affine_shape).numel()
    dweight = (g * xhat).sum_to_size(affine_size).reshape(affine_shape) if want[1] else None
    dbias = g.sum_to_size(affine_size).reshape(affine_shape) if want[2] else None
    if weight is not None:
        g = g * weight.reshape(-1)
    dx = _input_gradient(g, xhat, rstd, (1,), rms).to(x.dtype).reshape(x.shape) if want[0] else None
    return dx, dweight, dbias


def norm_by_torch(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> Tensor:
    """The same by torch's own function, which checks its operands itself and requires a single dtype."""
    affine = [t.expand(shape) if t is not None and t.dim() == 0 else t for t in (weight, bias)]
    dtype = x.dtype if all(t is None or t.dtype == x.dtype for t in affine) else compute_dtype(x.dtype)
    weight, bias = (None if t is None else _cast(t, dtype) for t in affine)
    h = _cast(x, dtype)
    y = torch_rms_norm(h, tuple(shape), weight, eps) if rms else torch_layer_norm(h, tuple(shape), weight, bias, eps)
    return _cast(y, x.dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), but no operation if the dtype is the same: quantization tools match patterns of operations."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout_scale(p: float, inverted: bool) -> float:
    """The factor of the elements kept; p = 1 keeps none."""
    return 1 / (1 - p) if inverted and p < 1 else 1.0


def dropout(x: Tensor, keep: Tensor, p: float, inverted: bool) -> Tensor:
    """scale * x where `keep`, otherwise 0."""
    return torch.where(keep, x.to(compute_dtype(x.dtype)) * dropout_scale(p, inverted), 0).to(x.dtype)


def dropout_by_torch(x: Tensor, p: float, inverted: bool, inplace: bool = False) -> Tensor:
    """The same by torch's own function, which draws its own mask."""
    if inverted:
        return torch_dropout(x, p, True, inplace)
    y = torch.where(torch.rand_like(x, dtype=torch.float32) >= p, x, 0)
    return x.copy_(y) if inplace else y


def dropout_add(x: Tensor, residual: Tensor, keep: Tensor | None, p: float, inverted: bool) -> Tensor:
    """residual + dropout(x), rounded once."""
    h = x.to(compute_dtype(x.dtype))
    if keep is not None:
        h = torch.where(keep, h * dropout_scale(p, inverted), 0)
    return (residual + h).to(x.dtype)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def _along_channels(values: Tensor, dim: int) -> Tensor:
    """[C] as [1, C, 1, ...] with `dim` dimensions."""
    return values.reshape((1, -1) + (1,) * (dim - 2))


def _non_channel_dims(dim: int) -> tuple[int, ...]:
    return (0, *range(2, dim))


def _activate(z: Tensor, residual: Tensor | None, slope: float | None) -> Tensor:
    """z + residual, then z > 0 ? z : slope * z."""
    if residual is not None:
        z = z + residual
    return z if slope is None else leaky_relu(z, slope) if slope != 0 else relu(z)


def batch_norm(operands: Operands, running: Running, options: BatchNormOptions, training: bool) -> Tensor:
    """BatchNorm by torch's function: inside a transform it may update running statistics, a custom operator may not."""
    x, residual, weight, bias = operands
    if isinstance(running.momentum, Tensor) and training and running.mean is not None and running.var is not None:
        return _batch_norm_with_tensor_momentum(operands, running, options)
    momentum = 0.0 if isinstance(running.momentum, Tensor) else running.momentum
    dtype = compute_dtype(x.dtype)
    statistics = running.mean, running.var
    mean, var, weight, bias = (None if t is None else _cast(t, dtype) for t in (*statistics, weight, bias))
    z = torch_batch_norm(_cast(x, dtype), mean, var, weight, bias, training, momentum, options.eps)
    if training:
        for statistic, updated in zip(statistics, (mean, var), strict=True):
            if statistic is not None and updated is not None and updated is not statistic:
                statistic.copy_(updated)
    return _cast(_activate(z, residual, options.slope), x.dtype)


def _batch_norm_with_tensor_momentum(operands: Operands, running: Running, options: BatchNormOptions) -> Tensor:
    assert running.mean is not None
    assert running.var is not None
    # With a momentum of 1 these become the batch's own statistics.
    batch = Running(torch.zeros_like(running.mean), torch.zeros_like(running.var), momentum=1.0)
    y = batch_norm(operands, batch, options, True)
    for statistic, value in ((running.mean, batch.mean), (running.var, batch.var)):
        assert isinstance(running.momentum, Tensor)
        assert value is not None
        statistic.lerp_(value, running.momentum.to(value.dtype))
    return y


def batch_norm_backward(
    dy: Tensor, saved: Saved, options: BatchNormOptions, training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias. The statistics depend on x in training and are constants otherwise."""
    x, y, weight, stats = saved
    slope = options.slope
    dims = _non_channel_dims(x.dim())
    h, dz = x.to(compute_dtype(x.dtype)), dy.to(compute_dtype(x.dtype))
    if slope is not None and y is not None:
        dz = torch.where(y <= 0, slope * dz if slope != 0 else torch.zeros_like(dz), dz)
    if training:
        centred, rstd = _centre(h, dims, options.eps, False)
    else:
        mean, rstd, mean_error = (_along_channels(row, x.dim()) for row in stats)
        centred = h - mean - mean_error
    xhat = centred * rstd
    g = dz if weight is None else dz * _along_channels(weight, x.dim())
    dx = _input_gradient(g, xhat, rstd, dims, False) if training else g * rstd
    return dx.to(x.dtype), dz.to(x.dtype), (dz * xhat).sum(dims), dz.sum(dims)
