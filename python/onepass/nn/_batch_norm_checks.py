"""The checks of BatchNorm's operands, under the rules of _checks.py."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._dtypes import FLOATS
from .._native.batch_norm import Operands, Running
from ._checks import (
    as_float,
    check_affine_dtypes,
    check_alike,
    check_device,
    check_tensor,
    not_implemented,
    scalar_name,
)


def check_batch_norm_operands(
    operands: Operands, running: Running, training: bool, eps: float
) -> tuple[float | Tensor, float]:
    """momentum and eps as floats; a momentum that torch.compile is tracing stays a tensor.

    Raises for operands that do not fit together, checking in torch's order.
    """
    input, residual, weight, bias = operands
    running_mean, running_var, _, momentum = running
    usual = (
        residual is None
        and type(momentum) is float
        and type(eps) is float
        and eps > 0
        and (training or running_mean is not None)
    )
    if usual and _is_usual(input, running_mean, running_var, weight, bias):
        return momentum, eps
    check_tensor("batch_norm", "input", 1, input)
    if type(eps) is not float:
        eps = as_float("batch_norm", "eps", 8, eps)
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if type(momentum) is not float and not (isinstance(momentum, Tensor) and is_compiling()):
        momentum = as_float("batch_norm", "momentum", 7, momentum)
    if input.dim() == 1 and input.numel() == 0:  # torch returns it as it is
        return momentum, eps
    # In torch's order of checks; the positions are those that torch's errors name.
    per_channel = {
        "running_mean": (4, running_mean),
        "running_var": (5, running_var),
        "weight": (2, weight),
        "bias": (3, bias),
    }
    for name, (position, tensor) in per_channel.items():
        if tensor is not None:
            check_tensor("batch_norm", name, position, tensor)
        elif not training and name.startswith("running"):
            raise RuntimeError(f"{name} must be defined in evaluation mode")
    if input.dim() < 2:
        _refuse_few_dimensions(input, running_mean)
    for name, (_, tensor) in per_channel.items():
        if tensor is not None:
            _check_per_channel(name, tensor, input)
    if input.dtype not in FLOATS:
        not_implemented("batch_norm", input.dtype)
    check_affine_dtypes(input, weight, bias)
    if residual is not None:
        _check_residual(residual, input)
    return momentum, eps


def _check_per_channel(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.numel() != input.shape[1]:
        raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {tensor.numel()}")
    check_device(name, tensor, input)
    if name.startswith("running"):
        _check_statistic(name, tensor, input)


def _check_residual(residual: Tensor, input: Tensor) -> None:
    check_alike("residual", residual, input)
    if residual.dtype != input.dtype:
        raise RuntimeError(
            f"expected scalar type {scalar_name(input.dtype)} but found {scalar_name(residual.dtype)}: residual and input "
            f"need one dtype."
        )


def _refuse_few_dimensions(input: Tensor, running_mean: Tensor | None) -> NoReturn:
    reason = f"input has {input.dim()} dimension{'' if input.dim() else 's'}, at least [N, C] is expected"
    if running_mean is not None and running_mean.numel():
        raise RuntimeError(f"running_mean should contain 0 elements not {running_mean.numel()}: {reason}")
    if input.dim() == 1:
        raise IndexError(f"Dimension out of range (expected to be in range of [-1, 0], but got 1): {reason}")
    raise IndexError(f"tuple index out of range: {reason}")


def _is_usual(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether all operands come in pairs of the input's dtype and device: no later check can fail, which saves 3 us."""
    if not isinstance(input, Tensor) or input.dtype not in FLOATS or input.dim() < 2:
        return False
    dtype, device, shape = input.dtype, input.device, (input.shape[1],)
    for first, second in ((running_mean, running_var), (weight, bias)):
        if first is None and second is None:
            continue
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return False
        if first.dtype != dtype or second.dtype != dtype or first.device != device or second.device != device:
            return False
        if first.shape != shape or second.shape != shape:
            return False
    return running_mean is None or not (
        running_mean.requires_grad or (running_var is not None and running_var.requires_grad)
    )


def check_batch_size(input: Tensor) -> None:
    """Raise ValueError for one value per channel, which has no variance; an empty batch is allowed."""
    check_tensor("batch_norm", "input", 1, input)
    shape = input.shape
    if len(shape) > 1 and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def _check_statistic(name: str, tensor: Tensor, input: Tensor) -> None:
    if not tensor.is_floating_point():
        raise RuntimeError(
            f"expected scalar type {scalar_name(input.dtype)} but found {scalar_name(tensor.dtype)}: {name} has dtype "
            f"{tensor.dtype}; any floating dtype will do."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. This input cannot "
            f"have requires_grad True."
        )
