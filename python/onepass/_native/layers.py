"""The kernels of the row norms and of dropout as functions of tensors: they allocate the outputs and know no autograd.

All tensors of a call are strided, contiguous, on one device, without pending negation, and of float32, float64, bfloat16
or float16; `onepass.nn` makes sure of it. F stands for the dtype kernels compute in: float32, or float64 for float64.
Statistics are of F, in three rows: the mean (0 for RMSNorm), 1 / standard deviation, and the rounding error of the mean,
because a single F is too coarse for a large mean.
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
    "row_size",
    "row_statistics",
    "stream_of",
    "try_norm",
]


class NormOptions(NamedTuple):
    """A norm over rows: elements per row, eps, and whether it is RMSNorm, which subtracts no mean."""

    size: int
    eps: float
    rms: bool


class DropoutOptions(NamedTuple):
    """A dropout: the seed (0-d int64, on the input's device; None: no dropout), p, and whether kept elements are scaled."""

    seed: Tensor | None
    p: float
    inverted: bool


# What the extension calls a place: threads on the CPU; on CUDA the stream and allocate(bytes) for a workspace.
Place = tuple[int, int, Callable[[int], Tensor] | None]

# Up to this many elements on a CPU, recomputing a row's statistics in backward is faster than allocating a tensor for them.
TINY = 0 if _C.cuda_on_host else 8192


def stream_of(x: Tensor) -> Place:
    """Where the kernels of x run."""
    if not x.is_cuda and not _C.cuda_on_host:
        return torch.get_num_threads(), 0, None
    return 1, current_stream(x.device.index), lambda size: torch.empty(size, dtype=torch.uint8, device=x.device)


# --- norms over rows --------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> tuple[Tensor, Tensor]:
    """LayerNorm or RMSNorm: (y, stats).

    weight, bias: of `options.size` elements or of one, both of x's dtype or both of F. stats: [3, rows].
    """
    y, stats = torch.empty_like(x), row_statistics(x, options.size)
    _C.row_norm((x, None, weight, bias), (y, None, stats), options, None, stream_of(x))
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
    """A norm as a user called it: (y, size of a row), or size 0 and nothing done where checks or copies have to come first.

    See csrc/bind/layers.hpp for the conditions. stats: written if given.
    """
    y = torch.empty_like(x)
    if is_on_cuda(x):
        if stats is None:  # the CUDA kernel always writes them
            stats = row_statistics(x, row_size(x, normalized_shape))
        place = stream_of(x)
    else:
        place = torch.get_num_threads(), 0, None
    return y, _C.try_row_norm((x, weight, bias), (y, stats), normalized_shape, eps, rms, place)


def row_size(x: Tensor, normalized_shape: object) -> int:
    """Elements per row if normalized_shape may be the last dimensions of x, otherwise 0."""
    if not isinstance(normalized_shape, tuple) or not 0 < len(normalized_shape) <= x.dim():
        return 0
    return x.shape[-1] if len(normalized_shape) == 1 else math.prod(x.shape[-len(normalized_shape) :])


def row_statistics(x: Tensor, size: int) -> Tensor:
    """An uninitialised [3, rows] of F; nothing for rows of size 0."""
    shape = 3, x.numel() // size if size else 0
    if x.dtype is torch.float32:  # faster than naming the dtype: allocations are most of a tiny norm's time
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
    """Gradients of x, weight and bias, None where `want` is False. stats None: recomputed, on the CPU."""
    dx = torch.empty_like(x) if want[0] else None
    if weight is not None and x.numel() > 0:
        dweight = torch.empty_like(weight) if want[1] else None
        dbias = torch.empty_like(weight) if want[2] else None
    else:
        dweight, dbias = allocate_affine_gradients(x, weight, options.size, want[1], want[2])
    _C.row_norm_backward((dy, None, x, weight, stats), (dx, None, dweight, dbias), options, None, stream_of(x))
    return dx, dweight, dbias


def allocate_affine_gradients(
    x: Tensor, weight: Tensor | None, size: int, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, like the weight; a bias without a weight has one of F.

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

    mask: packed, one bit per element, for backward. Empty without keep_mask, without dropout, and on CUDA, where backward
    recomputes it faster than it reads it.
    """
    y, total, stats = torch.empty_like(x), torch.empty_like(x), row_statistics(x, options.size)
    mask = None if dropout.seed is None or is_on_cuda(x) else _allocate_mask(x)
    _C.row_norm(
        (x, residual, weight, bias), (y, total, stats), options, _dropout_arguments(dropout, mask, False), stream_of(x)
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

    gradients: of y, and what else reaches `sum`, or None. saved: sum, weight, stats and mask.
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
        stream_of(total),
    )
    if not drops:
        dx = dresidual if want[0] else None
    return dx, dresidual if want[1] else None, dweight, dbias


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, options: DropoutOptions, keep_mask: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dropout of x, into `out` (which may be x) or a new tensor: (y, mask); for mask see dropout_add_norm."""
    y = torch.empty_like(x) if out is None else out
    mask = _allocate_mask(x) if keep_mask and not is_on_cuda(x) else None
    _C.dropout(x, y, x.numel(), _dropout_arguments(options, mask, False), stream_of(x))
    return y, _no_mask(x) if mask is None else mask


def dropout_backward(dy: Tensor, options: DropoutOptions, mask: Tensor) -> Tensor:
    """Gradient of dropout's input. mask: as forward returned it."""
    dx = torch.empty_like(dy)
    _C.dropout(dy, dx, dy.numel(), _dropout_arguments(options, mask if mask.numel() else None, True), stream_of(dy))
    return dx


def dropout_mask(shape: Sequence[int], options: DropoutOptions, packed: bool) -> Tensor:
    """The mask of a dropout of this shape: bool; or packed, uint8 with bit i % 8 of byte i // 8, padded with zeros."""
    assert options.seed is not None
    size, device = torch.Size(shape).numel(), options.seed.device
    mask = torch.empty((size + 7) // 8, dtype=torch.uint8, device=device)
    nothing = torch.empty(0, device=device)
    _C.dropout(nothing, None, size, _dropout_arguments(options, mask, False), stream_of(mask))
    if packed:
        return mask
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    return ((mask.unsqueeze(1) >> bit) & 1).view(-1)[:size].view(tuple(shape)).bool()


def _dropout_arguments(
    options: DropoutOptions, mask: Tensor | None, reads_mask: bool
) -> tuple[Tensor, float, bool, Tensor | None, bool] | None:
    seed, p, inverted = options
    return None if seed is None else (seed, p, inverted, mask, reads_mask and mask is not None)


def _allocate_mask(x: Tensor) -> Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def _no_mask(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device)
