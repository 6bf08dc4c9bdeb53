"""Gradient clipping outside a step, as in torch.nn.utils. Inside a step, max_norm of the optimizers does it in one pass."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _compat, _native
from ._staging import Staging


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.", UserWarning, stacklevel=3
            )
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:  # the stored values are clipped; without repeated rows they are the gradient
            if not parameter.grad.is_coalesced():
                parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad._values())
        else:
            gradients.append(parameter.grad)
    return gradients


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their norm, over all of them together, is at most max_norm.

    Args:
        parameters: a tensor, or tensors; those without a gradient are skipped.
        max_norm: the largest norm to leave.
        norm_type: p of the p-norm; inf and -inf for the largest and the smallest absolute value. One pass sums and one
            scales; on the CPU there is no second pass if the norm is small enough. torch's own kernels run for p = 0
            (which counts the gradients that are not all zero), for complex gradients with p other than 2, and for DTensors.
        error_if_nonfinite: raise RuntimeError, with the gradients untouched, where the norm is NaN or infinite.
        foreach: a hint to torch, accepted and ignored.

    Returns:
        The norm before clipping, a 0-d tensor on the gradients' device. The sums are float64.

    Source: torch.nn.utils.clip_grad_norm_, whose factor max_norm / (norm + 1e-6) is kept.
    """
    max_norm, norm_type = float(max_norm), float(norm_type)
    gradients = _gradients(parameters)
    if not gradients:
        return torch.tensor(0.0)
    as_pairs_of_reals = norm_type == 2.0 or not any(g.is_complex() for g in gradients)
    if norm_type == 0 or not as_pairs_of_reals or _sharded(gradients):
        return _clip_by_torch(gradients, max_norm, norm_type, error_if_nonfinite)
    dtype = functools.reduce(torch.promote_types, (g.dtype.to_real() for g in gradients))
    plan, staging = _gather(gradients, math.inf)
    norm = _native.norm_of(plan, norm_type)
    _check_finite(norm.to(dtype), norm_type, error_if_nonfinite)
    if plan.cuda_devices() or not max_norm / (float(norm) + 1e-6) >= 1:  # on the CPU skip a factor of 1
        _native.update(plan, [staging], _native.GradientFactor(max_norm), norm)
    return norm.to(dtype)


def _gather(gradients: list[Tensor], limit: float) -> tuple[Any, Staging]:
    """A plan that clamps the gradients in place to [-limit, limit]."""
    plan, staging = _native.new_plan(), Staging(lambda index: f"gradient {index}", ())
    _native.Group("clip", (), gradients, {}, {"limit": limit}, staging, reads_grad=False).gather(plan)
    return plan, staging


def _check_finite(norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> None:
    """Raise torch's RuntimeError for a norm that is NaN or infinite, if requested (that reads it on the host)."""
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. To "
            f"disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )


def _sharded(gradients: list[Tensor]) -> bool:
    dtensor = _compat.dtensor_type()
    return dtensor is not None and any(isinstance(g, dtensor) for g in gradients)


def _clip_by_torch(gradients: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """The same with torch's own kernels."""
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(g, norm_type) for g in gradients]
        device = norms[0].device
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]), norm_type)
        _check_finite(total, norm_type, error_if_nonfinite)
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(factor.to(g.device))
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of the gradients to [-clip_value, clip_value], in place and in one pass.

    Args:
        parameters: a tensor, or tensors; those without a gradient are skipped.
        clip_value: the largest absolute value to leave. NaN stays NaN.
        foreach: a hint to torch, accepted and ignored.

    Source: torch.nn.utils.clip_grad_value_.
    """
    gradients = _gradients(parameters)
    if any(g.is_complex() for g in gradients):
        raise NotImplementedError("clamp is not supported for complex types: a complex gradient has no range of values")
    if _sharded(gradients):
        for g in gradients:
            g.clamp_(-clip_value, clip_value)
    elif gradients:
        plan, staging = _gather(gradients, float(clip_value))
        _native.update(plan, [staging], _native.GradientFactor())
