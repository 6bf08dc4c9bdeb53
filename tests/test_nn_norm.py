"""LayerNorm and RMSNorm: values and every gradient against float64, over shapes, dtypes, layouts and special values."""

import math

import pytest
import torch
from layers import AFFINE, NORMS, affine, as_numpy, assert_norm, gradients, leaf, weight_dtypes
from reference import norm
from support import assert_close, assert_same, bits

EVERY_NORM = pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
# Shapes, and how many last dimensions are normalised. Sizes around every vector width, one row, many rows.
SHAPES = [
    ((1,), 1),
    ((9,), 1),
    ((3, 1), 1),
    ((5, 2), 1),
    ((1, 7), 1),
    ((4, 16), 1),
    ((5, 33), 1),
    ((2, 3, 17), 1),
    ((2, 3, 4, 5), 2),
    ((2, 3, 5), 3),
    ((7, 64), 1),
    ((67, 12), 1),
    ((3, 515), 1),
]
EMPTY = [((0,), 1), ((0, 5), 1), ((3, 0), 1), ((2, 0, 4), 2), ((0, 0), 1)]


@pytest.mark.parametrize("affine_kind", AFFINE)
@EVERY_NORM
def test_values_and_gradients(kind, affine_kind, dtype, device):
    for weight_dtype in weight_dtypes(dtype):
        for shape, dims in SHAPES:
            normalized = shape[-dims:]
            x = (torch.randn(shape, device=device) * 2 + 0.5).to(dtype)
            weight, bias = affine(affine_kind, kind.has_bias, normalized, weight_dtype, device)
            assert_norm(kind, x, normalized, weight, bias, what=f"{shape} over {normalized}, weights {weight_dtype}")


@pytest.mark.parametrize("shape", [(2, 65537), (3, 40000), (5000, 40), (1500, 256)], ids=str)
@EVERY_NORM
def test_large(kind, shape, dtype, device):
    """Rows longer than any block, and more rows than blocks."""
    x = (torch.randn(shape, device=device) * 2 + 0.5).to(dtype)
    weight, bias = affine("weight and bias", kind.has_bias, shape[-1:], dtype, device)
    assert_norm(kind, x, shape[-1:], weight, bias, what=str(shape))


@pytest.mark.parametrize("affine_kind", AFFINE)
@EVERY_NORM
def test_empty(kind, affine_kind, dtype, device):
    """No rows, or empty rows: gradients of the weights are zero."""
    for shape, dims in EMPTY:
        x = leaf(torch.empty(shape, device=device, dtype=dtype))
        weight, bias = map(leaf, affine(affine_kind, kind.has_bias, shape[-dims:], dtype, device))
        y = kind(x, shape[-dims:], weight, bias)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        for gradient in gradients(y, (x, weight, bias), torch.empty_like(y))[1:]:
            assert gradient is None or not gradient.any(), f"{shape}: expected zeros, came {gradient}"


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 2.0])
@EVERY_NORM
def test_eps(kind, eps, device):
    x = torch.randn(5, 20, device=device, dtype=torch.float64) * 0.1
    assert_norm(kind, x, (20,), eps=eps, what=f"eps={eps}")


def test_rms_norm_default_eps_is_float32s(device):
    """Also for 16-bit inputs, whose own eps is far larger; float64's for float64."""
    for dtype, eps in (
        (torch.bfloat16, 2.0**-23),
        (torch.float16, 2.0**-23),
        (torch.float32, 2.0**-23),
        (torch.float64, 2.0**-52),
    ):
        x = torch.full((1, 4), math.sqrt(eps), device=device, dtype=dtype)  # then x² = eps up to the rounding of x
        expected = float(x[0, 0].double() / (x[0, 0].double() ** 2 + eps).sqrt())
        for came in (NORMS["rms_norm"](x, (4,)), NORMS["rms_norm"].ours(x, (4,), eps=None)):
            assert_close(came, torch.full((1, 4), expected), 0.0, str(dtype), 2**-8 if dtype.itemsize == 2 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [((), (2, 6)), ((2, 6), ()), (None, ())], ids=str)
def test_one_of_weight_and_bias_is_scalar(shapes, dtype, device):
    x = torch.randn(4, 2, 6, device=device).to(dtype)
    weight, bias = (None if shape is None else torch.randn(shape, device=device).to(dtype) for shape in shapes)
    assert_norm(NORMS["layer_norm"], x, (2, 6), weight, bias, what=f"weight and bias of {shapes}")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_accepts_weights_of_any_dtype(weight_dtype, dtype, device):
    """The result has x's dtype, the weight's gradient that of the weight."""
    x = torch.randn(4, 20, device=device).to(dtype)
    weight, _ = affine("weight", False, (20,), weight_dtype, device)
    assert_norm(NORMS["rms_norm"], x, (20,), weight, what=f"{weight_dtype} weight")


# ---- which gradients are asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("affine_kind", ["weight and bias", "scalar"])
@EVERY_NORM
def test_every_subset_of_gradients(kind, affine_kind, device):
    """A gradient does not depend on which others are wanted, and y does not depend on whether any is."""
    values = torch.randn(6, 37, device=device), *affine(affine_kind, kind.has_bias, (37,), torch.float32, device)
    dy = torch.randn(6, 37, device=device)
    everything = [leaf(v) for v in values]
    y = kind(everything[0], (37,), *everything[1:])
    expected = gradients(y, everything, dy)
    for subset in range(8):
        inputs = [leaf(v) if subset >> i & 1 else v for i, v in enumerate(values)]
        came = kind(inputs[0], (37,), *inputs[1:])
        assert bits(came) == bits(y), f"y changes with the gradients wanted, {subset:03b}"
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        assert came.requires_grad == bool(wanted)
        if wanted:
            came.backward(dy)
        for i, t in enumerate(inputs):
            if t is not None and t.requires_grad:
                assert_close(t.grad, expected[i], 1e-6, f"gradient {i} of subset {subset:03b}")
    with torch.no_grad():
        assert bits(kind(everything[0], (37,), *everything[1:])) == bits(y)


@EVERY_NORM
def test_gradient_of_a_second_backward(kind, device):
    """retain_graph: the saved tensors survive, and a change of x or of a weight in between is detected."""
    for changed in (0, 1):
        x, weight = leaf(torch.randn(3, 8, device=device)), leaf(torch.ones(8, device=device))
        y = kind(x, (8,), weight)
        first, second = (torch.autograd.grad(y.sin().sum(), (x, weight), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with torch.no_grad():
            (x, weight)[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "rows of a wider array": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second row": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "offset by one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "reversed": lambda x: x.flip(0).flip(0),
    "negated view": lambda x: torch.complex(x, -x).conj().imag,
    "dense negated view": lambda x: torch._neg_view(-x),
}


def in_layout(layout: str, x: torch.Tensor) -> torch.Tensor:
    if layout == "negated view" and x.dtype not in (torch.float32, torch.float64):
        pytest.skip("complex numbers have no 16-bit parts here")
    view = LAYOUTS[layout](x)
    assert torch.equal(view, x)
    return view


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_NORM
def test_layouts(kind, layout, dtype, device):
    """x, dy and the weights in memory of any order and alignment."""
    for size in (5, 40):
        x, dy = (in_layout(layout, torch.randn(6, size, device=device).to(dtype)) for _ in range(2))
        weight, bias = affine("weight and bias", kind.has_bias, (size,), dtype, device)
        assert_norm(kind, x, (size,), weight, bias, dy, what=f"{layout}, {size}")
        shifted = [t if t is None else torch.cat([t[:1], t])[1:] for t in (weight, bias)]
        strided = [t if t is None else torch.stack([t, t], -1)[:, 0] for t in (weight, bias)]
        for weights in (shifted, strided):
            assert_norm(kind, x, (size,), *weights, what=f"{layout}, {size}, weights misaligned or strided")


@EVERY_NORM
def test_expanded(kind, device):
    """Strides of 0: in x, in dy (as sum().backward() makes it) and in the weight."""
    x = torch.randn(1, 9, device=device).expand(4, 9)
    assert_norm(kind, x, (9,), what="expanded rows")
    x = torch.randn(4, 9, device=device)
    weight = torch.full((), 0.7, device=device).expand(9)
    assert_norm(kind, x, (9,), weight, dy=torch.ones((), device=device).expand(4, 9), what="expanded dy and weight")


@EVERY_NORM
def test_channels_last(kind, device):
    """Normalised over [C, H, W] of a channels_last tensor."""
    x = torch.randn(3, 4, 5, 6, device=device).to(memory_format=torch.channels_last)
    weight, bias = affine("weight and bias", kind.has_bias, (4, 5, 6), torch.float32, device)
    assert_norm(kind, x, (4, 5, 6), weight, bias, dy=torch.randn_like(x), what="channels_last")


class Subclass(torch.Tensor):
    """A subclass that changes nothing."""


@EVERY_NORM
def test_subclasses(kind, device):
    """A Parameter is the usual weight; another subclass gives the same numbers and is preserved."""
    x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    expected = kind(x, (8,), weight)
    assert bits(kind(x, (8,), torch.nn.Parameter(weight))) == bits(expected)
    for operands in ((x.as_subclass(Subclass), weight), (x, weight.as_subclass(Subclass))):
        y = kind(operands[0], (8,), operands[1])
        assert type(y) is Subclass, f"came {type(y)}"
        assert bits(y) == bits(expected)


@EVERY_NORM
def test_inputs_are_only_read(kind, dtype, device):
    x, dy = (torch.randn(2, 5, 12, device=device).to(dtype) for _ in range(2))
    weight, bias = affine("weight and bias", kind.has_bias, (12,), dtype, device)
    inputs = {k: t for k, t in {"x": x, "weight": weight, "bias": bias, "dy": dy}.items() if t is not None}
    before = {key: bits(t) for key, t in inputs.items()}
    assert_norm(kind, x, (12,), weight, bias, dy, what="")
    assert_same({key: bits(t) for key, t in inputs.items()}, before, "inputs")


# ---- values that are not ordinary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 33, 1027])
@EVERY_NORM
def test_nan_and_inf_stay_in_their_row(kind, size, dtype, device):
    """As in the formula: NaN in the whole row, or zeros beside an Inf in RMSNorm. Other rows are unaffected."""
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, size // 2, size - 1):
            x = torch.randn(4, size, device=device).to(dtype)
            x[2, place] = bad
            assert_norm(kind, x, (size,), what=f"{bad} at {place} of {size}")
            y = kind(x, (size,))
            assert bool(y[[0, 1, 3]].isfinite().all()), f"{bad} reached other rows: {y}"


@EVERY_NORM
def test_nan_in_the_gradient(kind, device):
    """A NaN in dy reaches the whole row of dx and its column of dweight and dbias, and nothing else."""
    x, weight, bias = (
        torch.randn(4, 20, device=device),
        *affine("weight and bias", kind.has_bias, (20,), torch.float32, device),
    )
    dy = torch.randn(4, 20, device=device)
    dy[1, 3] = math.nan
    assert_norm(kind, x, (20,), weight, bias, dy, what="NaN in dy")


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e15, 1e18])
@EVERY_NORM
def test_magnitudes(kind, magnitude, device):
    """Values whose squares are large but fit in float32, and values whose squares do not."""
    x = torch.randn(4, 50, device=device) * magnitude
    y = kind(x, (50,))
    expected = kind.forward(*as_numpy(x, None, None), kind.eps(x.dtype))
    assert_close(y / y.abs().max(), expected / abs(expected).max(), 4e-6, f"values around {magnitude}")


@EVERY_NORM
def test_sixteen_bits_do_not_overflow(kind, device):
    """65504² does not fit in float16: squares and sums are float32."""
    x = (torch.rand(3, 700, device=device) * 100 + 65400).half()
    x[:, ::2] *= -1
    assert_norm(kind, x, (700,), what="values near the largest")


@pytest.mark.parametrize("negated", ["weight", "bias"])
def test_negated_weights(negated, device):
    """Dense views with the negative bit set."""
    x, weight, bias = torch.randn(5, 8, device=device), torch.randn(8, device=device), torch.randn(8, device=device)
    operands = {"weight": weight, "bias": bias}
    expected = NORMS["layer_norm"](x, (8,), **operands)
    operands[negated] = torch._neg_view(-operands[negated])
    assert torch.equal(NORMS["layer_norm"](x, (8,), **operands), expected)


@pytest.mark.parametrize("rows", [6, 3000], ids=["statistics recomputed", "statistics kept"])
def test_saved_tensors_in_another_layout(rows, device):
    """A hook may return the saved tensors with other strides."""
    x, weight = leaf(torch.randn(rows, 8, device=device)), leaf(torch.randn(8, device=device))
    dy = torch.randn(rows, 8, device=device)
    expected = gradients(NORMS["layer_norm"](x, (8,), weight), (x, weight), dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t() if t.dim() > 1 else t):
        came = gradients(NORMS["layer_norm"](x, (8,), weight), (x, weight), dy)
    for name, value, like in zip(("x", "weight"), came, expected, strict=True):
        assert torch.equal(value, like), f"gradient of {name}"


@pytest.mark.parametrize("size", [64, 1000, 5003])
def test_statistics_survive_a_large_mean(size, dtype, device):
    """x = 1e4 + noise of 1e-2: y and the gradients have three digits; with E[x²] - E[x]² they would have none, with a
    float32 mean one."""
    if dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the noise is smaller than a unit in the last place")
    x = leaf((1e4 + 1e-2 * torch.randn(6, size, device=device, dtype=torch.float64)).to(dtype))
    weight, bias = map(leaf, affine("weight and bias", True, (size,), dtype, device))
    dy = torch.randn_like(x)
    y = NORMS["layer_norm"](x, (size,), weight, bias, eps=1e-12)
    assert_close(y, norm.layer_norm(*as_numpy(x, weight, bias), 1e-12), 5e-4, "y")
    came = gradients(y, (x, weight, bias), dy)
    expected = norm.layer_norm_backward(*as_numpy(dy, x, weight, bias), 1e-12)
    for name, value in zip(("x", "weight", "bias"), came, strict=True):
        like = getattr(expected, name)
        assert_close(value / abs(like).max(), like / abs(like).max(), 5e-4, f"gradient of {name}")


@EVERY_NORM
def test_constant_rows(kind, dtype, device):
    """Without variance the divisor is sqrt(eps)."""
    x = torch.tensor([[3.0], [0.0], [-7.0]], device=device).expand(3, 33).to(dtype)
    weight, bias = affine("weight and bias", kind.has_bias, (33,), dtype, device)
    assert_norm(kind, x, (33,), weight, bias, what="constant rows")
