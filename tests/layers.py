"""The table of norms, their operands in every dtype and layout, and the comparison of a layer's call with its reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onepass.nn import functional as OF
from reference import batch_norm, norm
from support import ARITHMETIC, arithmetic_dtype, assert_close, rounding, to_numpy
from torch.nn import functional as F

Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Norm:
    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., torch.Tensor]
    forward: Callable[..., np.ndarray]
    backward: Callable[..., norm.Gradients]
    has_bias: bool
    eps: Callable[[torch.dtype], float]  # the default

    def __call__(self, x, normalized_shape, weight=None, bias=None, eps=None) -> torch.Tensor:
        options = {} if eps is None else {"eps": eps}
        if self.has_bias:
            return self.ours(x, normalized_shape, weight, bias, **options)
        return self.ours(x, normalized_shape, weight, **options)


NORMS = {
    "layer_norm": Norm(
        OF.layer_norm, F.layer_norm, norm.layer_norm, norm.layer_norm_backward, True, lambda dtype: 1e-5
    ),
    "rms_norm": Norm(
        OF.rms_norm,
        F.rms_norm,
        norm.rms_norm,
        norm.rms_norm_backward,
        False,
        lambda dtype: torch.finfo(arithmetic_dtype(dtype)).eps,
    ),
}
AFFINE = ("none", "weight", "weight and bias", "bias", "scalar")


def affine(kind: str, has_bias: bool, shape: Sequence[int], dtype: torch.dtype, device) -> Tensors:
    """Weight and bias of one of the kinds in AFFINE, around 1 and 0."""
    shape = () if kind == "scalar" else shape
    weight = torch.randn(shape, device=device).mul(0.5).add(1).to(dtype) if kind not in ("none", "bias") else None
    bias = torch.randn(shape, device=device).to(dtype) if has_bias and kind not in ("none", "weight") else None
    return weight, bias


def weight_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Weights have the input's dtype, or float32 beside a 16-bit input."""
    return (dtype, torch.float32) if rounding(dtype) else (dtype,)


def leaf(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()


def as_numpy(*tensors: torch.Tensor | None) -> list[np.ndarray | None]:
    return [None if t is None else to_numpy(t) for t in tensors]


def gradients(y: torch.Tensor, inputs: Tensors, dy: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of all inputs that are not None, in order, each of its input's dtype and shape."""
    there = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, there, dy))
    result = [None if t is None else next(found) for t in inputs]
    for t, g in zip(inputs, result, strict=True):
        assert t is None or (g.dtype, g.shape) == (t.dtype, t.shape), f"expected {t.dtype} {t.shape}, came {g}"
    return result


def assert_close_to(
    came: torch.Tensor, expected: np.ndarray, factor: float, what: str, x_dtype: torch.dtype | None = None
) -> None:
    """Allow rounding of x's compute dtype times `factor`, plus rounding to the dtype of storage."""
    tolerance = max(ARITHMETIC[arithmetic_dtype(dtype)] for dtype in (came.dtype, x_dtype or came.dtype))
    assert_close(came, expected.reshape(came.shape), tolerance * factor, what, rounding(came.dtype))


def amplification(variance: np.ndarray, eps: float) -> float:
    """By how much, at most, dividing by the deviation amplifies a rounding error in x - mean(x); at least 1."""
    return float(np.fmax.reduce(1 / np.sqrt(variance.reshape(-1) + eps), initial=1.0))


def assert_norm(kind: Norm, x, normalized_shape, weight=None, bias=None, dy=None, eps=None, what="") -> None:
    """Compare y and all gradients with the reference."""
    x, weight, bias = leaf(x), leaf(weight), leaf(bias)
    y = kind(x, normalized_shape, weight, bias, eps)
    assert (y.dtype, y.shape, y.device) == (x.dtype, x.shape, x.device), f"{what}: came {y.dtype} {y.shape} {y.device}"
    dy = torch.randn_like(y) if dy is None else dy
    came = gradients(y, (x, weight, bias), dy)

    size = int(np.prod(normalized_shape))
    rows = to_numpy(x).reshape(x.numel() // max(size, 1), size)
    w, b = as_numpy(weight, bias)
    eps = kind.eps(x.dtype) if eps is None else eps
    with np.errstate(all="ignore"):
        factor = amplification(rows.var(axis=1) if kind.has_bias else np.square(rows).mean(axis=1), eps)
    assert_close_to(y, kind.forward(rows, w, b, eps), factor, f"y of {what}")
    expected = kind.backward(to_numpy(dy).reshape(rows.shape), rows, w, b, eps)
    assert_close_to(came[0], expected.x, factor, f"gradient of x of {what}")
    # Sums of this many terms of either sign.
    terms = len(rows) * (size if weight is not None and weight.dim() == 0 else 1)
    for name, gradient, value in (("weight", came[1], expected.weight), ("bias", came[2], expected.bias)):
        if gradient is not None:
            assert_close_to(gradient, value, factor * max(1.0, terms**0.5), f"gradient of {name} of {what}", x.dtype)


def running_statistics(channels: int, dtype: torch.dtype = torch.float32, device="cpu") -> list[torch.Tensor]:
    return [torch.randn(channels, device=device).to(dtype), torch.rand(channels, device=device).add(0.5).to(dtype)]


ACTIVATIONS = {None: None, "relu": 0.0, "leaky_relu": 0.2}  # and their slopes


def assert_batch_norm(
    x,
    running=(None, None),
    weight=None,
    bias=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
    *,
    activation=None,
    residual=None,
    dy=None,
    what="",
) -> torch.Tensor:
    """Compare y, every gradient and the running statistics with the reference; return y."""
    x, weight, bias, residual = leaf(x), leaf(weight), leaf(bias), leaf(residual)
    before, slope = as_numpy(*running), ACTIVATIONS[activation]
    if activation is None and residual is None:
        y = OF.batch_norm(x, *running, weight, bias, training, momentum, eps)
    else:
        more = {"activation": activation, "negative_slope": slope or 0.0, "residual": residual}
        y = OF.batch_norm_activation(x, *running, weight, bias, training, momentum, eps, **more)
    assert (y.dtype, y.shape, y.device) == (x.dtype, x.shape, x.device), f"{what}: came {y.dtype} {y.shape} {y.device}"
    dy = torch.randn_like(y) if dy is None else dy
    came = gradients(y, (x, weight, bias, residual), dy)

    values, w, b, r = as_numpy(x, weight, bias, residual)
    statistics = None if training else tuple(before)
    with np.errstate(all="ignore"):
        variance = batch_norm.moments(values)[1] if training and x.numel() else np.ones(1) if training else before[1]
    factor = amplification(variance, eps)
    arguments = values, w, b, eps, statistics, r, slope
    assert_close_to(y, batch_norm.batch_norm(*arguments), factor, f"y of {what}")
    expected = batch_norm.batch_norm_backward(to_numpy(dy), *arguments)
    assert_close_to(came[0], expected.x, factor, f"gradient of x of {what}")
    terms = max(1, batch_norm.count(values))
    for name, gradient, value in (("weight", came[1], expected.weight), ("bias", came[2], expected.bias)):
        if gradient is not None:
            assert_close_to(gradient, value, factor * terms**0.5, f"gradient of {name} of {what}", x.dtype)
    if residual is not None:
        assert_close_to(came[3], expected.residual, 1.0, f"gradient of the residual of {what}")
    if running[0] is not None:
        after = batch_norm.running_statistics(values, *before, momentum) if training else before
        for name, tensor, value in zip(("running_mean", "running_var"), running, after, strict=True):
            assert_close_to(tensor, value, 1.0, f"{name} of {what}", x.dtype)
    return y
