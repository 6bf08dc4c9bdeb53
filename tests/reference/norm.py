"""LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang, Sennrich 2019) over the last elements of a row.

x is [rows, size]; weight and bias are None, of `size` elements, or one number for all ("scalar affine").
"""

from dataclasses import dataclass

import numpy as np

from .common import Array


@dataclass
class Gradients:
    x: Array
    weight: Array | None = None
    bias: Array | None = None


def mean(x: Array) -> Array:
    """The mean of each row; NaN for rows without elements."""
    return x.mean(axis=1, keepdims=True) if x.shape[1] else np.full((x.shape[0], 1), np.nan)


def affine(x_hat: Array, weight: Array | None, bias: Array | None) -> Array:
    """γ⊙x̂ + β"""
    y = x_hat if weight is None else weight.reshape(-1) * x_hat
    return y if bias is None else y + bias.reshape(-1)


def parameter_gradients(dy: Array, x_hat: Array, dx: Array, weight: Array | None, bias: Array | None) -> Gradients:
    """dγ = Σ_rows dy⊙x̂ and dβ = Σ_rows dy; for a scalar affine summed over the row too."""

    def reduced(values: Array, parameter: Array | None) -> Array | None:
        if parameter is None:
            return None
        total = values.sum() if parameter.size == 1 else values.sum(axis=0)
        return np.reshape(total, parameter.shape)

    return Gradients(dx, reduced(dy * x_hat, weight), reduced(dy, bias))


def scaled(dy: Array, weight: Array | None) -> Array:
    """ĝ = γ⊙dy"""
    return dy if weight is None else weight.reshape(-1) * dy


def layer_norm_statistics(x: Array, eps: float) -> tuple[Array, Array]:
    """x̂ = (x-μ)/√(σ²+ε), and √(σ²+ε)."""
    centered = x - mean(x)
    deviation = np.sqrt(mean(np.square(centered)) + eps)
    return centered / deviation, deviation


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    with np.errstate(all="ignore"):
        return affine(layer_norm_statistics(x, eps)[0], weight, bias)


def layer_norm_backward(dy: Array, x: Array, weight: Array | None, bias: Array | None, eps: float) -> Gradients:
    with np.errstate(all="ignore"):
        x_hat, deviation = layer_norm_statistics(x, eps)
        g = scaled(dy, weight)
        dx = (g - mean(g) - x_hat * mean(g * x_hat)) / deviation
        return parameter_gradients(dy, x_hat, dx, weight, bias)


def rms_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """x̂ = x/√(mean(x²)+ε). It has no bias; the argument is there so that both norms are called alike."""
    assert bias is None
    with np.errstate(all="ignore"):
        return affine(x / np.sqrt(mean(np.square(x)) + eps), weight, None)


def rms_norm_backward(dy: Array, x: Array, weight: Array | None, bias: Array | None, eps: float) -> Gradients:
    assert bias is None
    with np.errstate(all="ignore"):
        deviation = np.sqrt(mean(np.square(x)) + eps)
        x_hat = x / deviation
        g = scaled(dy, weight)
        dx = (g - x_hat * mean(g * x_hat)) / deviation
        return parameter_gradients(dy, x_hat, dx, weight, None)
