"""The checks of torch.ops.onepass.*, made in the kernel and in its fake, before any memory is touched.

Layers have their own checks (_checks.py) and go straight to the kernels; these are for compilers and for users who call an
operator by name. Sizes may be symbolic: nothing here turns one into a number.
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
    """The operands of one call, compared with the first of them."""

    def __init__(self, operator: str, name: str, first: Tensor) -> None:
        self.operator, self.name, self.first = operator, name, first
        self.require(first.dtype in FLOATS, name, f"dtype {first.dtype}", "float32, float64, bfloat16 or float16")

    def require(self, ok: bool | torch.SymBool, name: str, came: object, expected: object) -> None:
        """Raise RuntimeError unless `ok`, naming the operator, the argument, what came and what is expected."""
        expect(ok, lambda: f"onepass::{self.operator}: {name} has {came}; expected is {expected}.")

    def beside(self, name: str, tensor: Tensor) -> None:
        """On the device of the first one."""
        self._equal(name, "device", tensor.device, self.first.device)

    def alike(self, name: str, tensor: Tensor | None) -> None:
        """Shape, dtype and device of the first one."""
        if tensor is not None:
            self.beside(name, tensor)
            self._equal(name, "dtype", tensor.dtype, self.first.dtype)
            self._shape(name, tensor, self.first.shape, f"{self.name}'s, ")

    def rows(self, size: int, weight: Tensor | None, bias: Tensor | None) -> int:
        """How many rows of `size` elements there are; weight of `size` elements or of one, a lone bias [size]."""
        elements = self.first.numel()
        self.require(size >= 1, "size", f"the value {size}", "at least 1")
        self.require(
            elements % size == 0, "size", f"the value {size}", f"a divisor of {self.name}'s {elements} elements"
        )
        if weight is not None and weight.numel() != 1:
            self.require(weight.numel() == size, "weight", f"{weight.numel()} elements", f"the size, {size}, or 1")
        self._affine(weight, bias, (size,) if weight is None else weight.shape)
        return elements // size

    def channels(self, weight: Tensor | None, bias: Tensor | None, channels_last: bool) -> int:
        """How many channels there are; weight and bias have an element for each."""
        dims = self.first.dim()
        self.require(dims >= 2, self.name, f"{dims} dimensions", "at least [N, C]")
        if channels_last:
            self.require(
                dims in (4, 5), "channels_last", f"the value True beside {dims} dimensions of {self.name}", "4 or 5"
            )
        channels = self.first.shape[1]
        if weight is not None:
            self._shape("weight", weight, (channels,), f"{self.name}'s channels, ")
        self._affine(weight, bias, (channels,))
        return channels

    def stats(self, stats: Tensor, columns: int) -> None:
        """[3, columns] of what kernels compute in."""
        self.beside("stats", stats)
        self._dtype("stats", stats, compute_dtype(self.first.dtype))
        self._shape("stats", stats, (3, columns))

    def drop(self, options: DropoutOptions) -> None:
        _check_probability(self.operator, options.p)
        if options.seed is not None:
            _check_seed(self.operator, options.seed)
            self.beside("seed", options.seed)

    def mask(self, mask: Tensor) -> None:
        """Empty, or a bit for each element."""
        size = (self.first.numel() + 7) // 8
        self.beside("mask", mask)
        self._dtype("mask", mask, torch.uint8)
        self.require(mask.dim() == 1, "mask", f"shape {list(mask.shape)}", "one dimension")
        if mask.shape[0] != 0:
            self.require(mask.shape[0] == size, "mask", f"{mask.shape[0]} bytes", f"{size} or none")

    def want(self, want: Sequence[bool], length: int) -> None:
        self.require(len(want) == length, "want", f"{len(want)} elements", length)

    def slope(self, slope: float | None) -> None:
        if slope is not None:
            self.require(slope >= 0, "slope", f"the value {slope}", "at least 0")

    def _affine(self, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                self.beside(name, tensor)
                self._dtype(name, tensor, self.first.dtype, compute_dtype(self.first.dtype))
        if bias is not None:
            if weight is not None:
                self._dtype("bias", bias, weight.dtype)
            self._shape("bias", bias, shape)

    def _equal(self, name: str, what: str, came: object, expected: object) -> None:
        self.require(came == expected, name, f"{what} {came}", f"{self.name}'s, {expected}")

    def _dtype(self, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
        self.require(tensor.dtype in allowed, name, f"dtype {tensor.dtype}", " or ".join(map(str, allowed)))

    def _shape(self, name: str, tensor: Tensor, expected: Sequence[int], whose: str = "") -> None:
        came = f"shape {list(tensor.shape)}"
        self.require(tensor.dim() == len(expected), name, came, f"{whose}{list(expected)}")
        for size, wanted in zip(tensor.shape, expected, strict=True):
            self.require(size == wanted, name, came, f"{whose}{list(expected)}")


def _check_probability(operator: str, p: float) -> None:
    expect(p >= 0, lambda: f"onepass::{operator}: p has the value {p}; expected is a probability, between 0 and 1.")
    expect(p <= 1, lambda: f"onepass::{operator}: p has the value {p}; expected is a probability, between 0 and 1.")


def _check_seed(operator: str, seed: Tensor) -> None:
    expect(
        seed.dtype == torch.int64 and seed.dim() == 0,
        lambda: (
            f"onepass::{operator}: seed has dtype {seed.dtype} and shape {list(seed.shape)}; expected is 0-d int64."
        ),
    )


# --- one function per operator, with its arguments ----------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> None:
    _Operands("norm", "x", x).rows(options.size, weight, bias)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: NormOptions, want: Sequence[bool]
) -> None:
    operands = _Operands("norm_backward", "x", x)
    operands.alike("dy", dy)
    operands.stats(stats, operands.rows(options.size, weight, None))
    operands.want(want, 3)


def dropout(x: Tensor, options: DropoutOptions, keep_mask: bool) -> None:
    _Operands("dropout", "x", x).drop(options)


def dropout_backward(dy: Tensor, options: DropoutOptions, mask: Tensor) -> None:
    operands = _Operands("dropout_backward", "dy", dy)
    operands.drop(options)
    operands.mask(mask)


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float, packed: bool) -> None:
    _check_seed("dropout_mask", seed)
    _check_probability("dropout_mask", p)
    for size in shape:
        expect(size >= 0, lambda: f"onepass::dropout_mask: shape has {list(shape)}; expected is that none is negative.")


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
    operands.alike("residual", residual)
    operands.rows(options.size, weight, bias)
    operands.drop(drop)


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
    operands.alike("dy", dy)
    operands.alike("dsum", dsum)
    operands.stats(stats, operands.rows(options.size, weight, None))
    operands.drop(drop)
    operands.mask(mask)
    operands.want(want, 4)


def batch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: BatchNormOptions
) -> None:
    _channels("batch_norm", x, {"residual": residual}, weight, bias, options)


def batch_norm_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    options: BatchNormOptions,
) -> None:
    operands, channels = _channels("batch_norm_apply", x, {"residual": residual}, weight, bias, options)
    operands.stats(stats, channels)


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
    operands, channels = _channels("batch_norm_backward", x, {"dy": dy, "y": y}, weight, None, options)
    missing = y is None and options.slope is not None
    operands.require(not missing, "y", "no value", "forward's result: there is a slope")
    operands.stats(stats, channels)
    operands.want(want, 4)


def _channels(
    operator: str,
    x: Tensor,
    beside: dict[str, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    options: BatchNormOptions,
) -> tuple[_Operands, int]:
    operands = _Operands(operator, "x", x)
    for name, tensor in beside.items():
        operands.alike(name, tensor)
    channels = operands.channels(weight, bias, options.channels_last)
    operands.slope(options.slope)
    return operands, channels
