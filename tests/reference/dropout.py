"""Dropout (Srivastava et al. 2014): p is the probability of dropping; the mask is Philox's, see philox.py."""

import numpy as np

from .common import Array
from .philox import keep_mask


def scale(p: float, inverted: bool) -> float:
    """The factor on kept elements in training. The original paper's form has none and scales in evaluation."""
    return 1.0 / (1.0 - p) if inverted and p < 1 else 1.0


def dropout(x: Array, p: float, seed: int, *, training: bool = True, inverted: bool = True) -> Array:
    if not training:
        return x.copy() if inverted else (1.0 - p) * x
    if p == 0:
        return x.copy()
    # A selection, not a product, so that a dropped NaN or Inf gives 0.
    return np.where(keep_mask(x.shape, p, seed), x * scale(p, inverted), 0.0)


def dropout_backward(dy: Array, p: float, seed: int, *, training: bool = True, inverted: bool = True) -> Array:
    return dropout(dy, p, seed, training=training, inverted=inverted)  # it is linear, and its matrix is diagonal
