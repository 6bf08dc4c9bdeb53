"""The CUDA kernels of BatchNorm, called directly: both layouts, every dtype and option.

Expected values come from the formulas in float64. The tests run on a GPU, or on the host with backend "cuda-on-host".
"""

import pytest
import torch
from onepass._dtypes import compute_dtype
from onepass._native import batch_norm as native
from onepass._native.batch_norm import BatchNormOptions, Operands, Running, Saved
from support import assert_close, rounding
from test_layer_kernels import DEVICE, EPS, TOLERANCE, affine, close, random, same, wide

pytestmark = pytest.mark.cuda_kernels
Tensor = torch.Tensor

# Shapes, and whether channels are last. Blocks have 8192 elements of a channel, with channels last 16384 of up to 128
# channels; 256 threads stride through them, so the spatial size decides at which position of a sample a thread continues.
FIRST = [
    (5, 3, 4, 4),
    (2, 3, 7, 7),
    (700, 3, 7, 7),
    (60, 2, 14, 14),
    (2, 40, 8),
    (1, 1, 2),
    (3, 2, 64, 64),
    (3, 2, 65, 65),
]
FIRST += [(1500, 2, 9), (900, 2, 24)]
LAST = [(2, 16, 5, 5), (3, 5, 6, 6), (70, 9), (2, 1), (300, 130), (150, 264), (5000, 8), (3, 2, 91, 91)]
SHAPES = [(shape, False) for shape in FIRST] + [(shape, True) for shape in LAST]
EVERY_SHAPE = pytest.mark.parametrize(("shape", "last"), SHAPES, ids=lambda value: str(value).replace(" ", ""))


def laid_out(shape: tuple[int, ...], last: bool, dtype: torch.dtype, offset: int = 0) -> Tensor:
    if not last:
        return random(*shape, dtype=dtype, offset=offset)
    dims = (0, len(shape) - 1, *range(1, len(shape) - 1))
    return random(shape[0], *shape[2:], shape[1], dtype=dtype, offset=offset).permute(dims)


def of_channel(values: Tensor | float, x: Tensor) -> Tensor | float:
    return values.view(1, -1, *[1] * (x.dim() - 2)) if isinstance(values, Tensor) else values


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance."""
    dims = [0, *range(2, x.dim())]
    return x.mean(dims), (x - of_channel(x.mean(dims), x)).square().mean(dims)


def batch_norm(x, mean, var, weight, bias, residual, slope) -> Tensor:
    z = (x - of_channel(mean, x)) / (of_channel(var, x) + EPS).sqrt()
    z = z if weight is None else z * of_channel(weight, x)
    z = z if bias is None else z + of_channel(bias, x)
    z = z if residual is None else z + residual
    return z if slope is None else torch.where(z > 0, z, slope * z)


def away_from_the_kink(z: Tensor) -> Tensor:
    """Values far enough from the activation's kink that rounding cannot change their side."""
    return (z.abs() > 0.02).double()


def options(x, slope=None) -> BatchNormOptions:
    return BatchNormOptions(EPS, slope, channels_last=not x.is_contiguous())


@EVERY_SHAPE
def test_training(shape, last, dtype):
    x, residual, dy = (laid_out(shape, last, dtype) for _ in range(3))
    channels = shape[1]
    n = x.numel() // channels
    for kind, slope, adds in (("both", None, False), ("float32", 0.25, True), ("none", 0.0, False)):
        weight, bias = affine(kind, channels, dtype)
        leaves = wide(x, weight, bias, residual if adds else None)
        mean, var = moments(leaves[0])
        dense = batch_norm(leaves[0], mean, var, *leaves[1:], None)
        dy.copy_(dy * away_from_the_kink(dense))
        expected = batch_norm(leaves[0], mean, var, *leaves[1:], slope)

        running = torch.randn(channels).to(DEVICE), torch.rand(channels).to(DEVICE)
        updated = [
            0.75 * old.double() + 0.25 * new for old, new in zip(running, (mean, var * n / max(n - 1, 1)), strict=True)
        ]
        y, stats = native.batch_norm(
            Operands(x, residual if adds else None, weight, bias), Running(*running, None, 0.25), options(x, slope)
        )
        assert y.stride() == x.stride()
        close(y, expected, dtype, "y", 4)
        close(stats[0], mean, stats.dtype, "mean")
        close(stats[1] * (var + EPS).sqrt(), torch.ones(channels), stats.dtype, "rstd", 4)
        close(running[0], updated[0], torch.float32, "running mean")
        if n > 1:
            close(running[1], updated[1], torch.float32, "running variance")

        want = [leaf is not None for leaf in (leaves[0], leaves[3], leaves[1], leaves[2])]
        present = [leaves[i] for i in (0, 3, 1, 2) if leaves[i] is not None]
        gradients = iter(torch.autograd.grad(expected, present, dy.double()))
        came = native.batch_norm_backward(dy, Saved(x, y, weight, stats), options(x, slope), True, want)
        for name, wanted, value in zip(("dx", "dresidual", "dweight", "dbias"), want, came, strict=True):
            assert wanted or value is None
            if wanted:
                close(value, next(gradients), dtype, name, 4 * n**0.5 if name in ("dweight", "dbias") else 10)
        if adds:
            same(native.batch_norm_backward(dy, Saved(x, y, weight, stats), options(x, slope), True, want), came)


@EVERY_SHAPE
def test_evaluation(shape, last, dtype):
    x, residual, dy = (laid_out(shape, last, dtype) for _ in range(3))
    channels = shape[1]
    mean, var = torch.randn(channels).to(DEVICE).double(), torch.rand(channels).to(DEVICE).double() + 0.5
    stats = torch.stack([mean, 1 / (var + EPS).sqrt(), mean - mean.to(compute_dtype(x.dtype))]).to(
        compute_dtype(x.dtype)
    )
    for slope, adds in ((None, True), (0.0, False), (0.25, True)):
        weight, bias = affine("both", channels, dtype)
        leaves = wide(x, weight, bias, residual if adds else None)
        dy.copy_(dy * away_from_the_kink(batch_norm(leaves[0], mean, var, *leaves[1:], None)))
        expected = batch_norm(leaves[0], mean, var, *leaves[1:], slope)
        y = native.batch_norm_apply(Operands(x, residual if adds else None, weight, bias), stats, options(x, slope))
        close(y, expected, dtype, "y", 4)
        gradients = torch.autograd.grad(expected, [leaf for leaf in leaves if leaf is not None], dy.double())
        came = native.batch_norm_backward(
            dy, Saved(x, y, weight, stats), options(x, slope), False, [True, adds, True, True]
        )
        close(came[0], gradients[0], dtype, "dx", 4)
        close(came[2], gradients[1], dtype, "dweight", 4 * x.numel() ** 0.5)
        close(came[3], gradients[2], dtype, "dbias", 4 * x.numel() ** 0.5)
        if adds:
            close(came[1], gradients[3], dtype, "dresidual", 4)
        frozen = native.batch_norm_backward(
            dy, Saved(x, y, weight, stats), options(x, slope), False, [True, adds, False, False]
        )
        same(frozen, (came[0], came[1], None, None))


@EVERY_SHAPE
def test_halves(shape, last, dtype):
    """The two halves between which SyncBatchNorm communicates; in one process together they equal the whole."""
    x, dy = laid_out(shape, last, dtype), laid_out(shape, last, dtype)
    channels = shape[1]
    weight, bias = affine("both", channels, dtype)
    mean, var = moments(x.double())
    came = native.batch_norm_moments(x, options(x).channels_last)
    close(came[0], mean, came.dtype, "mean")
    close(came[1], var, came.dtype, "variance")
    stats = torch.stack([came[0], 1 / (came[1] + EPS).sqrt(), came[2]])
    y = native.batch_norm_apply(Operands(x, None, weight, bias), stats, options(x, 0.25))
    close(y, batch_norm(x.double(), mean, var, weight.double(), bias.double(), None, 0.25), dtype, "y", 4)

    saved = Saved(x, y, weight, stats)
    whole = native.batch_norm_backward(dy, saved, options(x, 0.25), True, [True, True, True, True])
    sums = native.batch_norm_backward_sums(dy, saved, options(x, 0.25))
    count = float(x.numel() // channels)
    halves = native.batch_norm_backward_apply(dy, saved, sums, count, options(x, 0.25), [True, True])
    same(halves, whole[:2])
    close(sums[0].to(weight.dtype), whole[3], dtype, "sum of dz", 4 * count**0.5)
    close(sums[1].to(weight.dtype), whole[2], dtype, "sum of dz * xhat", 4 * count**0.5)


@pytest.mark.parametrize(("shape", "last"), [((5, 3, 4, 4), False), ((150, 264), True)], ids=str)
def test_odd_addresses(shape, last, dtype):
    """The same numbers, although elements are read one by one and sums have another order."""
    aligned, dy = laid_out(shape, last, dtype), laid_out(shape, last, dtype)
    odd = laid_out(shape, last, dtype, offset=1).copy_(aligned)
    results = []
    for x in (aligned, odd):
        y, stats = native.batch_norm(Operands(x, None, None, None), Running(None, None), options(x))
        results.append(
            (
                y,
                *native.batch_norm_backward(
                    dy, Saved(x, None, None, stats), options(x), True, [True, False, False, False]
                ),
            )
        )
    for i, what in enumerate(("y", "dx")):  # both are rounded
        assert_close(results[1][i], results[0][i], 10 * TOLERANCE.get(dtype, 5e-6), what, 2.02 * rounding(dtype))


@pytest.mark.parametrize("running_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_running_statistics_of_another_dtype(running_dtype):
    x = random(50, 3, 4, dtype=torch.float32)
    running = torch.zeros(3, dtype=running_dtype, device=DEVICE), torch.ones(3, dtype=running_dtype, device=DEVICE)
    native.batch_norm(Operands(x, None, None, None), Running(*running, None, 0.5), options(x))
    mean, var = moments(x.double())
    close(running[0], 0.5 * mean, torch.float32, "running mean")
    close(running[1], 0.5 + 0.5 * var * 200 / 199, torch.float32, "running variance")


@EVERY_SHAPE
def test_statistics_of_a_large_mean(shape, last):
    """1e4 + noise of 1e-2: the deviation has three digits, and the mean all of its digits."""
    x = (1e4 + laid_out(shape, last, torch.float64) * 1e-2).float()
    mean, var = moments(x.double())
    running = torch.zeros(shape[1], device=DEVICE), torch.zeros(shape[1], device=DEVICE)
    y, stats = native.batch_norm(
        Operands(x, None, None, None), Running(*running, None, 1.0), options(x)._replace(eps=0.0)
    )
    n = x.numel() // shape[1]
    if n < 10:
        return
    close(stats[1] * var.sqrt(), torch.ones(shape[1]), torch.float32, "deviation", 100)
    close(stats[0], mean, torch.float32, "mean", 0.02)
    close(running[1] / (var * n / (n - 1)), torch.ones(shape[1]), torch.float32, "running variance", 100)
    close(y, (x.double() - of_channel(mean, x)) / of_channel(var, x).sqrt(), torch.float32, "y", 200)
