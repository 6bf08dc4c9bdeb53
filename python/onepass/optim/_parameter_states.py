"""The states of one parameter: made for its first step, or loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ._checks import state_dtype


def full_state(param: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A new state like its parameter: the same strides, and a DTensor for a DTensor."""
    return torch.full_like(
        param,
        complex(value, value) if param.is_complex() else value,  # complex numbers are pairs of reals
        dtype=dtype,
        memory_format=torch.preserve_format,
        requires_grad=False,
    )


def scalar_tensor(param: Tensor, value: float | Tensor, on_device: bool) -> Tensor:
    """A 0-d state on its device: the CPU, or beside a CUDA parameter for CUDA graphs and fused_unscale."""
    on_device = on_device and param.is_cuda
    device = param.device if on_device else torch.device("cpu")
    dtype = torch.float32 if on_device else _compat.default_scalar_dtype()
    if isinstance(value, Tensor):
        keep = value.dtype in (torch.float32, torch.float64) and not on_device
        return value.to(device=device, dtype=value.dtype if keep else dtype)
    return torch.tensor(float(value), dtype=dtype, device=device)


def restore_precision(state: dict[str, Any], loading: dict[str, Any], scalar_states: Collection[str]) -> None:
    """Take those states from the loaded dict again that torch's load_state_dict cast to the parameter's dtype.

    The 0-d ones get the dtype in which they were saved: a cast would change mu_product.
    """
    ids = [i for group in loading["param_groups"] for i in group["params"]]
    params = [p for group in state["param_groups"] for p in group["params"]]
    for i, param in zip(ids, params, strict=True):
        loaded, kept = loading["state"].get(i), state["state"].get(param)
        if not isinstance(loaded, dict) or not isinstance(kept, dict) or not param.is_floating_point():
            continue
        for name, value in loaded.items():
            if not isinstance(value, Tensor):
                continue
            if not value.is_floating_point():
                if value.dim() > 0 or name not in scalar_states:  # codes and remainders
                    kept[name] = value.to(param.device)
                continue
            if name in scalar_states:
                kept[name] = value
                continue
            dtype = state_dtype(param) if value.dim() > 0 or param.dim() == 0 else value.dtype
            if kept[name].dtype != dtype:
                kept[name] = value.to(device=param.device, dtype=dtype)
