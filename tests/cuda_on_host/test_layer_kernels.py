"""The CUDA kernels of the layers, called directly: rows of every length, every dtype and option.

Expected values come from the formulas in float64. The tests run on a GPU, or on the host with backend "cuda-on-host".
"""

import itertools

import pytest
import torch
from cuda_on_host import backend
from onepass._native import layers
from onepass._native.layers import DropoutOptions, NormOptions
from support import HALF, assert_close, bits, rounding

DEVICE = backend.kernel_device()
if DEVICE is None:
    pytest.skip("no CUDA kernels here: neither a GPU nor the backend cuda-on-host", allow_module_level=True)

pytestmark = pytest.mark.cuda_kernels
Tensor = torch.Tensor
EPS, SEED, P = 1e-5, -7, 0.4
TOLERANCE = {torch.float64: 1e-12}  # for sums of many terms, relative to the largest


def random(*shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """A dense random tensor, `offset` elements after an aligned address."""
    n = torch.Size(shape).numel()
    return torch.randn(n + offset).to(DEVICE, dtype)[offset:].view(shape)


def close(came: Tensor | None, expected: Tensor, dtype: torch.dtype, what: str, scale: float = 1.0) -> None:
    assert came is not None
    assert_close(came, expected, TOLERANCE.get(dtype, 5e-6) * scale, what, 1.01 * rounding(came.dtype))


def same(first: tuple, second: tuple) -> None:
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert (a is None) == (b is None)
        assert a is None or bits(a) == bits(b), f"result {i} has other bits in a second run"


# ---- dropout ---------------------------------------------------------------------------------------------------------


def philox(n: int, seed: int) -> Tensor:
    """The first n words of a seed's sequence (Salmon et al. 2011), 32 bits in int64."""
    low = 0xFFFFFFFF
    q = torch.arange((n + 3) // 4)
    x = [q & low, q >> 32, torch.zeros_like(q), torch.zeros_like(q)]
    key = [seed & low, seed >> 32 & low]

    def product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word; the factor is split in halves, because int64 cannot hold the whole product."""
        upper, lower = (multiplier >> 16) * word, (multiplier & 0xFFFF) * word
        middle = upper + (lower >> 16)
        return middle >> 16, (middle & 0xFFFF) << 16 | lower & 0xFFFF

    for _ in range(10):
        (high0, low0), (high1, low1) = product(0xD2511F53, x[0]), product(0xCD9E8D57, x[2])
        x = [high1 ^ x[1] ^ key[0], low1, high0 ^ x[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return torch.stack(x, 1).flatten()[:n]


def keep(n: int, p: float = P, seed: int = SEED) -> Tensor:
    return (philox(n, seed) >= int(p * 2**32 + 0.5)).to(DEVICE)


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor(seed, device=DEVICE)


def test_philox_known_answer():
    """Random123's kat_vectors: counter 0, key 0."""
    assert philox(4, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 8, 9, 31, 1023, 2048, 2051, 10_000])
def test_dropout(n, offset, dtype):
    x = random(n, dtype=dtype, offset=offset)
    if n:
        x[:: max(1, n // 7)] = torch.nan  # dropped elements give 0
    for p, inverted in ((P, True), (0.75, False), (0.0, True), (1.0, False)):
        scale = 1 / (1 - p) if inverted else 1.0
        mask, options = keep(n, p), DropoutOptions(seed_tensor(), p, inverted)
        y, _ = layers.dropout(x, options, keep_mask=True)
        close(y, torch.where(mask, x.double() * scale, 0.0), dtype, f"dropout of {p}")
        packed = layers.dropout_mask((n,), options, packed=True)
        padded = torch.nn.functional.pad(mask, (0, -n % 8)).view(-1, 8)
        assert packed.tolist() == (padded << torch.arange(8, device=DEVICE)).sum(1).tolist()
        for known in (packed, packed[:0]):  # a mask that is kept, and one that is recomputed
            dx = layers.dropout_backward(x, options, known)
            assert bits(dx) == bits(y), "a linear map with a diagonal matrix is its own gradient"
    inplace = x.clone() if offset == 0 else random(n, dtype=dtype, offset=offset).copy_(x)
    layers.dropout(inplace, DropoutOptions(seed_tensor(), 1.0, True), keep_mask=False, out=inplace)
    assert not inplace.any()


def written_mask(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A mask from a call that writes y and the mask together, which the package does on the CPU only."""
    x = random(n, dtype=dtype)
    y, mask = torch.empty_like(x), torch.full(((n + 7) // 8,), 255, dtype=torch.uint8, device=DEVICE)
    layers._C.dropout(x, y, n, (seed_tensor(), P, True, mask, False), layers.resources_for(x))
    assert torch.equal(y != 0, keep(n))
    return x, mask


@pytest.mark.parametrize("n", [5, 8, 12, 2051])
def test_dropout_writes_its_mask(n, dtype):
    _, mask = written_mask(n, dtype)
    assert torch.equal(mask, layers.dropout_mask((n,), DropoutOptions(seed_tensor(), P, True), packed=True))


def test_more_elements_than_a_turn_of_the_grid():
    n = 2048 * 256 * 4 + 13  # max_blocks, dropout_threads and a group of float32 in csrc/cuda/tuning.hpp
    assert torch.equal(layers.dropout_mask((n,), DropoutOptions(seed_tensor(), P, True), packed=False), keep(n))


# ---- LayerNorm and RMSNorm -------------------------------------------------------------------------------------------

# Rows that fit a few lanes, a warp or several warps; the longest that fit a block, forward and backward, and longer ones.
# Sizes divisible by 8 are read in 16-byte words, the others element by element.
SIZES = [1, 3, 8, 24, 128, 256, 264, 1000, 1024, 1032, 4099, 8192, 8200, 16384, 16392]
AFFINE = ["none", "both", "weight", "float32", "scalar"]


def affine(kind: str, size: int, dtype: torch.dtype, offset: int = 0) -> tuple[Tensor | None, Tensor | None]:
    if kind == "none":
        return None, None
    if kind == "float32" and dtype in HALF:
        dtype = torch.float32
    n = 1 if kind == "scalar" else size
    weight = random(n, dtype=dtype, offset=offset)
    return weight, None if kind == "weight" else random(n, dtype=dtype, offset=offset)


def row_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    mean = x.mean(1, keepdim=True) if x.shape[1] and not rms else 0.0
    y = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + EPS).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """float64 leaves of the same values."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def rows_for(size: int) -> int:
    """Enough rows for more than one block, with a last team that has none."""
    return 3 if size > 1100 else 19 if size > 128 else 300


def check_row_norm(x, weight, bias, rms, what) -> None:
    dtype, size = x.dtype, x.shape[1]
    dy = random(*x.shape, dtype=dtype)
    y, stats = layers.norm(x, weight, bias, NormOptions(size, EPS, rms))
    leaves = wide(x, weight, bias)
    expected = row_norm(*leaves, rms)
    close(y, expected, dtype, f"{what}: y")
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(expected, present, dy.double()))
    want = [leaf is not None for leaf in leaves]
    came = layers.norm_backward(dy, x, weight, stats, NormOptions(size, EPS, rms), want)
    # A sum over n terms of about 1 carries the rounding of its partial sums.
    scales = (4.0, x.shape[0] ** 0.5 * 4, x.shape[0] ** 0.5 * 4)
    if weight is not None and weight.numel() == 1:
        scales = (4.0, x.numel() ** 0.5 * 4, x.numel() ** 0.5 * 4)
    for name, wanted, value, scale in zip(("dx", "dweight", "dbias"), want, came, scales, strict=True):
        assert wanted or value is None
        if wanted:
            close(value, next(gradients), dtype, f"{what}: {name}", scale)
    if not rms:
        same(layers.norm_backward(dy, x, weight, stats, NormOptions(size, EPS, rms), want), came)


@pytest.mark.parametrize("size", SIZES)
def test_rows(size, dtype):
    """In the package RMSNorm has no bias, but the kernel supports one."""
    usual = [(False, "both"), (True, "scalar")]
    for rms, kind in itertools.product((False, True), AFFINE) if size in (24, 264) else usual:
        x = random(rows_for(size), size, dtype=dtype)
        check_row_norm(x, *affine(kind, size, dtype), rms, f"{size} elements, rms {rms}, {kind}")


@pytest.mark.parametrize("unaligned", ["x", "weight"])
@pytest.mark.parametrize("size", [8, 264, 8200])
def test_rows_at_odd_addresses(size, unaligned, dtype):
    x = random(3, size, dtype=dtype, offset=unaligned == "x")
    check_row_norm(x, *affine("both", size, dtype, offset=unaligned == "weight"), False, f"{size} elements")


@pytest.mark.parametrize("size", [8, 3, 264, 8200])
def test_only_what_is_wanted(size, dtype):
    x, dy = random(3, size, dtype=dtype), random(3, size, dtype=dtype)
    (weight, bias), options = affine("both", size, dtype), NormOptions(size, EPS, False)
    stats = layers.norm(x, weight, bias, options)[1]
    whole = layers.norm_backward(dy, x, weight, stats, options, [True] * 3)
    for want in itertools.product((False, True), repeat=3):
        came = layers.norm_backward(dy, x, weight, stats, options, want)
        same(came, tuple(value if wanted else None for value, wanted in zip(whole, want, strict=True)))


@pytest.mark.parametrize(("size", "rows"), [(1, 2048 * 256), (8, 2048 * 128), (1056, 2048 * 2)])
def test_more_rows_than_a_turn_of_the_grid(size, rows):
    """Blocks take a second turn (more in backward), in the last of which most teams have no row."""
    which = torch.arange(rows + 1, device=DEVICE) % 3
    values = torch.randn(3, size).to(DEVICE)
    weight = random(size, dtype=torch.float32)
    x, leaves, options = values[which], wide(values, weight), NormOptions(size, EPS, False)
    y, stats = layers.norm(x, weight, None, options)
    expected = row_norm(*leaves, None, False)
    close(y, expected[which], torch.float32, "y", 4)
    dx, dweight, dbias = layers.norm_backward(x, x, weight, stats, options, [True, True, True])
    counts = which.bincount().double()[:, None]
    gradients = torch.autograd.grad(expected, leaves, values.double() * counts)
    close(dx, (gradients[0] / counts)[which], torch.float32, "dx", 10)
    close(dweight / rows, gradients[1] / rows, torch.float32, "dweight", 4)
    close(dbias / rows, (values.double() * counts).sum(0) / rows, torch.float32, "dbias", 4)


@pytest.mark.parametrize("size", [24, 100, 1000, 1001, 8200, 16392])
def test_statistics_of_a_large_mean(size):
    """1e4 + noise of 1e-2: the deviation has three digits, and the mean all of its digits."""
    noise = torch.randn(4, size) * 1e-2
    x = (1e4 + noise.double()).float().to(DEVICE)
    mean, rstd, rest_of_mean = layers.norm(x, None, None, NormOptions(size, 0.0, False))[1]
    deviation = x.double().std(1, unbiased=False)
    assert_close(1 / rstd.double() / deviation, torch.ones(4), 5e-4, "deviation")
    assert_close(mean, x.double().mean(1), 6e-8, "mean")
    assert_close(mean.double() + rest_of_mean.double() - x.double().mean(1), torch.zeros(4), 1e-9, "both parts")
    y = layers.norm(x, None, None, NormOptions(size, 0.0, False))[0]
    centered = x.double() - x.double().mean(1, keepdim=True)
    assert_close(y, centered / deviation[:, None], 1e-3, "y")


@pytest.mark.parametrize("size", [8, 300, 1024, 4099, 8200, 16392])
def test_dropout_add_norm(size, dtype):
    rows = rows_for(size) // 2 + 1
    mask = keep(rows * size).view(rows, size)
    for rms, drops, inverted in ((False, True, True), (True, True, False), (False, False, True)):
        seed, scale = seed_tensor() if drops else None, 1 / (1 - P) if drops and inverted else 1.0
        x, residual, dy, dsum = (random(rows, size, dtype=dtype) for _ in range(4))
        x[0, 0] = 0.0
        weight, bias = affine("both", size, dtype)
        options = DropoutOptions(seed, P, inverted), NormOptions(size, EPS, rms)
        y, total, stats, kept = layers.dropout_add_norm(x, residual, weight, bias, *options, keep_mask=True)
        branch = torch.where(mask, x.double() * scale, 0.0) if drops else x.double()
        close(total, residual.double() + branch, dtype, "sum")
        leaves = wide(total, weight, bias)  # the norm is that of the sum as it is stored
        expected = row_norm(*leaves, rms)
        close(y, expected, dtype, "y")

        for more in (dsum, None) if drops and inverted else (dsum,):
            gradients = torch.autograd.grad(expected, leaves, dy.double(), retain_graph=True)
            dtotal = gradients[0] + (0 if more is None else more.double())
            came = layers.dropout_add_norm_backward((dy, more), (total, weight, stats, kept), *options, [True] * 4)
            dbranch = torch.where(mask, dtotal * scale, 0.0) if drops else dtotal
            for name, value, gradient in zip(
                ("dx", "dresidual", "dweight", "dbias"), came, (dbranch, dtotal, *gradients[1:]), strict=True
            ):
                close(value, gradient, dtype, name, rows**0.5 * 4)


@pytest.mark.parametrize("size", [3, 8])
def test_dropout_add_norm_writes_a_mask(size):
    """If the call has a mask; the package passes one on the CPU only."""
    x, residual = random(5, size, dtype=torch.float32), random(5, size, dtype=torch.float32)
    outputs = [torch.empty_like(x), torch.empty_like(x), torch.empty(3, 5, device=DEVICE)]
    mask, seed = torch.zeros((x.numel() + 7) // 8, dtype=torch.uint8, device=DEVICE), seed_tensor()
    dropout = seed, P, True, mask, False
    norm, place = (size, EPS, False), layers.resources_for(x)
    layers._C.row_norm((x, residual, None, None), (outputs[1], outputs[0], outputs[2]), norm, dropout, place)
    assert torch.equal(mask, layers.dropout_mask(x.shape, DropoutOptions(seed, P, True), packed=True))
