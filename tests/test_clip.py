"""clip_grad_norm_ and clip_grad_value_: torch.nn.utils' results, return values, warnings and errors."""

import math

import onepass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, assert_only_view_written, in_layout
from onepass.optim import clip_grad_norm_, clip_grad_value_
from reference import clip
from support import HALF, assert_close, assert_same, bits, parameter, rounding, to_numpy

NORMS = [0.5, 1, 2, 3, math.inf, -math.inf, 0, -1]
SHAPES = [(7,), (), (33, 31), (1,), (5000,)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def with_grads(shapes, dtype=torch.float32, device="cpu", scale=1.0) -> list[torch.nn.Parameter]:
    params = [parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, device=device) * scale).to(dtype)
    return params


def twins(params) -> list[torch.nn.Parameter]:
    copies = [parameter(p.detach().clone()) for p in params]
    for copy, p in zip(copies, params, strict=True):
        copy.grad = None if p.grad is None else p.grad.clone()
    return copies


def grads_of(params) -> dict[str, bytes]:
    return {f"gradient {i}": bits(p.grad) for i, p in enumerate(params)}


@pytest.mark.parametrize("max_norm", [0.1, 1e6, 0.0])
@pytest.mark.parametrize("p", NORMS)
def test_norm_against_the_reference(p, max_norm, dtype, device):
    """Every dtype, clipped and not: the norm of the exact gradients, and one rounding of the scaled ones."""
    params = with_grads(SHAPES if p != 0.5 else SHAPES[:2], dtype, device)  # with many elements it overflows float16
    norm, expected = clip.clip_grad_norm([to_numpy(q.grad) for q in params], max_norm, p)
    came = clip_grad_norm_(params, max_norm, p)
    assert came.shape == (), f"the norm should be 0-d, came {came!r}"
    # The other norms are compared with torch, which also rounds the norms of single tensors and the factor to 16 bits.
    roundings = rounding(dtype) if p == 2 else 4 * rounding(dtype)
    assert_close(came.double() / norm, torch.tensor(1.0), 10 * TOLERANCE[dtype], f"{p}-norm", roundings)
    for i, (q, g) in enumerate(zip(params, expected, strict=True)):
        assert_close(q.grad, g, TOLERANCE[dtype], f"gradient {i}, {p}-norm", roundings)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("p", NORMS)
def test_norm_like_torch(p, foreach, device):
    params = with_grads(SHAPES, device=device)
    copies = twins(params)
    came = clip_grad_norm_(params, 0.1, p, False, foreach)
    expected = torch.nn.utils.clip_grad_norm_(copies, 0.1, p, False, foreach)
    assert came.dtype == expected.dtype
    assert_close(came / expected, torch.tensor(1.0), 2e-4 if p == 0.5 else 1e-5, f"{p}-norm")
    for q, copy in zip(params, copies, strict=True):
        assert_close(q.grad, copy.grad, 1e-5, f"gradient, {p}-norm")


def test_small_norms(device):
    """A norm of 2e-6 shows the 1e-6 that is added to it."""
    p = parameter(torch.zeros(4, device=device))
    p.grad = torch.full_like(p, 1e-6)
    clip_grad_norm_([p], 1e-6)
    assert_close(p.grad * 1e6, torch.full((4,), 1 / 3), 1e-6, "gradient, a million times")


def test_below_the_limit_nothing_changes(device):
    for dtype in (torch.float32, torch.bfloat16):
        params = with_grads(SHAPES, dtype, device)
        before = grads_of(params)
        clip_grad_norm_(params, 1e6)
        assert_same(grads_of(params), before, "gradients below max_norm")


@pytest.mark.parametrize(
    "collection", [list, tuple, iter, lambda ps: (p for p in ps)], ids=["list", "tuple", "iter", "gen"]
)
def test_collections(collection):
    params, grad = with_grads([(3,), (4,)]), None
    params.append(parameter(torch.zeros(2)))
    copies = twins(params)
    came = clip_grad_norm_(collection(params), 0.1)
    expected = torch.nn.utils.clip_grad_norm_(copies, 0.1)
    assert_close(came, expected, 1e-6, "norm")
    clip_grad_value_(collection(params), 0.01)
    torch.nn.utils.clip_grad_value_(copies, 0.01)
    for p, copy in zip(params[:2], copies, strict=False):
        assert_close(p.grad, copy.grad, 1e-7, "gradient")
    assert params[2].grad is grad


def test_one_tensor():
    (p,) = with_grads([(9,)])
    (copy,) = twins([p])
    assert_close(clip_grad_norm_(p, 0.1), torch.nn.utils.clip_grad_norm_(copy, 0.1), 1e-6, "norm")
    clip_grad_value_(p, 0.01)
    torch.nn.utils.clip_grad_value_(copy, 0.01)
    assert_close(p.grad, copy.grad, 1e-7, "gradient")


def test_nothing_to_clip():
    """An empty list and parameters without gradients give 0. An empty generator gives torch's warning."""
    for params in ([], [parameter(torch.zeros(3))]):
        norm = clip_grad_norm_(params, 1.0)
        assert isinstance(norm, torch.Tensor)
        assert norm.item() == 0
        clip_grad_value_(params, 1.0)
    with pytest.warns(UserWarning, match="`parameters` is an empty generator, no gradient clipping will occur"):
        assert clip_grad_norm_((p for p in []), 1.0).item() == 0


def test_empty_and_mixed_tensors(device):
    """Empty gradients among others, and every dtype at once."""
    params = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        params += with_grads([(0,), (40,)], dtype, device)
    norm, expected = clip.clip_grad_norm([to_numpy(p.grad) for p in params], 0.5)
    assert_close(clip_grad_norm_(params, 0.5), norm, 1e-5, "norm", rounding(torch.bfloat16))
    for p, g in zip(params, expected, strict=True):
        assert_close(p.grad, g, 1e-6, f"gradient of {p.dtype}", rounding(p.dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_gradients(dtype, device):
    params = [parameter(torch.zeros(8, dtype=dtype, device=device)) for _ in range(2)]
    for p in params:
        p.grad = torch.randn(8, dtype=dtype, device=device)
    copies = twins(params)
    came, expected = clip_grad_norm_(params, 0.1), torch.nn.utils.clip_grad_norm_(copies, 0.1)
    assert_close(came, expected, 1e-6, "norm")
    for p, copy in zip(params, copies, strict=True):
        assert_close(p.grad, copy.grad, 1e-6, "gradient")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite(bad, device):
    """As in torch: NaN makes every gradient NaN; Inf makes itself NaN and all others 0."""
    params = with_grads([(5,), (3,)], device=device)
    params[1].grad[1] = bad
    copies = twins(params)
    came, expected = clip_grad_norm_(params, 1.0), torch.nn.utils.clip_grad_norm_(copies, 1.0)
    assert str(came.item()) == str(expected.item())
    for p, copy in zip(params, copies, strict=True):
        assert_close(p.grad, copy.grad, 0.0, f"gradient beside {bad}")


@pytest.mark.parametrize("p", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite(bad, p):
    """torch's error, and the gradients unchanged."""
    params = with_grads([(5,), (3,)])
    params[1].grad[1] = bad
    before = grads_of(params)
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.utils.clip_grad_norm_(twins(params), 1.0, p, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as ours:
        clip_grad_norm_(params, 1.0, p, error_if_nonfinite=True)
    assert str(ours.value).startswith(str(theirs.value)), f"expected {theirs.value}, came {ours.value}"
    assert_same(grads_of(params), before, "gradients after the error")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["norm", "value"])
def test_gradients_in_any_layout(layout, what, dtype, device):
    values = torch.randn(3, 4, 5, 2, device=device).to(dtype)
    base, view = in_layout(layout, values)
    p = parameter(torch.zeros_like(values))
    p.grad = view
    if what == "norm":
        norm, (expected,) = clip.clip_grad_norm([to_numpy(values)], 0.5)
        assert_close(clip_grad_norm_([p], 0.5), norm, 1e-5, "norm", rounding(dtype))
    else:
        expected = clip.clip_grad_value([to_numpy(values)], 0.5)[0]
        clip_grad_value_([p], 0.5)
    assert p.grad.data_ptr() == view.data_ptr(), "the gradient was replaced"
    assert_close(p.grad, expected, TOLERANCE[dtype], f"{what} in layout {layout}", rounding(dtype))
    assert_only_view_written(base, view, layout)


@pytest.mark.parametrize("clip_value", [0.5, 0.0, 1e4, 2])
def test_value_like_torch(clip_value, dtype, device):
    """Exactly torch's result: clamping does not round, NaN stays, Inf is clipped."""
    params = with_grads([*SHAPES, (0,)], dtype, device)
    params[0].grad[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    copies = twins(params)
    assert clip_grad_value_(params, clip_value) is None
    torch.nn.utils.clip_grad_value_(copies, clip_value)
    for p, copy in zip(params, copies, strict=True):
        assert_close(p.grad, copy.grad, 0.0, f"gradient clipped to {clip_value}")


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("clip_function", [clip_grad_norm_, clip_grad_value_])
def test_sparse_gradients(clip_function, coalesced):
    """Clipped like the dense gradient that they represent; repeated rows count as their sum."""
    indices = torch.tensor([[0, 2, 3]] if coalesced else [[0, 0, 2]])
    sparse = torch.sparse_coo_tensor(indices, torch.randn(3, 2), (5, 2), check_invariants=True)
    p, dense = parameter(torch.zeros(5, 2)), parameter(torch.zeros(5, 2))
    p.grad, dense.grad = sparse.coalesce() if coalesced else sparse, sparse.to_dense()
    norms = [clip_function(q, 0.1) for q in (p, dense)]
    if clip_function is clip_grad_norm_:
        assert_close(norms[0], norms[1], 1e-6, "norm")
    assert_close(p.grad.to_dense(), dense.grad, 1e-6, "clipped gradient")


def test_versions_rise():
    """Clipping writes the gradients, so autograd must know."""
    for clip_function in (clip_grad_norm_, clip_grad_value_):
        (p,) = with_grads([(5,)])
        version = p.grad._version
        clip_function([p], 0.01)
        assert p.grad._version > version, clip_function.__name__


def test_gradient_with_a_graph():
    """backward(create_graph=True) leaves gradients with a graph; clipping is not recorded by autograd, as in torch."""
    (p,) = with_grads([(5,)])
    p.grad = torch.ones(5, requires_grad=True) * 2
    clip_grad_norm_([p], 1.0)
    assert_close(p.grad.norm(), torch.tensor(1.0), 1e-5, "norm after clipping")


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("isa", onepass._native.isas())
def test_same_bits_for_any_thread_count(isa, norm_type):
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        params = with_grads([(2_500_001,), (3,), (70_001,)])
        with onepass._native.use_isa(isa):
            norm = clip_grad_norm_(params, 1.0, norm_type)
        results[threads] = {**grads_of(params), "norm": bits(norm)}
    assert_same(results[2], results[1], "2 threads against 1")
    assert_same(results[3], results[1], "3 threads against 1")


# ---- laws ------------------------------------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3, width=32)
gradients = st.lists(st.lists(finite, min_size=1, max_size=20), min_size=1, max_size=5)
positive = st.floats(0.015625, 100.0, width=32)
orders = st.sampled_from([1.0, 2.0, 3.0, math.inf])


def made_of(gradient_lists, dtype=torch.float64) -> list[torch.nn.Parameter]:
    params = [parameter(torch.zeros(len(values), dtype=dtype)) for values in gradient_lists]
    for p, values in zip(params, gradient_lists, strict=True):
        p.grad = torch.tensor(values, dtype=dtype)
    return params


def flat(params) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in params])


@settings(deadline=None, max_examples=60)
@given(gradients, positive, orders)
def test_law_norm_and_direction(values, max_norm, p):
    """After clipping the norm is at most max_norm, and the gradients are the old ones times one positive factor."""
    params = made_of(values)
    before = flat(params)
    norm = clip_grad_norm_(params, max_norm, p)
    after = flat(params)
    assert torch.linalg.vector_norm(after, p) <= max_norm * (1 + 1e-9)
    factor = min(1.0, max_norm / (norm.item() + 1e-6))
    assert_close(after, before * factor, 1e-9, "scaled gradients")


@settings(deadline=None, max_examples=40)
@given(gradients, positive, st.sampled_from([0.5, 2.0, 1024.0]), orders)
def test_law_homogeneous(values, max_norm, scale, p):
    """norm(c·g) = c·norm(g), exactly for powers of two."""
    plain, scaled = (made_of(values) for _ in range(2))
    for q in scaled:
        q.grad *= scale
    norms = [clip_grad_norm_(params, max_norm, p).item() for params in (plain, scaled)]
    assert norms[1] == pytest.approx(scale * norms[0], rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(gradients, positive)
def test_law_value_is_idempotent_and_bounded(values, clip_value):
    params = made_of(values, torch.float32)
    clip_grad_value_(params, clip_value)
    once = flat(params)
    assert once.abs().max() <= clip_value
    clip_grad_value_(params, clip_value)
    assert torch.equal(flat(params), once)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_law_norm_in_sixteen_bits(dtype):
    """The norm of 100,000 small gradients is not lost by accumulating in 16 bits."""
    p = parameter(torch.zeros(100_000, dtype=dtype))
    p.grad = torch.full_like(p, 0.125)
    norm = clip_grad_norm_([p], 1.0)
    assert_close(norm, torch.tensor(0.125 * math.sqrt(100_000)), 1e-5, "norm", rounding(dtype))
