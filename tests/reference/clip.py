"""Clipping of gradients by their common p-norm and by value."""

import numpy as np

from .common import Array, norm_scale


def p_norm(values: Array, p: float) -> float:
    """The p-norm of a vector; p = 0 counts the nonzero elements, ±inf give the largest and the smallest magnitude."""
    magnitude = np.abs(values)
    if values.size == 0:
        return 0.0
    if p == 0:
        return float(np.count_nonzero(magnitude))
    if np.isinf(p):
        return float(magnitude.max() if p > 0 else magnitude.min())
    with np.errstate(all="ignore"):
        return float(np.sum(magnitude**p) ** (1.0 / p))


def global_norm(grads: list[Array], p: float = 2.0) -> float:
    """The norm of the tensors' norms, as torch.nn.utils computes it.

    This is the norm of all elements together for every p but 0, where it counts the tensors that are not zero.
    """
    return p_norm(np.array([p_norm(g, p) for g in grads]), p)


def clip_grad_norm(grads: list[Array], max_norm: float, norm_type: float = 2.0) -> tuple[float, list[Array]]:
    norm = global_norm(grads, norm_type)
    scale = norm_scale(norm, max_norm, normalize_grads=False)
    with np.errstate(all="ignore"):
        return norm, [g * scale for g in grads]


def clip_grad_value(grads: list[Array], clip_value: float) -> list[Array]:
    return [np.clip(g, -clip_value, clip_value) for g in grads]
