"""The storage formats in NumPy, from their formulas: values of 8-bit codes, scales, and the random numbers of rounding."""

import numpy as np

GROUP = 64
GOLDEN = 0x9E3779B9  # 2**32 / golden ratio
EXPONENTS = {"signed8": 16, "unsigned8": 32}
SIGN = 0x80


def code_values(format_: str) -> np.ndarray:
    """The magnitudes of the codes of a group whose scale is 1: floats of 3 bits of fraction, counted from b."""
    n = EXPONENTS[format_]
    code = np.arange(8 * n)
    return 2.0 ** (code // 8 - (n - 1)) * (1 + code % 8 / 8) - 2.0 ** -(n - 1)


def scales_of(values: np.ndarray) -> np.ndarray:
    """The smallest power of two s, from 2**-126 on, with max |x| / s < 1.8125; for each group of finite values."""
    groups = [np.abs(values[i : i + GROUP]).max() for i in range(0, len(values), GROUP)]
    return np.array([2.0 ** max(-126, np.ceil(np.log2(m / 1.8125) + 1e-12)) if m > 0 else 2.0**-126 for m in groups])


def positions_of(values: np.ndarray, format_: str) -> np.ndarray:
    """Between which codes the magnitudes lie: c + f for a value that lies the fraction f of the way from code c to c + 1."""
    scales = np.repeat(scales_of(values), GROUP)[: len(values)]
    known = code_values(format_)
    return np.interp(np.abs(values) / scales, known, np.arange(len(known)))


def values_of(codes: np.ndarray, scales: np.ndarray, format_: str) -> np.ndarray:
    signed = format_ == "signed8"
    magnitude = code_values(format_)[codes & (SIGN - 1) if signed else codes]
    values = magnitude * np.repeat(scales, GROUP)[: len(codes)]
    return np.where(codes & SIGN, -values, values) if signed else values


def random_bits(count: int, t: int, stream: int) -> np.ndarray:
    """The 32 random bits of each element in step t. stream: the index of the state, 4 for the parameter."""
    mask = 2**64 - 1
    x = ((t * 5 + stream + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    start = (x ^ (x >> 31)) >> 32
    return (start + np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN)).astype(np.uint64) & np.uint64(2**32 - 1)


def bfloat16_of(values: np.ndarray, random: np.ndarray) -> np.ndarray:
    """The bits of float32 values, rounded down or up as the upper 16 random bits say."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + (random >> np.uint64(16))) >> np.uint64(16)).astype(np.uint16)
