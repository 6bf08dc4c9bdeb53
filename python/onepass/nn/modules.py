"""LayerNorm, RMSNorm and dropout as modules: torch.nn's classes with another forward. BatchNorm: batch_norm_modules.py.

Constructors, parameters, buffers, repr and state_dicts are torch.nn's. A class that replaces one of torch.nn adds no
instance attributes, so that convert() can change a module's class in place.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from . import functional as F
from ._checks import check_p
from ._norm import row_norm
from ._tools import record_as_leaf, scripted


def _scripted_dropout(input: Tensor, p: float, training: bool, inverted: bool) -> Tensor:
    """Dropout for our modules under TorchScript."""
    if inverted:
        return nn.functional.dropout(input, p, training)
    if training:
        return torch.where(torch.rand_like(input, dtype=torch.float32) >= p, input, 0)
    return input * (1 - p)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm; see functional.layer_norm. weight and bias may be replaced by 0-d parameters."""

    # TorchScript parses all of forward, so that no := is possible, and compiles what follows `if not is_scripting()`.
    _scripted = scripted(nn.LayerNorm.forward)

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting():
            if has_torch_function_unary(input):
                node = record_as_leaf(self, input)
                if node is not None:
                    return node
            weight, bias = self.weight, self.bias
            if has_torch_function_variadic(input, weight, bias):
                return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
            return row_norm("layer_norm", input, self.normalized_shape, weight, bias, self.eps, False)
        return self._scripted(input)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm; see functional.rms_norm. weight may be replaced by a 0-d parameter."""

    _scripted = scripted(nn.RMSNorm.forward)

    def forward(self, x: Tensor) -> Tensor:
        if not is_scripting():
            if has_torch_function_unary(x):
                node = record_as_leaf(self, x)
                if node is not None:
                    return node
            weight = self.weight
            if has_torch_function_variadic(x, weight):
                return F.rms_norm(x, self.normalized_shape, weight, self.eps)
            return row_norm("rms_norm", x, self.normalized_shape, weight, None, self.eps, True)
        return self._scripted(x)


class Dropout(nn.Dropout):
    """torch.nn.Dropout; see functional.dropout.

    Args:
        p, inplace: as torch.nn.Dropout.
        inverted: False multiplies by 1 - p in evaluation instead of by 1 / (1 - p) in training.
    """

    inverted = True
    __constants__ = [*nn.Dropout.__constants__, "inverted"]  # noqa: RUF012
    _scripted = scripted(nn.Dropout.forward)

    def __init__(self, p: float = 0.5, inplace: bool = False, *, inverted: bool = True) -> None:
        super().__init__(p, inplace)
        if not inverted:
            self.inverted = False

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting():
            if has_torch_function_unary(input):
                node = record_as_leaf(self, input)
                if node is not None:
                    return node
            return F.dropout(input, self.p, self.training, self.inplace, inverted=self.inverted)
        return self._scripted(input) if self.inverted else _scripted_dropout(input, self.p, self.training, False)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.inverted else ", inverted=False")


class DropoutAddLayerNorm(LayerNorm):
    """sum = residual + dropout(input), y = layer_norm(sum); returns (y, sum). See functional.dropout_add_layer_norm.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch.nn.LayerNorm.
        p: probability of dropping.
        inverted: as for Dropout.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        p: float = 0.5,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        inverted: bool = True,
    ) -> None:
        check_p(p)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.p, self.inverted = p, inverted

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not is_scripting():
            if has_torch_function_variadic(input, residual):
                node = record_as_leaf(self, input, residual)
                if node is not None:
                    return cast("tuple[Tensor, Tensor]", node)
            return F.dropout_add_layer_norm(
                input,
                residual,
                self.normalized_shape,
                self.weight,
                self.bias,
                self.eps,
                self.p,
                self.training,
                inverted=self.inverted,
            )
        sum = residual + _scripted_dropout(input, self.p, self.training, self.inverted)
        return self._scripted(sum), sum

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}" + ("" if self.inverted else ", inverted=False")


class DropoutAddRMSNorm(RMSNorm):
    """sum = residual + dropout(input), y = rms_norm(sum); returns (y, sum). See functional.dropout_add_rms_norm.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as torch.nn.RMSNorm.
        p: probability of dropping.
        inverted: as for Dropout.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        p: float = 0.5,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        inverted: bool = True,
    ) -> None:
        check_p(p)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.p, self.inverted = p, inverted

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not is_scripting():
            if has_torch_function_variadic(input, residual):
                node = record_as_leaf(self, input, residual)
                if node is not None:
                    return cast("tuple[Tensor, Tensor]", node)
            return F.dropout_add_rms_norm(
                input,
                residual,
                self.normalized_shape,
                self.weight,
                self.eps,
                self.p,
                self.training,
                inverted=self.inverted,
            )
        sum = residual + _scripted_dropout(input, self.p, self.training, self.inverted)
        return self._scripted(sum), sum

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}" + ("" if self.inverted else ", inverted=False")
