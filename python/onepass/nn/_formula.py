"""The layers in torch operations, for what kernels cannot do: every transform, every order of derivative, every mode.

Formulas and symbols are those of docs/layers.md. The arithmetic is float32 (float64 for float64), as in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import wide


def _centred_and_rstd(h: Tensor, dims: tuple[int, ...], eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    centred = h if rms else h - h.mean(dims, keepdim=True)
    return centred, torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _through_statistics(g: Tensor, xhat: Tensor, rstd: Tensor, dims: tuple[int, ...], rms: bool) -> Tensor:
    """dx, g = weight * dy: (g - mean(g) - xhat * mean(g * xhat)) * rstd, without mean(g) for RMSNorm."""
    dx = g - xhat * (g * xhat).mean(dims, keepdim=True)
    if not rms:
        dx = dx - g.mean(dims, keepdim=True)
    return dx * rstd


# --- norms over rows --------------------------------------------------------------------------------------------------


def _rows(x: Tensor, size: int) -> Tensor:
    return x.to(wide(x.dtype)).reshape(x.numel() // max(size, 1), size)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float, rms: bool) -> Tensor:
    """LayerNorm or RMSNorm over rows of `size` elements; weight and bias of `size` elements or one."""
    centred, rstd = _centred_and_rstd(_rows(x, size), (1,), eps, rms)
    y = centred * rstd
    if weight is not None:
        y = y * weight.reshape(-1)
    if bias is not None:
        y = y + bias.reshape(-1)
    return y.to(x.dtype).reshape(x.shape)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, size: int, eps: float, rms: bool, want: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias; the last two are of the arithmetic's dtype, autograd rounds them."""
    g = _rows(dy, size)
    centred, rstd = _centred_and_rstd(_rows(x, size), (1,), eps, rms)
    xhat = centred * rstd
    affine = (size,) if weight is None else weight.shape  # of weight and bias
    flat = torch.Size(affine).numel()
    dweight = (g * xhat).sum_to_size(flat).reshape(affine) if want[1] else None
    dbias = g.sum_to_size(flat).reshape(affine) if want[2] else None
    if weight is not None:
        g = g * weight.reshape(-1)
    dx = _through_statistics(g, xhat, rstd, (1,), rms).to(x.dtype).reshape(x.shape) if want[0] else None
    return dx, dweight, dbias


def norm_by_torch(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> Tensor:
    """The same by torch's own function, which makes its own checks; input and weights of one dtype for it."""
    affine = [t.expand(shape) if t is not None and t.dim() == 0 else t for t in (weight, bias)]
    dtype = x.dtype if all(t is None or t.dtype == x.dtype for t in affine) else wide(x.dtype)
    weight, bias = (None if t is None else _as(dtype, t) for t in affine)
    h = _as(dtype, x)
    y = F.rms_norm(h, tuple(shape), weight, eps) if rms else F.layer_norm(h, tuple(shape), weight, bias, eps)
    return _as(x.dtype, y)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """No operation where the dtype is the same: tools look for patterns of operations."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout_scale(p: float, inverted: bool) -> float:
    """What the elements that are kept are multiplied by; nothing is kept of p = 1."""
    return 1 / (1 - p) if inverted and p < 1 else 1.0


def dropout(x: Tensor, keep: Tensor, p: float, inverted: bool) -> Tensor:
    """x where `keep`, scaled, else 0."""
    return torch.where(keep, x.to(wide(x.dtype)) * dropout_scale(p, inverted), 0).to(x.dtype)


def dropout_by_torch(x: Tensor, p: float, inverted: bool, inplace: bool = False) -> Tensor:
    """The same by torch's own function, which draws the mask."""
    if inverted:
        return F.dropout(x, p, True, inplace)
    y = torch.where(torch.rand_like(x, dtype=torch.float32) >= p, x, 0)
    return x.copy_(y) if inplace else y


def dropout_add(x: Tensor, residual: Tensor, keep: Tensor | None, p: float, inverted: bool) -> Tensor:
    """residual + dropout(x), rounded once."""
    h = x.to(wide(x.dtype))
    if keep is not None:
        h = torch.where(keep, h * dropout_scale(p, inverted), 0)
    return (residual + h).to(x.dtype)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def per_channel(values: Tensor, dim: int) -> Tensor:
    """[C] as [1, C, 1 ...] of `dim` dimensions."""
    return values.reshape((1, -1) + (1,) * (dim - 2))


def but_channels(dim: int) -> tuple[int, ...]:
    return (0, *range(2, dim))


def activation(z: Tensor, residual: Tensor | None, slope: float | None) -> Tensor:
    """z + residual, then z > 0 ? z : slope * z."""
    if residual is not None:
        z = z + residual
    return z if slope is None else F.leaky_relu(z, slope) if slope != 0 else F.relu(z)


def batch_norm(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float | None,
) -> Tensor:
    """torch's own batch_norm, which may update running statistics inside a transform; none of ours may."""
    dtype = wide(x.dtype)
    mean, var, weight, bias = (None if t is None else _as(dtype, t) for t in (*running, weight, bias))
    z = F.batch_norm(_as(dtype, x), mean, var, weight, bias, training, momentum, eps)
    if training:
        for statistic, updated in zip(running, (mean, var), strict=True):
            if statistic is not None and updated is not None and updated is not statistic:
                statistic.copy_(updated)
    return _as(x.dtype, activation(z, residual, slope))


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias. stats: mean and rstd that are constants, or None: those of x."""
    dims = but_channels(x.dim())
    h, dz = x.to(wide(x.dtype)), dy.to(wide(x.dtype))
    if slope is not None and y is not None:
        dz = torch.where(y <= 0, slope * dz if slope != 0 else torch.zeros_like(dz), dz)
    if stats is None:
        centred, rstd = _centred_and_rstd(h, dims, eps, False)
    else:
        mean, rstd, low = (per_channel(row, x.dim()) for row in stats)
        centred = h - mean - low
    xhat = centred * rstd
    g = dz if weight is None else dz * per_channel(weight, x.dim())
    dx = g * rstd if stats is not None else _through_statistics(g, xhat, rstd, dims, False)
    return dx.to(x.dtype), dz.to(x.dtype), (dz * xhat).sum(dims), dz.sum(dims)
