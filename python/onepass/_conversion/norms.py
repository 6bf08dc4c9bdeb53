"""Forwards of norms that other packages define: each computes what their class does, on our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._dtypes import SIXTEEN_BITS
from ..nn import functional as F
from ..nn.batch_norm_modules import normalise
from .activations import slope_of
from .probe import Inputs
from .swap import original_class

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")


@dataclass(frozen=True)
class RowNorm:
    """RMSNorm or LayerNorm over the last dimensions, or over the channels of [N, C, H, W].

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
    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        if not (self.channels_first or x.is_contiguous() or isinstance(module, nn.LayerNorm)):
            own: Tensor = original_class(module).forward(module, x)  # whose result has the input's strides
            return own
        weight, bias = module.weight, getattr(module, "bias", None)
        dtype = x.dtype if weight is None else weight.dtype
        if self.offset and weight is not None:
            weight = self.offset + (weight.float() if dtype in SIXTEEN_BITS else weight)
        if self.result == "promoted" and dtype != x.dtype:
            x = x.to(torch.promote_types(x.dtype, dtype))
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        shape, eps = _shape_of(module), getattr(module, self.eps)
        y = F.rms_norm(x, shape, weight, eps) if self.rms else F.layer_norm(x, shape, weight, bias, eps)
        if self.channels_first:
            y = y.permute(0, 3, 1, 2)
        return y.to(dtype) if self.result == "weight" else y

    def inputs(self, module: Any) -> list[Inputs]:
        """Small numbers show where eps stands; other ranks and sizes, whether a module takes them otherwise."""
        shape = _shape_of(module)
        root_eps = float(getattr(module, self.eps)) ** 0.5
        usual = torch.empty(2, *shape, 3, 4) if self.channels_first else torch.empty(2, 5, *shape)
        scaled = [Inputs((usual,), scale=scale) for scale in (1.0, root_eps, 0.1 * root_eps, 100.0)]
        if self.channels_first:
            return scaled
        size = shape[0]
        others: list[tuple[int, ...]] = [shape, (3, *shape), (2, 3, 2, *shape), (2, 2 * size)]
        others += [(1, size, 2, size), (1, size, 2)] if size <= 1024 else []
        return scaled + [Inputs((torch.empty(other),), is_optional=True) for other in others]


def _shape_of(module: Any) -> tuple[int, ...]:
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        shape = module.weight.shape
    return (shape,) if isinstance(shape, int) else tuple(shape)


@dataclass(frozen=True)
class FrozenBatchNorm:
    """BatchNorm by its running statistics alone."""

    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        operands = module.running_mean, module.running_var, module.weight, module.bias
        return F.batch_norm(x, *operands, training=False, eps=module.eps)

    def inputs(self, module: Any) -> list[Inputs]:
        return [Inputs((torch.empty(2, module.weight.numel(), 3, 4),))]


@dataclass(frozen=True)
class BatchNormAct:
    """A BatchNorm2d that applies its modules `drop` and `act` to its result, as timm's does."""

    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        slope = slope_of(module.act)
        if slope is not None and type(module.drop) is nn.Identity:
            return normalise(module, x, None, slope)
        y: Tensor = module.act(module.drop(normalise(module, x)))
        return y

    def inputs(self, module: Any) -> list[Inputs]:
        return [Inputs((torch.empty(2, module.num_features, 3, 4),))]


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
    is_2d = name.endswith("2d") or getattr(module, "data_format", None) == "channels_first"
    for rms in (True, False) if is_rms else (False,):
        for result in ("promoted", "input", "weight"):
            for channels_first in (True, False) if is_2d else (False,):
                yield RowNorm(rms, eps, 0.0, result, channels_first)
                if rms:
                    yield RowNorm(rms, eps, 1.0, result, channels_first)
