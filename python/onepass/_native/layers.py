"""The kernels of the layers as functions of tensors: they make the outputs and know nothing of autograd.

Inputs are plain strided tensors of one device and of a dtype in float32, float64, bfloat16, float16, laid out as said;
`onepass.nn.functional` sees to that. F below is float32, or float64 for float64. Statistics are F, in three rows: mean
(0 for RMSNorm), 1 / standard deviation, and what F leaves of the mean, which one F is too coarse for if it is large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _C
from . import _stream, is_on_cuda

__all__ = [
    "TINY",
    "affine_gradients",
    "arithmetic",
    "dropout",
    "dropout_add_norm",
    "dropout_add_norm_backward",
    "dropout_backward",
    "dropout_mask",
    "norm",
    "norm_alone",
    "norm_backward",
    "norm_for_backward",
    "place_of",
]

# The seed, p, whether the elements kept are scaled up, the packed mask or None, whether to read it.
_Dropout = tuple[Tensor, float, bool, Tensor | None, bool]
# Threads of the CPU; the stream of a GPU, and allocate(bytes), which gives a workspace there.
Place = tuple[int, int, Callable[[int], Tensor] | None]


def arithmetic(x: Tensor) -> torch.dtype:
    """F."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def place_of(x: Tensor) -> Place:
    """Where the kernels of x run."""
    if not x.is_cuda and not _C.cuda_on_host:
        return torch.get_num_threads(), 0, None
    return 1, _stream(x.device.index), lambda size: torch.empty(size, dtype=torch.uint8, device=x.device)


def _mask_for(x: Tensor) -> Tensor:
    """A packed mask, one bit an element."""
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


# Up to this many elements on a CPU making a row's statistics anew in backward is quicker than a tensor that keeps them.
TINY = 0 if _C.cuda_on_host else 8192


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """LayerNorm, or RMSNorm with rms, over the last `size` elements of a contiguous x: (y, stats).

    weight, bias: of `size` elements or of one, both of x's dtype or of F. stats: [3, rows].
    """
    stats = _row_stats(x, size)
    return _norm(x, weight, bias, stats, size, eps, rms), stats


def norm_alone(x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float, rms: bool) -> Tensor:
    """The same where nobody wants the statistics: y."""
    return _norm(x, weight, bias, _row_stats(x, size) if is_on_cuda(x) else None, size, eps, rms)


def norm_for_backward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor | None]:
    """The same for norm_backward: stats are None where it is quicker without."""
    stats = None if x.is_cpu and x.numel() <= TINY else _row_stats(x, size)
    return _norm(x, weight, bias, stats, size, eps, rms), stats


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
) -> Tensor:
    y = torch.empty_like(x)
    place = place_of(x) if x.is_cuda or _C.cuda_on_host else (torch.get_num_threads(), 0, None)  # a frame less
    _C.row_norm((x, None, weight, bias), (y, None, stats), (size, eps, rms), None, place)
    return y


def _row_stats(x: Tensor, size: int) -> Tensor:
    shape = 3, x.numel() // size
    if x.dtype is torch.float32:  # the quicker way to the same: for a tiny norm allocations are most of its time
        return x.new_empty(shape)
    return x.new_empty(shape, dtype=arithmetic(x))


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, None where `want` says so; dy as x. eps: for stats None, which are made anew."""
    dx = torch.empty_like(x) if want[0] else None
    if weight is not None and x.numel() > 0:
        dweight = torch.empty_like(weight) if want[1] else None
        dbias = torch.empty_like(weight) if want[2] else None
    else:
        dweight, dbias = affine_gradients(x, weight, size, want[1], want[2])
    place = place_of(x) if x.is_cuda or _C.cuda_on_host else (torch.get_num_threads(), 0, None)
    _C.row_norm_backward((dy, None, x, weight, stats), (dx, None, dweight, dbias), (size, eps, rms), None, place)
    return dx, dweight, dbias


def affine_gradients(
    x: Tensor, weight: Tensor | None, size: int, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the gradients of weight and bias, like the weight; without one that of the bias is F.

    Zeros for an empty x, which no kernel runs for.
    """
    like = torch.zeros_like if x.numel() == 0 else torch.empty_like
    if weight is None:
        return None, like(x.new_empty(size, dtype=arithmetic(x))) if want_bias else None
    return like(weight) if want_weight else None, like(weight) if want_bias else None


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
    p: float,
    seed: Tensor | None,
    inverted: bool,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum = residual + dropout(x) and its norm: (y, sum, stats, mask).

    seed: a 0-d int64 tensor on x's device, or None for no dropout. mask: the packed mask for backward; empty without
    keep_mask, without dropout, and where backward is faster making it anew.
    """
    y, total = torch.empty_like(x), torch.empty_like(x)
    stats = _row_stats(x, size)
    on_cuda = is_on_cuda(x)
    mask = None if seed is None or on_cuda else _mask_for(x)
    _C.row_norm(
        (x, residual, weight, bias),
        (y, total, stats),
        (size, eps, rms),
        _dropout_arguments(seed, p, inverted, mask, False),
        place_of(x),
    )
    return y, total, stats, mask if mask is not None and keep_mask else _no_mask(x)


def dropout_add_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    size: int,
    rms: bool,
    p: float,
    seed: Tensor | None,
    inverted: bool,
    mask: Tensor,
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, residual, weight and bias. dsum: what reaches `sum` beside the norm, or None."""
    dresidual = torch.empty_like(total) if want[0] or want[1] else None
    dx = dresidual if seed is None or not want[0] else torch.empty_like(total)
    dweight, dbias = affine_gradients(total, weight, size, want[2], want[3])
    if seed is not None and want[0] and not mask.numel() and not is_on_cuda(total):
        mask = dropout_mask(total.shape, p, seed, True, total.device)
    _C.row_norm_backward(
        (dy, dsum, total, weight, stats),
        (dresidual, dx if dx is not dresidual else None, dweight, dbias),
        (size, 0.0, rms),
        _dropout_arguments(seed, p, inverted, mask if mask.numel() else None, True),
        place_of(total),
    )
    return dx if want[0] else None, dresidual if want[1] else None, dweight, dbias


def _dropout_arguments(
    seed: Tensor | None, p: float, inverted: bool, mask: Tensor | None, reads_mask: bool
) -> _Dropout | None:
    if seed is None:
        return None
    return seed, p, inverted, mask, reads_mask and mask is not None


def _no_mask(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device)


def dropout(
    x: Tensor, p: float, seed: Tensor, inverted: bool, keep_mask: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dropout of a contiguous x, into `out` (which may be x) or a new tensor: (y, mask); see dropout_add_norm for mask."""
    y = torch.empty_like(x) if out is None else out
    mask = _mask_for(x) if keep_mask and not is_on_cuda(x) else None
    _C.dropout(x, y, x.numel(), _dropout_arguments(seed, p, inverted, mask, False), place_of(x))
    return y, _no_mask(x) if mask is None else mask


def dropout_backward(dy: Tensor, p: float, seed: Tensor, inverted: bool, mask: Tensor) -> Tensor:
    """Gradient of dropout's input; mask: what forward gave."""
    dx = torch.empty_like(dy)
    known = mask if mask.numel() else None
    _C.dropout(dy, dx, dy.numel(), _dropout_arguments(seed, p, inverted, known, True), place_of(dy))
    return dx


def dropout_mask(shape: Sequence[int], p: float, seed: Tensor, packed: bool, device: torch.device) -> Tensor:
    """What a dropout of this shape keeps: bool, or packed, uint8 with bit i % 8 of byte i // 8 and zeros at the end."""
    size = torch.Size(shape).numel()
    mask = torch.empty((size + 7) // 8, dtype=torch.uint8, device=device)
    nothing = torch.empty(0, device=device)
    _C.dropout(nothing, None, size, _dropout_arguments(seed, p, True, mask, False), place_of(mask))
    if packed:
        return mask
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    return ((mask.unsqueeze(1) >> bit) & 1).view(-1)[:size].view(tuple(shape)).bool()
