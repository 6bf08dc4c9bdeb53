"""Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") and dropout's mask.

Four 32-bit words come from a 128-bit counter and a 64-bit key by ten rounds of multiplication and exclusive or.
"""

import numpy as np

from .common import Array

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key between rounds: the golden ratio and sqrt(3) - 1
MASK = np.uint64(0xFFFFFFFF)
HALF_WORD = np.uint64(32)

# The authors' known answers (Random123, kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox4x32(counter: Array, key: tuple[int, int]) -> Array:
    """Ten rounds: counters [..., 4] and one key to words [..., 4], all of them 32 bits in uint64."""
    x0, x1, x2, x3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(MULTIPLIERS[0]) * x0, np.uint64(MULTIPLIERS[1]) * x2  # 64 bits hold both halves
        x0, x1, x2, x3 = (
            (product1 >> HALF_WORD) ^ x1 ^ np.uint64(k0),
            product1 & MASK,
            (product0 >> HALF_WORD) ^ x3 ^ np.uint64(k1),
            product0 & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) % 2**32, (k1 + WEYL[1]) % 2**32
    return np.stack([x0, x1, x2, x3], axis=-1)


def words(seed: int, n: int, start: int = 0) -> Array:
    """Words start ... start + n - 1 of a seed: word i is number i mod 4 of the counter i div 4."""
    i = np.arange(start, start + n, dtype=np.uint64)
    q = i // np.uint64(4)
    counter = np.stack([q & MASK, q >> HALF_WORD, np.zeros_like(q), np.zeros_like(q)], axis=-1)
    seed %= 2**64  # the bits of the int64
    four = philox4x32(counter, (seed % 2**32, seed // 2**32))
    return np.take_along_axis(four, (i % np.uint64(4)).astype(np.int64)[:, None], axis=-1)[:, 0]


def threshold(p: float) -> int:
    """T: words below it are dropped. 2³², which no word reaches, for p = 1."""
    return int(np.floor(p * 2.0**32 + 0.5))


def keep_mask(shape: tuple[int, ...], p: float, seed: int) -> Array:
    """Which elements are kept: a pure function of (seed, row-major index)."""
    n = int(np.prod(shape, dtype=np.int64))
    return (words(seed, n) >= np.uint64(threshold(p))).reshape(shape)


def pack(mask: Array) -> Array:
    """Element i as bit i mod 8 of byte i div 8; the last byte is padded with zeros."""
    return np.packbits(mask.reshape(-1), bitorder="little")
