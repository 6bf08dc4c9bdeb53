"""The kernels of the row norms and of dropout as functions of tensors, which allocate the outputs; no autograd here.

onepass.nn guarantees that all tensors of a call are strided, contiguous, on one device, without pending negation, and
float32, float64, bfloat16 or float16. F is the compute dtype: float64 for float64, otherwise float32. Statistics are
three rows of F: the mean (0 for RMSNorm), 1 / standard deviation, and the rounding error of the mean, because one F is
too coarse for a large mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._dtypes import compute_dtype
from .devices import current_stream, is_on_cuda

__all__ = [
    "TINY",
    "DropoutOptions",
    "NormOptions",
    "allocate_affine_gradients",
    "dropout",
    "dropout_add_norm",
    "dropout_add_norm_backward",
    "dropout_backward",
    "dropout_mask",
    "norm",
    "norm_backward",
    "resources_for",
    "row_size",
    "row_statistics",
    "try_norm",
]


class NormOptions(NamedTuple):
    """A norm over rows. size: elements per row. rms: RMSNorm, which subtracts no mean."""

    size: int
    eps: float
    rms: bool


class DropoutOptions(NamedTuple):
    """A dropout. seed: 0-d int64 on the input's device, None for no dropout. inverted: scale by 1 / (1 - p)."""

    seed: Tensor | None
    p: float
    inverted: bool


# What a call runs with: the number of threads on the CPU; on CUDA the stream, and allocate(bytes) for a workspace.
Resources = tuple[int, int, Callable[[int], Tensor] | None]

# Up to this many CPU elements, recomputing a norm's statistics in backward is faster than allocating memory for them.
TINY = 0 if _C.cuda_on_host else 8192


def resources_for(x: Tensor) -> Resources:
    """What the kernels of x run with."""
    if not x.is_cuda and not _C.cuda_on_host:
        return torch.get_num_threads(), 0, None
    return 1, current_stream(x.device.index), lambda size: torch.empty(size, dtype=torch.uint8, device=x.device)


# --- norms over rows --------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> tuple[Tensor, Tensor]:
    """LayerNorm or RMSNorm: (y, stats).

    weight, bias: `options.size` elements or one, both of x's dtype or both of F. stats: [3, rows].
    """
    y, stats = torch.empty_like(x), row_statistics(x, options.size)
    _C.row_norm((x, None, weight, bias), (y, None, stats), options, None, resources_for(x))
    return y, stats


def try_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    stats: Tensor | None,
) -> tuple[Tensor, int]:
    """A norm with a user's unchecked arguments: (y, elements per row), or size 0 without doing anything if the operands
    need checks or copies first. See csrc/bind/layers.hpp for the conditions. stats: written if not None.
    """
    y = torch.empty_like(x)
    if is_on_cuda(x):
        if stats is None and (row := row_size(x, normalized_shape)):  # the CUDA kernel always writes them
            stats = row_statistics(x, row)
        resources = resources_for(x)
    else:
        resources = torch.get_num_threads(), 0, None
    return y, _C.try_row_norm((x, weight, bias), (y, stats), normalized_shape, eps, rms, resources)


def row_size(x: Tensor, normalized_shape: object) -> int:
    """Elements per row; 0 if normalized_shape cannot be the last dimensions of x."""
    if x.is_nested or not isinstance(normalized_shape, tuple) or not 0 < len(normalized_shape) <= x.dim():
        return 0
    return x.shape[-1] if len(normalized_shape) == 1 else math.prod(x.shape[-len(normalized_shape) :])


def row_statistics(x: Tensor, size: int) -> Tensor:
    """An uninitialised [3, rows] of F."""
    shape = 3, x.numel() // size
    if x.dtype is torch.float32:  # faster without a dtype argument: allocations take most of a tiny norm's time
        return x.new_empty(shape)
    return x.new_empty(shape, dtype=compute_dtype(x.dtype))


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    options: NormOptions,
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, None where `want` is False. stats=None, on the CPU only: recompute them."""
    dx = torch.empty_like(x) if want[0] else None
    if weight is not None and x.numel() > 0:
        dweight = torch.empty_like(weight) if want[1] else None
        dbias = torch.empty_like(weight) if want[2] else None
    else:
        dweight, dbias = allocate_affine_gradients(x, weight, options.size, want[1], want[2])
    _C.row_norm_backward((dy, None, x, weight, stats), (dx, None, dweight, dbias), options, None, resources_for(x))
    return dx, dweight, dbias


def allocate_affine_gradients(
    x: Tensor, weight: Tensor | None, size: int, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Tensors for the gradients of weight and bias, like the weight; for a bias without a weight, of F.

    Zeros for an empty x, for which no kernel runs.
    """
    like = torch.zeros_like if x.numel() == 0 else torch.empty_like
    if weight is None:
        return None, like(x.new_empty(size, dtype=compute_dtype(x.dtype))) if want_bias else None
    return like(weight) if want_weight else None, like(weight) if want_bias else None


# --- dropout before a residual and a norm -----------------------------------------------------------------------------


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout: DropoutOptions,
    options: NormOptions,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum = residual + dropout(x) and its norm: (y, sum, stats, mask).

    mask: packed, one bit per element, for backward. Empty without keep_mask, without dropout, and on CUDA, where
    recomputing it is faster than reading it.
    """
    y, total, stats = torch.empty_like(x), torch.empty_like(x), row_statistics(x, options.size)
    mask = None if dropout.seed is None or is_on_cuda(x) else _allocate_mask(x)
    _C.row_norm(
        (x, residual, weight, bias),
        (y, total, stats),
        options,
        _dropout_arguments(dropout, mask, False),
        resources_for(x),
    )
    return y, total, stats, mask if mask is not None and keep_mask else _no_mask(x)


def dropout_add_norm_backward(
    gradients: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor, Tensor | None, Tensor, Tensor],
    dropout: DropoutOptions,
    options: NormOptions,
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, residual, weight and bias.

    gradients: of y and of sum (or None). saved: sum, weight, stats and mask.
    """
    total, weight, stats, mask = saved
    drops = dropout.seed is not None and want[0]
    dresidual = torch.empty_like(total) if want[0] or want[1] else None
    dx = torch.empty_like(total) if drops else None
    dweight, dbias = allocate_affine_gradients(total, weight, options.size, want[2], want[3])
    if drops and not mask.numel() and not is_on_cuda(total):
        mask = dropout_mask(total.shape, dropout, packed=True)
    _C.row_norm_backward(
        (*gradients, total, weight, stats),
        (dresidual, dx, dweight, dbias),
        options,
        _dropout_arguments(dropout, mask if mask.numel() else None, True),
        resources_for(total),
    )
    if not drops:
        dx = dresidual if want[0] else None
    return dx, dresidual if want[1] else None, dweight, dbias


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, options: DropoutOptions, keep_mask: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dropout of x into `out`, which may be x, or into a new tensor: (y, mask). mask: as dropout_add_norm's."""
    y = torch.empty_like(x) if out is None else out
    mask = _allocate_mask(x) if keep_mask and not is_on_cuda(x) else None
    _C.dropout(x, y, x.numel(), _dropout_arguments(options, mask, False), resources_for(x))
    return y, _no_mask(x) if mask is None else mask


def dropout_backward(dy: Tensor, options: DropoutOptions, mask: Tensor) -> Tensor:
    """Gradient of dropout's input. mask: the one that forward returned."""
    dx = torch.empty_like(dy)
    _C.dropout(dy, dx, dy.numel(), _dropout_arguments(options, mask if mask.numel() else None, True), resources_for(dy))
    return dx


def dropout_mask(shape: Sequence[int], options: DropoutOptions, packed: bool) -> Tensor:
    """The mask of a dropout of this shape: bool or, if packed, uint8: bit i % 8 of byte i // 8, padded with zeros."""
    assert options.seed is not None
    size, device = torch.Size(shape).numel(), options.seed.device
    mask = torch.empty((size + 7) // 8, dtype=torch.uint8, device=device)
    no_input = torch.empty(0, device=device)
    _C.dropout(no_input, None, size, _dropout_arguments(options, mask, False), resources_for(mask))
    if packed:
        return mask
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    return ((mask.unsqueeze(1) >> bit) & 1).view(-1)[:size].view(tuple(shape)).bool()


def _dropout_arguments(
    options: DropoutOptions, mask: Tensor | None, reads_mask: bool
) -> tuple[Tensor, float, bool, Tensor | None, bool] | None:
    """What the extension takes for a dropout: seed, p, inverted, mask, and whether to read or to write the mask."""
    seed, p, inverted = options
    return None if seed is None else (seed, p, inverted, mask, reads_mask and mask is not None)


def _allocate_mask(x: Tensor) -> Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def _no_mask(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device)
