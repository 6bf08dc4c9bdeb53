"""BatchNorm (Ioffe, Szegedy 2015) per channel of x [N, C, *space], with the residual and activation that may follow it.

y = γ⊙x̂ + β; z = y + residual; out = z where z > 0, slope·z elsewhere (slope 0: ReLU; None: no activation).
"""

from dataclasses import dataclass

import numpy as np

from .common import Array


@dataclass
class Gradients:
    x: Array
    weight: Array | None = None
    bias: Array | None = None
    residual: Array | None = None


def axes(x: Array) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def per_channel(values: Array, x: Array) -> Array:
    """[C] as it broadcasts to [N, C, *space]."""
    return values.reshape(1, -1, *(1,) * (x.ndim - 2))


def count(x: Array) -> int:
    """Elements per channel."""
    return x.size // x.shape[1] if x.shape[1] else 0


def moments(x: Array) -> tuple[Array, Array]:
    """μ and the biased σ² of each channel."""
    mean = x.mean(axis=axes(x))
    return mean, np.square(x - per_channel(mean, x)).mean(axis=axes(x))


def updated(running: Array, batch: Array, momentum: float) -> Array:
    return (1.0 - momentum) * running + momentum * batch


def running_statistics(x: Array, running_mean: Array, running_var: Array, momentum: float) -> tuple[Array, Array]:
    """The running statistics after this batch. They average the unbiased variance; an empty batch changes nothing."""
    if x.size == 0:
        return running_mean, running_var
    with np.errstate(all="ignore"):
        mean, var = moments(x)
        n = count(x)
        return updated(running_mean, mean, momentum), updated(running_var, var * n / (n - 1), momentum)


def normalized(x: Array, mean: Array, var: Array, eps: float) -> Array:
    """x̂"""
    return (x - per_channel(mean, x)) / np.sqrt(per_channel(var, x) + eps)


def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    statistics: tuple[Array, Array] | None = None,
    residual: Array | None = None,
    slope: float | None = None,
) -> Array:
    """With given statistics (evaluation), or with the batch's own (training)."""
    if x.size == 0:
        return x.copy()
    with np.errstate(all="ignore"):
        z = normalized(x, *(statistics or moments(x)), eps)
        z = z if weight is None else z * per_channel(weight, x)
        z = z if bias is None else z + per_channel(bias, x)
        z = z if residual is None else z + residual
        return z if slope is None else np.where(z > 0, z, slope * z if slope else np.where(np.isnan(z), z, 0.0))


def batch_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    statistics: tuple[Array, Array] | None = None,
    residual: Array | None = None,
    slope: float | None = None,
) -> Gradients:
    if x.size == 0:
        zeros = np.zeros(x.shape[1])
        return Gradients(x.copy(), zeros if weight is not None else None, zeros if bias is not None else None, x.copy())
    with np.errstate(all="ignore"):
        mean, var = statistics or moments(x)
        x_hat = normalized(x, mean, var, eps)
        dz = dy
        if slope is not None:
            out = batch_norm(x, weight, bias, eps, statistics, residual)
            dz = np.where(
                out > 0, dy, slope * dy if slope else 0.0
            )  # a selection, so that ReLU stops an infinite gradient too
        g = dz if weight is None else dz * per_channel(weight, x)
        if statistics is None:  # the batch's statistics depend on x
            mean_g, mean_gx = g.mean(axis=axes(x)), (g * x_hat).mean(axis=axes(x))
            g = g - per_channel(mean_g, x) - x_hat * per_channel(mean_gx, x)
        dx = g / np.sqrt(per_channel(var, x) + eps)
        dweight = None if weight is None else (dz * x_hat).sum(axis=axes(x))
        dbias = None if bias is None else dz.sum(axis=axes(x))
        return Gradients(dx, dweight, dbias, None if residual is None else dz)
