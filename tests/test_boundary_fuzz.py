"""Random shapes, strides, dtypes and lists: layers and steps equal torch in float64, and nothing crashes."""

import onepass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onepass.nn import functional as OF
from rules import RULES
from support import ARITHMETIC, DTYPES, arithmetic_dtype, assert_close, rounding
from torch.nn import functional as F

FUZZ = settings(max_examples=120, deadline=None, derandomize=True)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


@st.composite
def laid_out(draw, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values around 1 in dense, strided, offset or broadcast memory."""
    layout = draw(st.sampled_from(("contiguous", "offset", "strided", "permuted", "expanded")))
    values = (
        torch.rand(shape, generator=torch.Generator().manual_seed(draw(seeds)), dtype=torch.float64).add(0.5).to(dtype)
    )
    if layout == "offset":
        return torch.empty(values.numel() + 3, dtype=dtype)[3:].view(shape).copy_(values)
    if layout == "strided":
        return torch.stack((values, values), -1)[..., 1]
    if layout == "permuted":
        order = draw(st.permutations(range(len(shape))))
        back = sorted(range(len(shape)), key=order.__getitem__)
        return values.permute(order).contiguous().permute(back)
    if layout == "expanded" and shape and shape[0] > 1:
        return values[:1].expand(shape)
    return values


def tolerance(dtype: torch.dtype, terms: int, factor: float = 50.0) -> float:
    return ARITHMETIC[arithmetic_dtype(dtype)] * factor * max(1, terms) ** 0.5


def leaf(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    detached = tensor.detach()
    return (detached if dtype is None else detached.to(dtype)).requires_grad_()


def assert_layer(ours, theirs, operands: list[torch.Tensor], what: str) -> None:
    """Compare values and gradients with torch in float64 on the same (rounded) operands."""
    mine = [leaf(t) for t in operands]
    # Contiguous, because the backward of torch's batch_norm reads a strided weight as if it were contiguous (seen in 2.13).
    wide = [leaf(t.contiguous(), torch.float64) for t in operands]
    y, expected = ours(*mine), theirs(*wide)
    dy = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).sub(0.5).to(y.dtype)
    dtype = operands[0].dtype
    few = tolerance(dtype, y.numel())
    assert_close(y, expected, few, f"y of {what}", 2 * rounding(dtype))
    for i, (a, b) in enumerate(
        zip(torch.autograd.grad(y, mine, dy), torch.autograd.grad(expected, wide, dy.double()), strict=True)
    ):
        # A gradient is a difference of larger numbers, so a rounding error may be larger than the result.
        assert_close(a, b, few + 4 * rounding(dtype), f"gradient {i} of {what}", 2 * rounding(dtype))


@FUZZ
@given(st.data(), dtypes, st.lists(st.integers(0, 5), max_size=3), st.lists(st.integers(1, 40), min_size=1, max_size=2))
def test_norms(data, dtype, batch, row):
    shape = (*batch, *row)
    operands = [data.draw(laid_out(shape, dtype)), *(data.draw(laid_out(tuple(row), dtype)) for _ in range(2))]
    eps = 0.1  # rows of one element, or of equal elements, have no variance
    assert_layer(
        lambda x, w, b: OF.layer_norm(x, row, w, b, eps),
        lambda x, w, b: F.layer_norm(x, row, w, b, eps),
        operands,
        f"{shape}",
    )
    assert_layer(
        lambda x, w: OF.rms_norm(x, row, w, eps), lambda x, w: F.rms_norm(x, row, w, eps), operands[:2], f"{shape}"
    )


@FUZZ
@given(st.data(), dtypes, st.integers(2, 6), st.integers(1, 9), st.lists(st.integers(1, 4), max_size=3), st.booleans())
def test_batch_norm(data, dtype, batch, channels, space, training):
    shape = (batch, channels, *space)
    operands = [data.draw(laid_out(shape, dtype)), *(data.draw(laid_out((channels,), dtype)) for _ in range(2))]
    running = [data.draw(laid_out((channels,), dtype)).clone() for _ in range(2)]
    wide = [t.double() for t in running]
    assert_layer(
        lambda x, w, b: OF.batch_norm(x, *running, w, b, training, 0.2, 0.1),
        lambda x, w, b: F.batch_norm(x, *wide, w, b, training, 0.2, 0.1),
        operands,
        f"{shape}, training={training}",
    )
    for came, expected in zip(running, wide, strict=True):
        assert_close(came, expected, tolerance(dtype, 1), "running statistics", 2 * rounding(dtype))


@FUZZ
@given(st.data(), dtypes, st.lists(st.integers(0, 17), max_size=4), st.floats(0, 1), st.integers(-(2**63), 2**63 - 1))
def test_dropout(data, dtype, shape, p, seed):
    """Only the mask decides what is kept; the strides of the input have no influence."""
    x = data.draw(laid_out(tuple(shape), dtype))
    keep = OF.dropout_mask(shape, p, seed)
    scale = 1 / (1 - p) if p < 1 else 0.0
    if scale < 1e4:  # the range of float16 is small
        assert_layer(
            lambda x: OF.dropout(x, p, seed=seed), lambda x: torch.where(keep, x * scale, 0), [x], f"{shape}, {p}"
        )


shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=12)


@FUZZ
@given(st.data(), st.sampled_from(sorted(RULES)), st.lists(st.tuples(dtypes, st.integers(0, 3)), max_size=8), shapes)
def test_steps(data, name, kinds, sizes):
    """Lists of any length, with mixed dtypes; some parameters have no gradient. The rules' tests cover 16 bits."""
    params, twins = [], []
    for (dtype, gradient), shape in zip(kinds, sizes, strict=False):
        dtype = arithmetic_dtype(dtype)
        value = data.draw(laid_out(shape, dtype))
        value = value.clone() if 0 in value.stride() else value
        params.append(torch.nn.Parameter(value))
        twins.append(torch.nn.Parameter(value.detach().double().clone()))
        if gradient:
            params[-1].grad = data.draw(laid_out(shape, dtype))
            twins[-1].grad = params[-1].grad.clone().double()
    if not params:
        return
    rule = RULES[name]
    ours, theirs = rule.ours(params, **rule.usual), rule.theirs(twins, **rule.usual)
    for _ in range(2):
        ours.step()
        theirs.step()
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        assert_close(p, q, 1e-5 if p.dtype == torch.float32 else 1e-12, f"parameter {i} of shape {tuple(p.shape)}")


@FUZZ
@given(st.data(), dtypes, shapes, st.sampled_from((1.0, 2.0, 3.0, float("inf"))), st.floats(0.01, 10))
def test_clip(data, dtype, sizes, norm_type, limit):
    params, twins = [], []
    for shape in sizes:
        gradient = data.draw(laid_out(shape, dtype))
        gradient = gradient.clone() if 0 in gradient.stride() else gradient
        for group, grad in ((params, gradient), (twins, gradient.clone().double())):
            group.append(torch.nn.Parameter(torch.empty_like(grad)))
            group[-1].grad = grad
    if norm_type == float("inf") and not all(p.numel() for p in params):
        return  # torch does not define this norm for an empty tensor
    came = onepass.optim.clip_grad_norm_(params, limit, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(twins, limit, norm_type)
    assert_close(came, expected.to(came.dtype), 1e-5, "norm", 2 * rounding(came.dtype))
    for p, q in zip(params, twins, strict=True):
        assert_close(p.grad, q.grad, 1e-5, "gradient", 2 * rounding(dtype))


@pytest.mark.parametrize("count", [0, 1, 3000])
def test_long_lists(count):
    """More tensors than fit in one launch."""
    params = [torch.nn.Parameter(torch.full((i % 5,), 1.0)) for i in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    if params:
        onepass.optim.SGD(params, lr=0.25).step()
    norm = onepass.optim.clip_grad_norm_(params, 1.0)
    assert all(bool((p == 0.75).all()) for p in params)
    assert_close(norm, torch.tensor(float(sum(p.numel() for p in params)) ** 0.5), 1e-6, "norm")


EMPTY = {
    "plain": lambda: torch.empty(0, 2),
    "offset": lambda: torch.empty(3)[3:].view(0, 2),
    "strided": lambda: torch.empty(0, 4)[:, ::2],
    "any strides": lambda: torch.empty(0).as_strided((0, 2), (7, 0)),
}
EMPTY |= {f"{name}, 1-d": lambda make=make: make()[:, 0] for name, make in EMPTY.items()}


@pytest.mark.parametrize("gradient", EMPTY)
@pytest.mark.parametrize("parameter", EMPTY)
def test_empty_tensors_have_any_strides(parameter, gradient):
    """Beside parameters that have something to update."""
    empty, grad = EMPTY[parameter](), EMPTY[gradient]()
    if empty.shape != grad.shape:
        return
    params = [torch.nn.Parameter(t) for t in (torch.ones(3), empty, torch.ones(()))]
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad = grad
    for kind in (onepass.optim.SGD, onepass.optim.Adagrad, onepass.optim.Adam):
        before = params[0].detach().clone()
        kind(params, lr=0.25).step()
        assert bool((params[0] < before).all())
    onepass.optim.clip_grad_norm_(params, 1.0)
