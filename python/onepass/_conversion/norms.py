"""Forwards of norms that other packages define: each computes what their class does, on our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import functional as F
from ..nn.batch_norm_modules import normalise
from .activations import slope_of
from .probe import Inputs

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")
_FLOAT_OF_16 = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RowNorm:
    """RMSNorm or LayerNorm over the last dimension, or over the channels of [N, C, H, W].

    Attributes:
        eps: the name of the attribute that holds it.
        offset: added to the weight; 1 for norms whose weight starts at 0.
        result: the dtype of the result: that to which input and weight are "promoted", the "input"'s, or the "weight"'s.
    """

    rms: bool
    eps: str
    offset: float = 0.0
    result: str = "promoted"
    channels_first: bool = False

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        weight, bias = module.weight, getattr(module, "bias", None)
        shape = tuple(getattr(module, "normalized_shape", None) or weight.shape)
        dtype = x.dtype if weight is None else weight.dtype
        if self.offset and weight is not None:
            weight = self.offset + (weight.float() if dtype in _FLOAT_OF_16 else weight)
        if self.result == "promoted" and dtype != x.dtype:
            x = x.to(torch.promote_types(x.dtype, dtype))
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        eps = getattr(module, self.eps)
        y = F.rms_norm(x, shape, weight, eps) if self.rms else F.layer_norm(x, shape, weight, bias, eps)
        if self.channels_first:
            y = y.permute(0, 3, 1, 2)
        return y.to(dtype) if self.result == "weight" else y

    def inputs(self, module: Any) -> Inputs:
        shape = tuple(getattr(module, "normalized_shape", None) or module.weight.shape)
        return Inputs((torch.empty(2, *shape, 3, 4) if self.channels_first else torch.empty(2, 5, *shape),), {})


@dataclass(frozen=True)
class FrozenBatchNorm:
    """BatchNorm by its running statistics alone."""

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        operands = module.running_mean, module.running_var, module.weight, module.bias
        return F.batch_norm(x, *operands, training=False, eps=module.eps)

    def inputs(self, module: Any) -> Inputs:
        return Inputs((torch.empty(2, module.weight.numel(), 3, 4),), {})


@dataclass(frozen=True)
class BatchNormAct:
    """A BatchNorm2d that applies its modules `drop` and `act` to its result, as timm's does."""

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        slope = slope_of(module.act)
        if slope is not None and type(module.drop) is nn.Identity:
            return normalise(module, x, None, slope)
        y: Tensor = module.act(module.drop(normalise(module, x)))
        return y

    def inputs(self, module: Any) -> Inputs:
        return Inputs((torch.empty(2, module.num_features, 3, 4),), {})


def row_norms(module: Any) -> Iterator[RowNorm]:
    """What a module that looks like a norm over rows may compute, the most usual first."""
    name = type(module).__name__.lower()
    weight = getattr(module, "weight", None)
    eps = next((e for e in _EPS_NAMES if isinstance(getattr(module, e, None), float)), None)
    if "norm" not in name or not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
        return
    if isinstance(module, nn.modules.batchnorm._NormBase) or any(module.children()):
        return
    is_rms = getattr(module, "bias", None) is None and not isinstance(module, nn.LayerNorm)
    for rms in (True, False) if is_rms else (False,):
        for result in ("promoted", "input", "weight"):
            for channels_first in (False, True) if name.endswith("2d") else (False,):
                yield RowNorm(rms, eps, 0.0, result, channels_first)
                if rms:
                    yield RowNorm(rms, eps, 1.0, result, channels_first)
