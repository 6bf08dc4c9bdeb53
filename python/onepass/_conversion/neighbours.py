"""Neighbouring modules in one pass, where both are what they seem: norm and activation; dropout, residual and norm."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import nn as fused
from ..nn import functional as F
from ..nn.batch_norm_modules import normalise
from .activations import is_bare, slope_of
from .norms import RowNorm
from .swap import replaced_forward


def is_batch_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return type(module) in (fused.BatchNorm1d, fused.BatchNorm2d, fused.BatchNorm3d)


def _are_alike(x: Tensor, residual: Tensor | None) -> bool:
    """Whether one kernel takes both: tensors (no proxies of torch.fx) of one shape and dtype."""
    if not isinstance(x, Tensor) or x.is_nested:
        return False
    return residual is None or (not residual.is_nested and x.shape == residual.shape and x.dtype == residual.dtype)


def norm_act(norm: nn.Module, activation: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """activation(norm(x) + residual)."""
    slope = slope_of(activation)
    if slope is not None and is_batch_norm(norm) and is_bare(norm) and _are_alike(x, residual):
        return normalise(norm, x, residual, slope)
    y = norm(x)
    if residual is not None:
        y = y + residual
    return activation(y)  # type: ignore[no-any-return]


def dropout_add_norm(dropout: nn.Module | None, norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """sum = residual + dropout(x); (norm(sum), sum)."""
    p, training = 0.0, False
    if dropout is not None:
        if type(dropout) is not fused.Dropout or not dropout.inverted or not is_bare(dropout):
            x, dropout = dropout(x), None
        else:
            p, training = dropout.p, dropout.training
    if _are_alike(x, residual) and is_bare(norm):
        if type(norm) is fused.LayerNorm:
            options = norm.normalized_shape, norm.weight, norm.bias, norm.eps, p, training
            return F.dropout_add_layer_norm(x, residual, *options)
        if type(norm) is fused.RMSNorm:
            return F.dropout_add_rms_norm(x, residual, norm.normalized_shape, norm.weight, norm.eps, p, training)
        forward = replaced_forward(norm)
        if (
            isinstance(forward, RowNorm)
            and not forward.offset
            and not forward.channels_first
            and norm.weight.dtype == x.dtype
        ):
            weight: Any = norm.weight
            shape, eps = tuple(weight.shape), getattr(norm, forward.eps)
            if forward.rms:
                return F.dropout_add_rms_norm(x, residual, shape, weight, eps, p, training)
            bias: Any = norm.bias
            return F.dropout_add_layer_norm(x, residual, shape, weight, bias, eps, p, training)
    total = residual + (x if dropout is None else dropout(x))
    return norm(total), total
