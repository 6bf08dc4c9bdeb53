"""BatchNorm over the batches of all processes: forward merges the moments, backward the sums of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from .. import _compat
from .._dtypes import compute_dtype
from .._native import batch_norm as native
from .._native.batch_norm import BatchNormOptions, Operands, Running, Saved
from ._batch_norm import counts_batch, update_running
from ._batch_norm_autograd import count_batch, dense, dense_operands, dense_saved, is_channels_last
from ._batch_norm_checks import check_batch_norm_operands
from ._dispatch import KERNEL, choose_route
from ._library import drop_unwanted


def find_sync_group(module: torch.nn.SyncBatchNorm, input: Tensor) -> Any:
    """The process group to synchronise with, or None if it has no other process."""
    if input.size(1) == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = module.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


@_compat.disable_dynamo
def sync_batch_norm(operands: Operands, running: Running, eps: float, slope: float | None, group: Any) -> Tensor:
    """apply_batch_norm in training over the batches of all processes of `group`, each of which must call it.

    Raises: as batch_norm; RuntimeError inside torch.func transforms, in forward-mode AD and for tensor subclasses.
    """
    momentum, eps = check_batch_norm_operands(operands, running, True, eps)
    if choose_route(*operands, running.mean, running.var) != KERNEL:
        raise RuntimeError(
            "SyncBatchNorm exchanges statistics between processes; it does not support torch.func transforms, forward-mode "
            "AD, tensor subclasses and devices without kernels"
        )
    options = BatchNormOptions(eps, slope, is_channels_last(operands.x))
    operands = dense_operands(operands, options.channels_last)
    y: Tensor = _SyncBatchNorm.apply(*operands, running._replace(momentum=float(momentum)), options, group)  # type: ignore[no-untyped-call]
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
        options: BatchNormOptions,
        group: Any,
    ) -> Tensor:
        mean, var, values = _merged_moments(x, options.channels_last, group)
        if counts_batch():
            momentum = (values > 0) * torch.full_like(values, float(running.momentum))  # 0 if all batches are empty
            update_running(running._replace(momentum=momentum), mean, var, values.clamp(min=2))
            count_batch(running.batches)
        dtype = compute_dtype(x.dtype)
        stats = torch.stack((mean, torch.rsqrt(var + options.eps), mean - mean.to(dtype))).to(dtype)
        operands = Operands(x, residual, weight, bias)
        y = native.batch_norm_apply(operands, stats, options) if x.numel() else torch.empty_like(x)
        ctx.save_for_backward(x, None if options.slope is None else y, weight, stats, values)
        ctx.options, ctx.group = options, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved_tensors, values = ctx.saved_tensors
        options: BatchNormOptions = ctx.options
        want = ctx.needs_input_grad
        dy, saved = dense(dy, options.channels_last), dense_saved(Saved(*saved_tensors), options)
        stats, is_empty = saved.stats, saved.x.numel() == 0
        sums = torch.zeros_like(stats[:2]) if is_empty else native.batch_norm_backward_sums(dy, saved, options)
        dbias, dweight = sums  # of this process only: DistributedDataParallel averages gradients
        dx: Tensor | None = None
        dresidual: Tensor | None = dy
        means = sums
        if want[0]:
            means = sums.to(torch.float64, copy=True)
            distributed.all_reduce(means, group=ctx.group)
            means = (means / values).to(stats.dtype)
            dx = torch.empty_like(saved.x)
        if not is_empty and (want[0] or want[1]):
            dx, dresidual = native.batch_norm_backward_apply(dy, saved, means, 1.0, options, want[:2])
        return *drop_unwanted((dx, dresidual, dweight, dbias), want[:4]), None, None, None


def _merged_moments(x: Tensor, channels_last: bool, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel over all processes, in float64. Source: Chan et al. 1979.

    An empty batch has weight 0. The moments are gathered rather than reduced, so that every process adds them in the
    same order and gets the same bits.
    """
    channels = x.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        moments = native.batch_norm_moments(x, channels_last)
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
