"""States in 8 bits, to and from float32: the formulas of csrc/core/storage.hpp, rounded to nearest. For loading and looking."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

GROUP = _native.SCALE_GROUP


def _bias_bits(format_: str) -> int:
    return (128 - (16 if format_ == "signed8" else 32)) << 23


def _as_float(bits: Tensor | int) -> Tensor:
    return torch.as_tensor(bits, dtype=torch.int32).view(torch.float32)


def decode(format_: str, codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of a state in 8 bits: dense, with the strides of the codes."""
    flat = codes.as_strided((codes.numel(),), (1,)).to(torch.int32)
    sign = flat & 0x80 if format_ == "signed8" else torch.zeros_like(flat)
    bias = _bias_bits(format_)
    magnitude = _as_float(((flat ^ sign) << 20) + bias) - float(_as_float(bias))
    magnitude = magnitude * scale.to(torch.float32).repeat_interleave(GROUP)[: flat.numel()]
    values = torch.empty_like(codes, dtype=torch.float32)
    values.as_strided((values.numel(),), (1,)).copy_(torch.where(sign != 0, -magnitude, magnitude))
    return values


def encode(format_: str, values: Tensor, codes: Tensor, scale: Tensor) -> None:
    """The reverse: writes codes and scales. All dense; codes have the strides of the values."""
    count, groups = values.numel(), scale.numel()
    if count == 0:
        return
    x = torch.zeros(groups * GROUP, dtype=torch.float32, device=values.device)
    x[:count] = values.as_strided((count,), (1,))
    x = x.view(groups, GROUP)
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    largest = magnitude.amax(1)
    overflow = largest >= 0x7EE80000
    nan = overflow & ((largest > 0x7F800000) if format_ == "unsigned8" else torch.ones_like(overflow))
    bits = ((largest + 0x180000) & 0x7F800000).clamp(min=0x800000)
    bits[overflow] = 0x7F800000
    inverse = _as_float((254 << 23) - bits.clamp(max=253 << 23))
    bias = _bias_bits(format_)
    shifted = _as_float(magnitude) * inverse.unsqueeze(1) + float(_as_float(bias))
    result = (shifted.view(torch.int32) - bias + 0x80000) >> 20
    if format_ == "signed8":
        result |= (x.view(torch.int32) >> 24) & 0x80
    else:
        result = torch.maximum(result, (magnitude != 0).to(torch.int32))
    result[overflow] = 1
    bits[nan] = 0x7FC00000
    scale.copy_(_as_float(bits))
    codes.as_strided((count,), (1,)).copy_(result.flatten()[:count].to(torch.uint8))
