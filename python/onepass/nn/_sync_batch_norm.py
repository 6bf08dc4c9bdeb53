"""BatchNorm over the batches of all processes: moments are merged in forward, sums of the gradient in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from .. import _compat
from .._native import batch_norm as native
from ._batch_norm import is_counted, update_running
from ._batch_norm_autograd import Running, count, dense, is_channels_last
from ._batch_norm_checks import batch_norm_operands
from ._dispatch import KERNEL, plain_or_none, route, wide


def world_of(module: torch.nn.SyncBatchNorm, input: Tensor) -> Any:
    """The process group to synchronise with, or None where this process is alone."""
    if input.size(1) == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = module.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


@_compat.disable_dynamo
def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    slope: float | None,
    group: Any,
    batches: Tensor | None,
) -> Tensor:
    """apply_batch_norm in training over the batches of all processes of `group`, every one of which must call it.

    Raises: as batch_norm; RuntimeError inside of torch.func transforms, forward-mode AD and for tensor subclasses.
    """
    running = running_mean, running_var
    momentum, eps = batch_norm_operands(x, *running, weight, bias, residual, True, momentum, eps)
    if route(x, weight, bias, residual, *running) != KERNEL:
        raise RuntimeError(
            "SyncBatchNorm exchanges statistics between processes: not for torch.func transforms, forward-mode AD, tensor "
            "subclasses and devices without kernels"
        )
    channels_last = is_channels_last(x)
    y: Tensor = _SyncBatchNorm.apply(
        dense(x, channels_last),
        None if residual is None else dense(residual, channels_last),
        plain_or_none(weight),
        plain_or_none(bias),
        running,
        float(momentum),
        eps,
        slope,
        group,
        channels_last,
        batches,
    )  # type: ignore[no-untyped-call]
    return y


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running,
        momentum: float,
        eps: float,
        slope: float | None,
        group: Any,
        channels_last: bool,
        batches: Tensor | None,
    ) -> Tensor:
        mean, var, values = _merged_moments(x, group)
        if is_counted():
            counted = (values > 0) * torch.full_like(values, momentum)  # 0 where all batches are empty
            update_running(running, mean, var, values.clamp(min=2), counted)
            count(batches)
        dtype = wide(x.dtype)
        stats = torch.stack((mean, torch.rsqrt(var + eps), mean - mean.to(dtype))).to(dtype)
        y = native.batch_norm_apply(x, stats, weight, bias, residual, slope) if x.numel() else torch.empty_like(x)
        ctx.save_for_backward(x, None if slope is None else y, weight, stats, values)
        ctx.rest = group, channels_last, slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, stats, values = ctx.saved_tensors
        group, channels_last, slope = ctx.rest
        want = ctx.needs_input_grad
        x, dy = dense(x, channels_last), dense(dy, channels_last)
        y = None if y is None else dense(y, channels_last)
        empty = x.numel() == 0
        sums = torch.zeros_like(stats[:2]) if empty else native.batch_norm_backward_sums(dy, x, y, stats, slope)
        dbias, dweight = sums  # this process's: averaging gradients is DistributedDataParallel's
        dx: Tensor | None = None
        dresidual: Tensor | None = dy
        means = sums
        if want[0]:
            means = sums.to(torch.float64, copy=True)
            distributed.all_reduce(means, group=group)
            means = (means / values).to(stats.dtype)
            dx = torch.empty_like(x)
        if not empty and (want[0] or want[1]):
            dx, dresidual = native.batch_norm_backward_apply(dy, x, y, weight, stats, means, 1.0, slope, want[:2])
        gradients = dx, dresidual, dweight, dbias
        return *(g if wanted else None for g, wanted in zip(gradients, want, strict=False)), *(None,) * 7


def _merged_moments(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel and the values in it, over all processes, in float64. Chan et al. 1979.

    An empty batch weighs nothing. Gathered, not reduced: every process adds up in the same order and gets the same bits.
    """
    channels = x.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        moments = native.batch_norm_moments(x)
        own[:-1] = moments[:2].reshape(-1)
        own[:channels] += moments[2]
        own[-1] = x.numel() // channels
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(gathered, own, group=group)
    table = torch.stack(gathered)
    means, variances, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
    count = counts.sum()
    weights = counts / count.clamp(min=1)
    mean = (means * weights).sum(0)
    return mean, ((variances + (means - mean).square()) * weights).sum(0), count
