"""dropout_add_layer_norm and dropout_add_rms_norm: sum = residual + dropout(x) and its norm, in one pass."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from layers import NORMS, Norm, affine, amplification, as_numpy, assert_close_to, gradients, leaf, weight_dtypes
from onepass.nn import functional as OF
from reference import dropout
from support import assert_close, assert_same, bits, rounding, to_numpy


@dataclass(frozen=True)
class Fused:
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    norm: Norm

    def __call__(self, x, residual, weight=None, bias=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
        weights = {"weight": weight, "bias": bias} if self.norm.has_bias else {"weight": weight}
        return self.function(x, residual, x.shape[-1:], **weights, **options)


FUSED = {
    "dropout_add_layer_norm": Fused(OF.dropout_add_layer_norm, NORMS["layer_norm"]),
    "dropout_add_rms_norm": Fused(OF.dropout_add_rms_norm, NORMS["rms_norm"]),
}
EVERY_FUSED = pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED)
SHAPES = [(1, 1), (3, 7), (4, 16), (2, 5, 33), (67, 12), (2, 515)]


def assert_fused(fused, x, residual, weight=None, bias=None, dy=None, dsum=None, what="", **options) -> None:
    """Compare both results and every gradient. y is the norm of the returned sum, which is rounded in 16 bits."""
    inputs = [leaf(t) for t in (x, residual, weight, bias)]
    y, total = fused(*inputs, **options)
    for tensor in (y, total):
        assert (tensor.dtype, tensor.shape) == (x.dtype, x.shape)
    size = x.shape[-1]
    rows = (x.numel() // size, size)
    drop = {key: options[key] for key in ("training", "inverted") if key in options}
    p, seed = options.get("p", 0.5), options.get("seed")
    dropped = dropout.dropout(to_numpy(x), p, seed, **drop)
    assert_close_to(total, to_numpy(residual) + dropped, 1.0, f"sum of {what}")

    s = to_numpy(total).reshape(rows)
    w, b = as_numpy(weight, bias)
    eps = options.get("eps", fused.norm.eps(x.dtype))
    factor = amplification(s.var(axis=1) if fused.norm.has_bias else np.square(s).mean(axis=1), eps)
    assert_close_to(y, fused.norm.forward(s, w, b, eps), factor, f"y of {what}")

    dy = torch.randn_like(y) if dy is None else dy
    outputs, grads = ([y, total], [dy, dsum]) if dsum is not None else ([y], [dy])
    there = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(outputs, there, grads))
    dx, dresidual, dweight, dbias = (None if t is None else next(found) for t in inputs)
    expected = fused.norm.backward(to_numpy(dy).reshape(rows), s, w, b, eps)
    ds = expected.x.reshape(x.shape) + (0.0 if dsum is None else to_numpy(dsum))
    assert_close_to(dresidual, ds, factor, f"gradient of the residual of {what}")
    scale = 1.0 if p == 1 else max(1.0, dropout.scale(p, drop.get("inverted", True)))
    dx_expected = dropout.dropout_backward(ds, p, seed, **drop)
    assert_close_to(dx, dx_expected, factor * scale, f"gradient of x of {what}")
    for name, gradient, value, parameter in (
        ("weight", dweight, expected.weight, weight),
        ("bias", dbias, expected.bias, bias),
    ):
        if parameter is not None:
            terms = rows[0] * (size if parameter.dim() == 0 else 1)
            assert gradient.dtype == parameter.dtype
            assert_close_to(gradient, value, factor * terms**0.5, f"gradient of {name} of {what}", x.dtype)


@pytest.mark.parametrize("kind", ["none", "weight", "weight and bias", "scalar"])
@EVERY_FUSED
def test_values_and_gradients(fused, kind, dtype, device):
    for weight_dtype in weight_dtypes(dtype):
        for seed, shape in enumerate(SHAPES):
            x, residual, dsum = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
            weight, bias = affine(kind, fused.norm.has_bias, shape[-1:], weight_dtype, device)
            for more in ({}, {"dsum": dsum}):
                assert_fused(
                    fused, x, residual, weight, bias, p=0.3, seed=seed, eps=1e-3, what=f"{shape} {weight_dtype}", **more
                )


@pytest.mark.parametrize(
    "options",
    [
        {"p": 0.0},
        {"p": 1.0, "seed": 3},
        {"p": 0.9, "seed": 3},
        {"p": 0.4, "seed": 3, "inverted": False},
        {"p": 0.4, "training": False},
        {"p": 0.0, "inverted": False, "training": False},
        {"seed": -5},
        {"seed": 1, "eps": 2.0},
    ],
    ids=str,
)
@EVERY_FUSED
def test_options(fused, options, dtype, device):
    x, residual, dsum = (torch.randn(6, 20, device=device).to(dtype) for _ in range(3))
    weight, bias = affine("weight and bias", fused.norm.has_bias, (20,), dtype, device)
    assert_fused(fused, x, residual, weight, bias, dsum=dsum, what=str(options), **options)


@EVERY_FUSED
def test_the_papers_form_in_evaluation(fused, dtype, device):
    x, residual = (torch.randn(6, 20, device=device).to(dtype) for _ in range(2))
    y, total = fused(x, residual, p=0.25, training=False, inverted=False)
    assert_close(total, to_numpy(residual) + 0.75 * to_numpy(x), 4e-6 + 2 * rounding(dtype), "sum")
    assert_close(y, fused.norm(total, (20,)), 4e-6, "y", 2 * rounding(dtype))


@pytest.mark.parametrize("shape", [(2, 65537), (3000, 67)], ids=str)
@EVERY_FUSED
def test_large(fused, shape, dtype, device):
    x, residual, dsum = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight, bias = affine("weight and bias", fused.norm.has_bias, shape[-1:], dtype, device)
    assert_fused(fused, x, residual, weight, bias, dsum=dsum, p=0.1, seed=2**40, what=str(shape))


@EVERY_FUSED
def test_equals_the_three_calls(fused, device):
    """The mask of dropout with the same seed, the same numbers, gradients that add up; also with a drawn seed."""
    x, residual = (torch.randn(5, 40, device=device, dtype=torch.float64) for _ in range(2))
    weight, bias = affine("weight and bias", fused.norm.has_bias, (40,), torch.float64, device)
    for seed in (None, 7):
        results = []
        for apart in (False, True):
            inputs = [leaf(t) for t in (x, residual, weight, bias)]
            torch.manual_seed(3)
            if apart:
                total = inputs[1] + OF.dropout(inputs[0], 0.3, seed=seed)
                y = fused.norm(total, (40,), *inputs[2:])
            else:
                y, total = fused(*inputs, p=0.3, seed=seed)
            results.append([y, total, *gradients(y.sin() + total.cos(), inputs, torch.ones_like(y))])
        for i, (came, expected) in enumerate(zip(*results, strict=True)):
            if expected is not None:
                assert_close(came, expected, 1e-12, f"result {i}, seed {seed}")


@EVERY_FUSED
def test_only_one_result_is_used(fused, device):
    """Only y or only the sum is used: the other's gradient is None."""
    x, residual = (torch.randn(5, 12, device=device) for _ in range(2))
    weight, bias = affine("weight and bias", fused.norm.has_bias, (12,), torch.float32, device)
    inputs = [leaf(t) for t in (x, residual, weight, bias)]
    total = fused(*inputs, p=0.3, seed=1)[1]
    dsum = torch.randn_like(total)
    dx, dresidual = torch.autograd.grad(total, inputs[:2], dsum)
    assert bits(dresidual) == bits(dsum)
    assert_close(dx, dropout.dropout(to_numpy(dsum), 0.3, 1), 1e-6, "gradient of x through the sum alone")
    total = fused(*inputs, p=0.3, seed=1)[1]
    for parameter in (t for t in inputs[2:] if t is not None):
        (gradient,) = torch.autograd.grad(total.sum(), parameter, retain_graph=True, allow_unused=True)
        assert gradient is None or not gradient.any()


@EVERY_FUSED
def test_every_subset_of_gradients(fused, device):
    x, residual, dy, dsum = (torch.randn(5, 12, device=device) for _ in range(4))
    values = x, residual, *affine("weight and bias", fused.norm.has_bias, (12,), torch.float32, device)
    everything = [leaf(v) for v in values]
    outputs = fused(*everything, p=0.3, seed=1)
    there = [t for t in everything if t is not None]
    expected = dict(zip(map(id, there), torch.autograd.grad(outputs, there, (dy, dsum)), strict=True))
    for subset in range(16):
        inputs = [leaf(v) if subset >> i & 1 else v for i, v in enumerate(values)]
        came = fused(*inputs, p=0.3, seed=1)
        assert [bits(t) for t in came] == [bits(t) for t in outputs], f"{subset:04b} changes the results"
        if not any(t is not None and t.requires_grad for t in inputs):
            continue
        torch.autograd.backward(
            [t for t in came if t.requires_grad], [g for t, g in zip(came, (dy, dsum), strict=True) if t.requires_grad]
        )
        for i, t in enumerate(inputs):
            if t is not None and t.requires_grad:
                assert_close(t.grad, expected[id(everything[i])], 1e-6, f"gradient {i} of subset {subset:04b}")


@EVERY_FUSED
def test_strides_and_reading_only(fused, dtype, device):
    """Operands in memory of any order; none is written."""
    x, residual, dy, dsum = (torch.randn(40, 6, device=device).to(dtype).t() for _ in range(4))
    weight, bias = affine("weight and bias", fused.norm.has_bias, (40,), dtype, device)
    tensors = {"x": x, "residual": residual, "dy": dy, "dsum": dsum}
    before = {key: bits(t) for key, t in tensors.items()}
    assert_fused(fused, **tensors, weight=weight, bias=bias, p=0.3, seed=4, what="transposed")
    assert_same({key: bits(t) for key, t in tensors.items()}, before, "operands")
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, residual)]
    assert_fused(fused, *shifted, dy=dy, dsum=dsum, p=0.3, seed=4, what="misaligned")
    assert_fused(fused, x, x, dy=dy, dsum=dsum, p=0.3, seed=4, what="x is the residual")


@EVERY_FUSED
def test_a_dropped_nan_is_gone(fused, device):
    x, residual = torch.full((4, 30), float("nan"), device=device), torch.randn(4, 30, device=device)
    y, total = fused(x, residual, p=1.0)
    assert torch.equal(total, residual)
    assert bool(y.isfinite().all())


@EVERY_FUSED
def test_empty(fused, dtype, device):
    for shape in ((0, 4), (2, 0, 3)):
        inputs = [leaf(torch.empty(shape, device=device, dtype=dtype)) for _ in range(2)]
        weight, bias = map(leaf, affine("weight and bias", fused.norm.has_bias, shape[-1:], dtype, device))
        y, total = fused(*inputs, weight, bias)
        assert (y.shape, total.shape) == (shape, shape)
        torch.autograd.backward([y.sum() + total.sum()])
        assert inputs[0].grad.shape == shape
        assert not weight.grad.any()


@EVERY_FUSED
def test_what_is_kept_for_backward(fused, device):
    """The sum, three numbers per row, the weight and at most one bit per element."""
    x, residual = (leaf(torch.randn(64, 128, device=device)) for _ in range(2))
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, total = fused(x, residual, torch.ones(128, device=device), p=0.5)
    assert sum(kept.values()) <= 4 * x.numel() + x.numel() // 8 + 64 * 12 + 128 * 4 + 64, kept
    (y.sum() + total.sum()).backward()


@EVERY_FUSED
def test_refuses(fused):
    x = torch.ones(3, 4)
    state = bits(torch.get_rng_state())
    for residual, options, error in (
        (torch.ones(3, 5), {}, RuntimeError),
        (torch.ones(1, 4), {}, RuntimeError),
        (x.to("meta"), {}, RuntimeError),
        (x, {"p": 1.5}, ValueError),
        (x, {"p": -0.5, "training": False}, ValueError),
        (x, {"weight": torch.ones(3)}, RuntimeError),
        (x, {"seed": 1, "generator": torch.Generator()}, (ValueError, RuntimeError)),
        ([1.0], {}, TypeError),
    ):
        with pytest.raises(error):
            fused(x, residual, **options)
    with pytest.raises(NotImplementedError):
        fused(x.int(), x.int())
    assert bits(torch.get_rng_state()) == state, "a seed was drawn before the error"
