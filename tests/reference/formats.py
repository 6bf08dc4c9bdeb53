"""8-bit states in float64 NumPy, from their formulas: groups of 64 elements in the order of memory, one scale per group."""

import numpy as np

GROUP = 64
LEVELS = {"signed8": 127, "unsigned8": 255}
POWER = {"signed8": 2, "unsigned8": 4}  # a value is the power of its root


def scales_of(values: np.ndarray, format_: str) -> np.ndarray:
    """s: the largest root of each group; NaN where an element is not finite."""
    groups = [values[i : i + GROUP] for i in range(0, len(values), GROUP)]
    with np.errstate(invalid="ignore"):
        return np.array([np.nan if not np.isfinite(g).all() else roots(g, format_).max() for g in groups])


def roots(values: np.ndarray, format_: str) -> np.ndarray:
    return np.abs(values) ** (1 / POWER[format_])


def codes_of(values: np.ndarray, format_: str) -> np.ndarray:
    """q before rounding; 0 in a group that is not finite. A positive square has at least code 1."""
    scales = np.repeat(scales_of(values, format_), GROUP)[: len(values)]
    with np.errstate(all="ignore"):
        q = np.nan_to_num(LEVELS[format_] * roots(values, format_) / scales, nan=0.0, posinf=0.0)
    if format_ == "signed8":
        return np.sign(values) * q
    return np.where((values > 0) & (q < 1) & np.isfinite(scales), 1.0, q)


def values_of(codes: np.ndarray, scales: np.ndarray, format_: str) -> np.ndarray:
    root = np.repeat(scales, GROUP)[: len(codes)] * np.abs(codes) / LEVELS[format_]
    return np.sign(codes) * root ** POWER[format_] if format_ == "signed8" else root ** POWER[format_]
