"""The floating dtypes of parameters and activations, and the dtype kernels compute in, as in csrc/core/types.hpp."""

from __future__ import annotations

import torch

SIXTEEN_BITS = frozenset((torch.bfloat16, torch.float16))
FLOATS = frozenset((torch.float32, torch.float64)) | SIXTEEN_BITS


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic, statistics and optimizer states: float64 for float64, otherwise float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32
