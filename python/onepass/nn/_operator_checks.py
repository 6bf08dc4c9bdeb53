"""The checks of torch.ops.onepass.*, run by the kernel and by its fake before any memory is touched.

Layers have their own checks (_checks.py) and go straight to the kernels; these are for compilers and for users who call
an operator by name. Sizes may be symbolic and stay so: nothing here converts one to an int.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._compat import expect
from .._dtypes import FLOATS, compute_dtype
from .._native.batch_norm import BatchNormOptions
from .._native.layers import DropoutOptions, NormOptions


class _Operands:
    """The operands of one call, checked against the first one."""

    def __init__(self, operator: str, name: str, first: Tensor) -> None:
        self.operator, self.name, self.first = operator, name, first
        self.require(first.dtype in FLOATS, name, f"dtype {first.dtype}", "float32, float64, bfloat16 or float16")

    def require(self, condition: bool | torch.SymBool, name: str, actual: object, expected: object) -> None:
        """Raise RuntimeError unless the condition holds, naming the operator, the argument and both values."""
        expect(condition, lambda: f"onepass::{self.operator}: {name} has {actual}; expected is {expected}.")

    def check_device(self, name: str, tensor: Tensor) -> None:
        """The tensor is on the first operand's device."""
        self._check_equal(name, "device", tensor.device, self.first.device)

    def check_like_first(self, name: str, tensor: Tensor | None) -> None:
        """The tensor has the first operand's shape, dtype and device."""
        if tensor is not None:
            self.check_device(name, tensor)
            self._check_equal(name, "dtype", tensor.dtype, self.first.dtype)
            self._check_shape(name, tensor, self.first.shape, f"{self.name}'s, ")

    def check_rows(self, size: int, weight: Tensor | None, bias: Tensor | None) -> int:
        """The number of rows of `size` elements. weight: `size` elements or one; a bias without a weight: [size]."""
        elements = self.first.numel()
        self.require(size >= 1, "size", f"the value {size}", "at least 1")
        self.require(
            elements % size == 0, "size", f"the value {size}", f"a divisor of {self.name}'s {elements} elements"
        )
        if weight is not None and weight.numel() != 1:
            self.require(weight.numel() == size, "weight", f"{weight.numel()} elements", f"the size, {size}, or 1")
        self._check_affine(weight, bias, (size,) if weight is None else weight.shape)
        return elements // size

    def check_channels(self, weight: Tensor | None, bias: Tensor | None, channels_last: bool) -> int:
        """The number of channels; weight and bias have one element per channel."""
        dims = self.first.dim()
        self.require(dims >= 2, self.name, f"{dims} dimensions", "at least [N, C]")
        if channels_last:
            self.require(
                dims in (4, 5), "channels_last", f"the value True with {dims} dimensions of {self.name}", "4 or 5"
            )
        channels = self.first.shape[1]
        if weight is not None:
            self._check_shape("weight", weight, (channels,), f"{self.name}'s channels, ")
        self._check_affine(weight, bias, (channels,))
        return channels

    def check_stats(self, stats: Tensor, columns: int) -> None:
        """stats is [3, columns] of the compute dtype."""
        self.check_device("stats", stats)
        self._check_dtype("stats", stats, compute_dtype(self.first.dtype))
        self._check_shape("stats", stats, (3, columns))

    def check_dropout(self, options: DropoutOptions) -> None:
        _check_probability(self.operator, options.p)
        if options.seed is not None:
            _check_seed(self.operator, options.seed)
            self.check_device("seed", options.seed)

    def check_mask(self, mask: Tensor) -> None:
        """The mask is empty or has one bit per element."""
        size = (self.first.numel() + 7) // 8
        self.check_device("mask", mask)
        self._check_dtype("mask", mask, torch.uint8)
        self.require(mask.dim() == 1, "mask", f"shape {list(mask.shape)}", "one dimension")
        if mask.shape[0] != 0:
            self.require(mask.shape[0] == size, "mask", f"{mask.shape[0]} bytes", f"{size} or none")

    def check_want(self, want: Sequence[bool], length: int) -> None:
        self.require(len(want) == length, "want", f"{len(want)} elements", length)

    def check_slope(self, slope: float | None) -> None:
        if slope is not None:
            self.require(slope >= 0, "slope", f"the value {slope}", "at least 0")

    def _check_affine(self, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                self.check_device(name, tensor)
                self._check_dtype(name, tensor, self.first.dtype, compute_dtype(self.first.dtype))
        if bias is not None:
            if weight is not None:
                self._check_dtype("bias", bias, weight.dtype)
            self._check_shape("bias", bias, shape)

    def _check_equal(self, name: str, attribute: str, actual: object, expected: object) -> None:
        self.require(actual == expected, name, f"{attribute} {actual}", f"{self.name}'s, {expected}")

    def _check_dtype(self, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
        self.require(tensor.dtype in allowed, name, f"dtype {tensor.dtype}", " or ".join(map(str, allowed)))

    def _check_shape(self, name: str, tensor: Tensor, expected: Sequence[int], owner: str = "") -> None:
        actual = f"shape {list(tensor.shape)}"
        self.require(tensor.dim() == len(expected), name, actual, f"{owner}{list(expected)}")
        for size, expected_size in zip(tensor.shape, expected, strict=True):
            self.require(size == expected_size, name, actual, f"{owner}{list(expected)}")


def _check_probability(operator: str, p: float) -> None:
    for condition in (p >= 0, p <= 1):  # apart: p may be symbolic
        expect(
            condition, lambda: f"onepass::{operator}: p has the value {p}; expected is a probability, between 0 and 1."
        )


def _check_seed(operator: str, seed: Tensor) -> None:
    expect(
        seed.dtype == torch.int64 and seed.dim() == 0,
        lambda: (
            f"onepass::{operator}: seed has dtype {seed.dtype} and shape {list(seed.shape)}; expected is 0-d int64."
        ),
    )


# --- one check per operator, with the operator's arguments ------------------------------------------------------------


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> None:
    _Operands("norm", "x", x).check_rows(options.size, weight, bias)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: NormOptions, want: Sequence[bool]
) -> None:
    operands = _Operands("norm_backward", "x", x)
    operands.check_like_first("dy", dy)
    operands.check_stats(stats, operands.check_rows(options.size, weight, None))
    operands.check_want(want, 3)


def dropout(x: Tensor, options: DropoutOptions, keep_mask: bool) -> None:
    _Operands("dropout", "x", x).check_dropout(options)


def dropout_backward(dy: Tensor, options: DropoutOptions, mask: Tensor) -> None:
    operands = _Operands("dropout_backward", "dy", dy)
    operands.check_dropout(options)
    operands.check_mask(mask)


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float, packed: bool) -> None:
    _check_seed("dropout_mask", seed)
    _check_probability("dropout_mask", p)
    for size in shape:
        expect(
            size >= 0, lambda: f"onepass::dropout_mask: shape has {list(shape)}; expected is at least 0 for each size."
        )


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    drop: DropoutOptions,
    options: NormOptions,
    keep_mask: bool,
) -> None:
    operands = _Operands("dropout_add_norm", "x", x)
    operands.check_like_first("residual", residual)
    operands.check_rows(options.size, weight, bias)
    operands.check_dropout(drop)


def dropout_add_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    mask: Tensor,
    *rest: Any,
) -> None:
    drop, options, want = rest
    operands = _Operands("dropout_add_norm_backward", "sum", total)
    operands.check_like_first("dy", dy)
    operands.check_like_first("dsum", dsum)
    operands.check_stats(stats, operands.check_rows(options.size, weight, None))
    operands.check_dropout(drop)
    operands.check_mask(mask)
    operands.check_want(want, 4)


def batch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: BatchNormOptions
) -> None:
    _check_batch_norm("batch_norm", x, {"residual": residual}, weight, bias, options)


def batch_norm_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    options: BatchNormOptions,
) -> None:
    operands, channels = _check_batch_norm("batch_norm_apply", x, {"residual": residual}, weight, bias, options)
    operands.check_stats(stats, channels)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    options: BatchNormOptions,
    training: bool,
    want: Sequence[bool],
) -> None:
    operands, channels = _check_batch_norm("batch_norm_backward", x, {"dy": dy, "y": y}, weight, None, options)
    needs_y = options.slope is not None
    operands.require(y is not None or not needs_y, "y", "no value", "forward's result: there is a slope")
    operands.check_stats(stats, channels)
    operands.check_want(want, 4)


def _check_batch_norm(
    operator: str,
    x: Tensor,
    like_x: dict[str, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    options: BatchNormOptions,
) -> tuple[_Operands, int]:
    operands = _Operands(operator, "x", x)
    for name, tensor in like_x.items():
        operands.check_like_first(name, tensor)
    channels = operands.check_channels(weight, bias, options.channels_last)
    operands.check_slope(options.slope)
    return operands, channels
