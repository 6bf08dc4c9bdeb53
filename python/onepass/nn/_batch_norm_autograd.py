"""BatchNorm's autograd functions and operators, between onepass.nn._batch_norm and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .._dtypes import compute_dtype
from .._native import batch_norm as native
from .._native.batch_norm import BatchNormOptions, Operands, Running, Saved
from . import _formula
from . import _operator_checks as checks
from ._dispatch import FORMULA, KERNEL, choose_backward_route, for_kernel, for_kernel_or_none, never_kernel
from ._library import define, drop_unwanted, pad_missing
from ._norm import fake_affine_gradient


def count_batch(batches: Tensor | None) -> None:
    """Count one more batch in the running statistics."""
    if batches is not None:
        batches.add_(1)


def normalise_and_count(operands: Operands, running: Running, options: BatchNormOptions) -> tuple[Tensor, Tensor]:
    """Run the training kernel, which updates the running statistics, and count the batch.

    Counting comes first: Python raises a Ctrl-C during the kernel only after it, when the running statistics have
    changed.
    """
    count_batch(running.batches)
    try:
        return native.batch_norm(operands, running, options)
    except Exception:  # such as no memory for the result: the running statistics have not changed
        if running.batches is not None:
            running.batches.sub_(1)
        raise


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in memory. A tensor with gaps is classified by the closest dense order."""
    return x.dim() > 3 and x.stride(1) == 1 and not x.is_contiguous()


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """The tensor, dense in the memory order given and with no pending negation; a copy if it has to be."""
    memory_format = _memory_format(x, channels_last)
    if x.is_contiguous(memory_format=memory_format) and not x.is_neg():
        return x
    return x.resolve_neg().contiguous(memory_format=memory_format)


def dense_or_none(x: Tensor | None, channels_last: bool) -> Tensor | None:
    return None if x is None else dense(x, channels_last)


def dense_operands(operands: Operands, channels_last: bool) -> Operands:
    """The operands, dense as kernels need them; the same object if they are already."""
    x, residual, weight, bias = operands
    ready = dense(x, channels_last), dense_or_none(residual, channels_last)
    ready_affine = for_kernel_or_none(weight), for_kernel_or_none(bias)
    if ready[0] is x and ready[1] is residual and ready_affine[0] is weight and ready_affine[1] is bias:
        return operands
    return Operands(*ready, *ready_affine)


def _memory_format(x: Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


# --- autograd ---------------------------------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running,
        options: BatchNormOptions,
        training: bool,
    ) -> Tensor:
        run = normalise_and_count if training else native.batch_norm_running
        y, stats = run(Operands(x, residual, weight, bias), running, options)
        _save(ctx, (x, y, weight, stats), options, training)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, choose_backward_route(dy)), None, None, None


apply_with_autograd = _compat.fast_apply(_BatchNorm)


def _save(ctx: Any, saved: tuple[Any, ...], options: BatchNormOptions, training: bool) -> None:
    """Save the fields of Saved and the options for backward."""
    x, y, weight, stats = saved
    ctx.save_for_backward(x, None if options.slope is None else y, weight, stats)
    ctx.options, ctx.training = options, training


def _gradients(ctx: Any, dy: Tensor, route: int) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, weight and bias."""
    saved = Saved(*ctx.saved_tensors)
    options: BatchNormOptions = ctx.options
    want = ctx.needs_input_grad[:4]
    if route == FORMULA:
        return drop_unwanted(_formula.batch_norm_backward(dy, saved, options, ctx.training), want)
    if route == KERNEL:
        dy, saved = dense(dy, options.channels_last), dense_saved(saved, options)
        return native.batch_norm_backward(dy, saved, options, ctx.training, want)
    # Without an activation the residual's gradient is dy, but an operator's results must not share memory with dy.
    operator_want = want[0], want[1] and options.slope is not None, *want[2:]
    dx, dresidual, dweight, dbias = _operator_backward(dy, *saved, *options, ctx.training, operator_want)
    return drop_unwanted((dx, dy if options.slope is None else dresidual, dweight, dbias), want)


def dense_saved(saved: Saved, options: BatchNormOptions) -> Saved:
    """The saved tensors, dense as kernels need them: saved-tensor hooks may have changed the layout."""
    x, y, weight, stats = saved
    return Saved(
        dense(x, options.channels_last),
        dense_or_none(y, options.channels_last),
        for_kernel_or_none(weight),
        for_kernel(stats),
    )


# --- the operators ----------------------------------------------------------------------------------------------------


def _kernel(x: Tensor, residual: Any, weight: Any, bias: Any, options: BatchNormOptions) -> tuple[Tensor, Tensor]:
    operands = dense_operands(Operands(x, residual, weight, bias), options.channels_last)
    return native.batch_norm(operands, Running(None, None), options)


def _fake(x: Tensor, residual: Any, weight: Any, bias: Any, options: BatchNormOptions) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=_memory_format(x, options.channels_last))
    return y, x.new_empty((3, x.shape[1]), dtype=compute_dtype(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, _, options = inputs
    y, stats = output
    _save(ctx, (x, y, weight, stats), options, True)


def _kernel_apply(x: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, options: BatchNormOptions) -> Tensor:
    operands = dense_operands(Operands(x, residual, weight, bias), options.channels_last)
    return native.batch_norm_apply(operands, for_kernel(stats), options)


def _fake_apply(x: Tensor, residual: Any, weight: Any, bias: Any, stats: Any, options: BatchNormOptions) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x, options.channels_last))


def _setup_context_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, weight, _, stats, options = inputs
    _save(ctx, (x, output, weight, stats), options, False)


def _kernel_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    options: BatchNormOptions,
    training: bool,
    want: Sequence[bool],
) -> Any:
    saved = dense_saved(Saved(x, y, weight, stats), options)
    return pad_missing(native.batch_norm_backward(dense(dy, options.channels_last), saved, options, training, want), x)


def _fake_backward(dy: Any, x: Tensor, y: Any, weight: Tensor | None, stats: Any, *rest: Any) -> Any:
    options, _, want = rest
    dx = torch.empty_like(x, memory_format=_memory_format(x, options.channels_last))
    dweight = fake_affine_gradient(x, weight, x.shape[1])
    return pad_missing(drop_unwanted((dx, torch.empty_like(dx), dweight, torch.empty_like(dweight)), want), x)


batch_norm_operator = define(
    "batch_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float? slope, bool channels_last)"
    " -> (Tensor y, Tensor stats)",
    checks.batch_norm,
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dstats: (*_gradients(ctx, dy, never_kernel(choose_backward_route(dy))), None, None, None),
    options=[BatchNormOptions],
)
batch_norm_apply_operator = define(
    "batch_norm_apply",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, float eps, float? slope, "
    "bool channels_last) -> Tensor",
    checks.batch_norm_apply,
    _kernel_apply,
    _fake_apply,
    _setup_context_apply,
    lambda ctx, dy: (*_gradients(ctx, dy, never_kernel(choose_backward_route(dy))), *(None,) * 4),
    options=[BatchNormOptions],
)
_operator_backward = define(
    "batch_norm_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor stats, float eps, float? slope, bool channels_last, "
    "bool training, bool[] want) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    checks.batch_norm_backward,
    _kernel_backward,
    _fake_backward,
    options=[BatchNormOptions],
)
