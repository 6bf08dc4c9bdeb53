"""Dropout: the mask as a function of (seed, index), values and gradients bit for bit, seeds, statistics of the mask."""

import math

import numpy as np
import pytest
import torch
from layers import gradients, leaf
from onepass.nn import functional as OF
from reference import dropout, philox
from support import HALF, arithmetic_dtype, assert_close, assert_same, bits, rounding, to_numpy

SEEDS = [0, 1, -1, 2**32, 123456789012345, 2**63 - 1, -(2**63)]
RATES = [0.0, 1e-9, 0.1, 0.5, 0.75, 0.999, 1.0]
SHAPES = [(), (0,), (1,), (3,), (7,), (8,), (9,), (31,), (127,), (64,), (1025,), (3, 0, 2), (5, 3, 7)]


def expected_bits(x: torch.Tensor, p: float, seed: int, inverted: bool = True) -> torch.Tensor:
    """select(keep, x·scale, 0) with one rounding in float32 and one to the dtype of storage."""
    keep = torch.from_numpy(philox.keep_mask(tuple(x.shape), p, seed)).to(x.device)
    arithmetic = arithmetic_dtype(x.dtype)
    scale = torch.tensor(dropout.scale(p, inverted), dtype=arithmetic, device=x.device)
    return torch.where(keep, (x.to(arithmetic) * scale).to(x.dtype), 0.0)


# ---- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("seed", SEEDS)
def test_mask(seed, p, device):
    for shape in SHAPES:
        expected = philox.keep_mask(shape, p, seed)
        came = OF.dropout_mask(shape, p, seed, device=device)
        assert (came.dtype, came.shape, came.device.type) == (torch.bool, torch.Size(shape), device.type)
        assert np.array_equal(came.cpu().numpy(), expected), f"{shape}: expected {expected}, came {came}"
        packed = OF.dropout_mask(shape, p, seed, packed=True, device=device)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == philox.pack(expected).tolist(), f"{shape} packed"


def test_mask_is_on_the_cpu_by_default():
    assert OF.dropout_mask((3,), 0.5, 1).device.type == "cpu"
    assert torch.equal(OF.dropout_mask([3, 4], 0.5, 1), OF.dropout_mask(torch.Size([3, 4]), 0.5, seed=1))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_large_mask(p):
    """Large enough for several threads."""
    n = 700_003
    expected = philox.keep_mask((n,), p, 42)
    assert np.array_equal(OF.dropout_mask((n,), p, 42).numpy(), expected)
    assert np.array_equal(OF.dropout_mask((n,), p, 42, packed=True).numpy(), philox.pack(expected))


@pytest.mark.parametrize(
    "p", [0.5 - 2.0**-33, 0.5 + 2.0**-33, 2.0**-33, 2.0**-34, 1 - 2.0**-33, 1 - 2.0**-34], ids=lambda p: p.hex()
)
def test_threshold_is_rounded(p, device):
    """T = floor(p·2³² + 0.5), tested at a word that equals T or differs by one."""
    n, seed = 20000, 9
    words = philox.words(seed, n)
    for i in range(0, n, 4999):
        for word in (int(words[i]) - 1, int(words[i]), int(words[i]) + 1):
            rate = word * 2.0**-32
            assert bool(OF.dropout_mask((n,), rate, seed, device=device)[i]) == (words[i] >= word)
    kept = OF.dropout_mask((n,), p, seed, device=device).cpu().numpy()
    assert np.array_equal(kept, words >= philox.threshold(p))


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("p", RATES)
def test_values_and_gradients(p, inverted, dtype, device):
    for seed, shape in enumerate(SHAPES):
        x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        x = leaf(x)
        y = OF.dropout(x, p, seed=seed, inverted=inverted)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert bits(y) == bits(expected_bits(x.detach(), p, seed, inverted)), f"y of {shape}: {y}"
        (dx,) = gradients(y, [x], dy)
        assert bits(dx) == bits(expected_bits(dy, p, seed, inverted)), f"gradient of {shape}: {dx}"
        assert_close(y, dropout.dropout(to_numpy(x), p, seed, inverted=inverted), 1e-6, "y", rounding(dtype))


def test_large(dtype):
    x, dy = (torch.randn(400_007).to(dtype) for _ in range(2))
    x = leaf(x)
    y = OF.dropout(x, 0.3, seed=5)
    assert bits(y) == bits(expected_bits(x.detach(), 0.3, 5))
    assert bits(gradients(y, [x], dy)[0]) == bits(expected_bits(dy, 0.3, 5))


@pytest.mark.parametrize("p", RATES)
def test_evaluation(p, dtype, device):
    """The identity; in the paper's form (1 - p)·x, with its gradient. No random number is drawn."""
    x, dy = (torch.randn(37, device=device).to(dtype) for _ in range(2))
    x = leaf(x)
    state = torch.get_rng_state()
    for inverted in (True, False):
        y = OF.dropout(x, p, training=False, inverted=inverted)
        factor = torch.tensor(1.0 if inverted else 1 - p, device=device, dtype=arithmetic_dtype(dtype))
        assert bits(y) == bits((x.detach().to(factor.dtype) * factor).to(dtype))
        assert bits(gradients(y, [x], dy)[0]) == bits((dy.to(factor.dtype) * factor).to(dtype))
    assert torch.equal(torch.get_rng_state(), state)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "offset by one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_mask_follows_the_logical_index(inplace, layout, dtype, device):
    """Whatever the strides of x and dy, the mask is that of the contiguous tensor."""
    for shape in [(5, 7), (16, 24)]:
        values, dy = (LAYOUTS[layout](torch.randn(shape, device=device).to(dtype)) for _ in range(2))
        x = leaf(values.clone(memory_format=torch.contiguous_format))
        y = OF.dropout(LAYOUTS[layout](x), 0.4, inplace=inplace, seed=3)
        assert bits(y) == bits(expected_bits(values, 0.4, 3)), f"{layout} {shape}"
        assert bits(gradients(y, [x], dy)[0]) == bits(expected_bits(dy, 0.4, 3)), f"{layout} {shape}, gradient"


def test_channels_last_stays(device):
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    y = OF.dropout(x, 0.4, seed=3)
    assert bits(y) == bits(expected_bits(x, 0.4, 3))
    assert y.stride() == x.stride(), f"expected {x.stride()}, came {y.stride()}"


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_inplace(layout, dtype, device):
    """Writes x and nothing around it, returns it, and autograd sees the write."""
    base = torch.full((6, 20), 7.0, device=device).to(dtype)
    x = {
        None: base[2:4],
        "transposed": base[2:4, :10].t(),
        "every second": base[2:4, 1::2],
        "offset by one": base.view(-1)[41:71].view(3, 10),
    }[layout]
    before = x.clone()
    outside = base.clone()
    version = x._version
    y = OF.dropout(x, 0.5, inplace=True, seed=8)
    assert y.data_ptr() == x.data_ptr()
    assert x._version > version
    assert bits(x) == bits(y) == bits(expected_bits(before, 0.5, 8))
    with torch.no_grad():
        x.copy_(before)
    assert bits(base) == bits(outside), "written beside the view"


def test_inplace_in_a_graph(device):
    w = leaf(torch.randn(40, device=device))
    h = w * 2
    y = OF.dropout(h, 0.5, inplace=True, seed=8)
    y.sum().backward()
    assert bits(w.grad) == bits(expected_bits(torch.full((40,), 2.0, device=device), 0.5, 8))
    h = w.exp()  # its backward needs its result
    OF.dropout(h, 0.5, inplace=True, seed=8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
    for p, training in ((0.5, False), (0.0, True)):
        h = w * 2
        assert OF.dropout(h, p, training, inplace=True).data_ptr() == h.data_ptr()
    h = w * 2
    assert OF.dropout(h, 0.25, False, inplace=True, inverted=False).data_ptr() == h.data_ptr()
    assert torch.equal(h, w * 1.5)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 1e-40, -0.0])
def test_special_values(special, device):
    """Dropped NaN and Inf give 0 in y and in the gradient; kept ones stay; a denormal is not flushed."""
    x, dy = (torch.full((64,), special, device=device) for _ in range(2))
    for p in (0.5, 1.0, 0.0):
        leaf_x = leaf(x)
        y = OF.dropout(leaf_x, p, seed=4)
        for came in (y, gradients(y, [leaf_x], dy)[0]):
            expected = expected_bits(x, p, 4)
            assert bits(came.nan_to_num(3.0)) == bits(expected.nan_to_num(3.0)), f"expected {expected}, came {came}"


def test_backward_does_not_need_x(dtype, device):
    """Backward keeps the seed and at most one bit per element."""
    x, n = leaf(torch.randn(4096, device=device).to(dtype)), 4096
    kept = []

    def pack(t):
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = OF.dropout(x * 1, 0.5)
    assert sum(kept) <= n // 8 + 64, f"{n // 8} bytes may be kept for backward, it is {sum(kept)}"
    y.sum().backward()


# ---- seeds and generators --------------------------------------------------------------------------------------------


def test_seed_comes_from_torchs_generator(device):
    x = torch.ones(1000, device=device)
    torch.manual_seed(5)
    first, second = OF.dropout(x), OF.dropout(x)
    assert not torch.equal(first, second), "two calls must differ"
    torch.manual_seed(5)
    assert torch.equal(OF.dropout(x), first)
    with torch.random.fork_rng():
        inside = OF.dropout(x)
    assert torch.equal(OF.dropout(x), second), "fork_rng did not restore the generator"
    assert torch.equal(inside, second)
    torch.manual_seed(6)
    assert not torch.equal(OF.dropout(x), first)


def test_generator(device):
    x = torch.ones(1000, device=device)
    state = torch.get_rng_state()
    generators = [torch.Generator(device).manual_seed(11) for _ in range(2)]
    first, again = (OF.dropout(x, generator=g) for g in generators)
    assert torch.equal(first, again)
    assert not torch.equal(OF.dropout(x, generator=generators[0]), first), "the generator must go on"
    assert torch.equal(torch.get_rng_state(), state), "the default generator was used beside the one given"


def test_explicit_seed_touches_no_generator(device):
    state = torch.get_rng_state()
    x = leaf(torch.ones(100, device=device))
    OF.dropout(x, seed=3).sum().backward()
    OF.dropout_mask((100,), 0.5, 3, device=device)
    assert torch.equal(torch.get_rng_state(), state)


def test_same_seed_every_dtype(device):
    masks = [OF.dropout(torch.ones(999, device=device, dtype=t), 0.5, seed=2) != 0 for t in (torch.float64, *HALF)]
    expected = OF.dropout_mask((999,), 0.5, 2, device=device)
    assert all(torch.equal(mask, expected) for mask in masks)


def test_x_is_only_read(dtype, device):
    x, dy = leaf(torch.randn(77, device=device).to(dtype)), torch.randn(77, device=device).to(dtype)
    before = {"x": bits(x), "dy": bits(dy)}
    gradients(OF.dropout(x, 0.5), [x], dy)
    assert_same({"x": bits(x), "dy": bits(dy)}, before, "inputs")


# ---- statistics ------------------------------------------------------------------------------------------------------

N = 100_000


def assert_binomial(successes: float, n: int, p: float, what: str) -> None:
    sigma = math.sqrt(n * p * (1 - p))
    assert abs(successes - n * p) <= 5 * sigma, f"{what}: expected {n * p:.0f} ± {sigma:.0f}, came {successes}"


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
def test_rate(p, device):
    for seed in (0, 1, 2**40 + 17):
        assert_binomial(N - int(OF.dropout_mask((N,), p, seed, device=device).sum()), N, p, f"dropped, seed {seed}")


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence(p, device):
    """Between elements at any distance within counters and vectors, and between adjacent seeds."""
    kept = OF.dropout_mask((N,), p, 3, device=device)
    for lag in (1, 2, 3, 4, 5, 8, 16, 32, 64, 100, 1024):
        both = int((kept[:-lag] & kept[lag:]).sum())
        assert_binomial(both, N - lag, (1 - p) ** 2, f"kept together at distance {lag}")
    for seed in (4, 2, 3 + 2**32, -4):
        both = int((kept & OF.dropout_mask((N,), p, seed, device=device)).sum())
        assert_binomial(both, N, (1 - p) ** 2, f"kept under seeds 3 and {seed}")


def test_bytes_of_the_mask_are_uniform(device):
    """Chi-squared over the 256 bytes of a packed mask with p = 0.5: 255 ± 5·√510."""
    counts = torch.bincount(OF.dropout_mask((8 * N,), 0.5, 12, packed=True, device=device).int(), minlength=256)
    chi = float(((counts - N / 256) ** 2 / (N / 256)).sum())
    assert abs(chi - 255) < 5 * math.sqrt(510), f"chi squared of 255 degrees of freedom: {chi}"


def test_seeds_drawn_do_not_repeat(device):
    x = torch.ones(64, device=device)
    seen = {bits(OF.dropout(x)) for _ in range(200)}
    assert len(seen) == 200
