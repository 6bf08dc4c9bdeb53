"""How the elements of a tensor lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in _by_stride(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def have_same_strides(tensor: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape have equal strides in every dimension of more than one element."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == other_stride for size, stride, other_stride in sizes_and_strides)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    if tensor.numel() < 2:  # whatever its strides
        return False
    extent = 0
    for stride, size in _by_stride(tensor):
        if stride <= extent:  # this dimension steps into those inside it: only counting decides
            break
        extent += stride * (size - 1)
    else:
        return False
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in _by_stride(tensor):
        offsets = (offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride).flatten()
    return torch.bincount(offsets).max().item() > 1


def _by_stride(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions of more than one element, innermost first."""
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted((stride, size) for stride, size in dims if size != 1)
