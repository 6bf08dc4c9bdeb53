"""What holds for every input (invariances, identities between functions, prefixes of masks), tested with hypothesis."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onepass.nn import functional as OF
from reference import philox
from support import assert_close, bits

QUICK = settings(deadline=None, max_examples=40)
SEEDS = st.integers(-(2**63), 2**63 - 1)
RATES = st.floats(0, 1)
DTYPES = st.sampled_from([torch.float32, torch.float64])


@st.composite
def rows(draw, max_rows=6, max_size=70):
    shape = draw(st.integers(1, max_rows)), draw(st.integers(2, max_size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(shape, generator=generator, dtype=draw(DTYPES))


def tolerance(x: torch.Tensor) -> float:
    return 1e-10 if x.dtype == torch.float64 else 2e-3  # nearly equal elements lose digits


@QUICK
@given(rows(), st.sampled_from([-8.0, -1.0, 0.125, 1.0, 64.0]), st.integers(-50, 50))
def test_layer_norm_is_invariant_under_affine_maps(x, a, b):
    """y(a·x + b) = sign(a)·y(x) without eps, for maps that do not round."""
    size = x.shape[-1:]
    x = (x * 64).round() / 64  # then a·x + b is exact
    x[:, 0] = x[:, 1] + 1  # no row is constant
    y = OF.layer_norm(x, size, eps=0.0)
    assert_close(OF.layer_norm(a * x + b, size, eps=0.0), y if a > 0 else -y, tolerance(x), f"{a}x + {b}")


@QUICK
@given(rows(), st.sampled_from([-8.0, 0.125, 64.0]))
def test_rms_norm_is_invariant_under_scaling(x, a):
    """Powers of two change no bit except the sign."""
    y = OF.rms_norm(x, x.shape[-1:], eps=0.0)
    assert bits(OF.rms_norm(a * x, x.shape[-1:], eps=0.0)) == bits(y if a > 0 else -y)


@QUICK
@given(rows())
def test_normalized_rows_have_mean_0_and_variance_1(x):
    x[:, 0] = x[:, 1] + 1
    y = OF.layer_norm(x, x.shape[-1:], eps=0.0).double()
    assert_close(y.mean(1), torch.zeros(len(x)), tolerance(x), "mean")
    assert_close(y.var(1, correction=0), torch.ones(len(x)), tolerance(x), "variance")
    square = OF.rms_norm(x, x.shape[-1:], eps=0.0).double().square().mean(1)
    assert_close(square, torch.ones(len(x)), tolerance(x), "mean square of RMSNorm")


@QUICK
@given(rows())
def test_layer_norm_of_centred_rows_is_rms_norm(x):
    x = torch.cat([x, -x], 1)  # mean 0 without rounding
    size = x.shape[-1:]
    assert_close(OF.layer_norm(x, size, eps=1e-6), OF.rms_norm(x, size, eps=1e-6), tolerance(x), "mean 0")


@QUICK
@given(rows())
def test_gradient_of_x_is_orthogonal(x):
    """dx of LayerNorm sums to zero and is orthogonal to x̂, because y does not change along either direction."""
    x[:, 0] = x[:, 1] + 1
    x.requires_grad_()
    y = OF.layer_norm(x, x.shape[-1:], eps=0.0)
    (dx,) = torch.autograd.grad(y.sin().sum(), x)
    assert_close(dx.sum(1), torch.zeros(len(x)), tolerance(x), "sum of dx")
    assert_close((dx * y).mean(1), torch.zeros(len(x)), tolerance(x), "dx along y")


@QUICK
@given(rows(max_rows=40), st.permutations(range(6)))
def test_batch_norm_treats_channels_alike(x, order):
    """Permuting channels permutes the result; [1, C, L] is [L, C]."""
    x = torch.cat([x.flatten()] * 6)[: 6 * (x.numel() // 2 + 2)].view(-1, 6)
    x = x + torch.arange(len(x), dtype=x.dtype)[:, None]
    y = OF.batch_norm(x, None, None, training=True)
    order = list(order)
    assert_close(OF.batch_norm(x[:, order], None, None, training=True), y[:, order], tolerance(x), f"channels {order}")
    as_sequence = OF.batch_norm(x.t()[None], None, None, training=True)[0].t()
    assert_close(as_sequence, y, tolerance(x), "as [1, C, L]")


@QUICK
@given(rows(max_rows=30))
def test_batch_norm_is_layer_norm_of_the_transpose(x):
    x = torch.cat([x, x + 1])
    y = OF.batch_norm(x, None, None, training=True, eps=1e-3)
    assert_close(y, OF.layer_norm(x.t().contiguous(), (len(x),), eps=1e-3).t(), tolerance(x), "transpose")


# ---- dropout ---------------------------------------------------------------------------------------------------------


@QUICK
@given(SEEDS, RATES, st.integers(0, 600), st.integers(0, 600))
def test_mask_is_a_prefix_stable_function_of_seed_and_index(seed, p, n, more):
    """The first n elements are the same whatever follows, for every shape, packed or not."""
    mask = OF.dropout_mask((n + more,), p, seed)
    assert torch.equal(OF.dropout_mask((n,), p, seed), mask[:n])
    assert np.array_equal(mask.numpy(), philox.keep_mask((n + more,), p, seed))
    packed = OF.dropout_mask((n + more,), p, seed, packed=True)
    assert np.array_equal(packed.numpy(), philox.pack(mask.numpy()))
    if n:
        assert torch.equal(OF.dropout_mask((n, 3), p, seed).flatten(), OF.dropout_mask((3, n), p, seed).flatten())


@QUICK
@given(SEEDS, RATES, RATES, st.integers(1, 400))
def test_a_larger_rate_drops_more(seed, p, q, n):
    """The masks of one seed are nested: what a smaller rate drops, a larger one drops too."""
    low, high = sorted((p, q))
    assert not bool((OF.dropout_mask((n,), high, seed) & ~OF.dropout_mask((n,), low, seed)).any())


@QUICK
@given(SEEDS, st.floats(0, 0.99), st.integers(1, 300), st.booleans())
def test_dropout_is_a_choice_by_its_mask(seed, p, n, inverted):
    x = torch.linspace(1, 2, n)
    y = OF.dropout(x, p, seed=seed, inverted=inverted)
    mask = OF.dropout_mask((n,), p, seed)
    scale = torch.tensor(1 / (1 - p) if inverted else 1.0)
    assert bits(y) == bits(torch.where(mask, x * scale, 0.0))


@pytest.mark.parametrize("shape", [(2, 3, 4), (24,), (4, 6)], ids=str)
def test_the_shape_does_not_matter(shape):
    x = torch.arange(1.0, 25.0)
    assert bits(OF.dropout(x.view(shape), 0.5, seed=9)) == bits(OF.dropout(x, 0.5, seed=9))
