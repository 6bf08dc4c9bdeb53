"""BatchNorm: values, every gradient and running statistics against float64, in every memory format."""

import math

import pytest
import torch
from layers import (
    AFFINE,
    affine,
    as_numpy,
    assert_batch_norm,
    assert_close_to,
    gradients,
    leaf,
    running_statistics,
    weight_dtypes,
)
from onepass.nn import functional as OF
from reference import batch_norm
from support import arithmetic_dtype, assert_close, assert_same, bits
from torch.nn import functional as F

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# [N, C], [N, C, L], images and volumes; few and many channels, one position, one sample; no multiples of a vector's width.
SHAPES = [
    (2, 1),
    (5, 3),
    (33, 17),
    (70, 130),
    (4, 3, 7),
    (1, 4, 6),
    (2, 5, 3, 4),
    (3, 19, 9, 11),
    (7, 64, 1, 1),
    (1, 2, 1, 40),
    (2, 3, 2, 3, 4),
    (2, 16, 4, 4, 4),
]
# The memory format of the others is ambiguous.
PICTURES = [shape for shape in SHAPES if len(shape) > 3 and shape[2:] != (1, 1)]


@pytest.mark.parametrize("kind", [k for k in AFFINE if k != "scalar"])
@TRAINING
def test_values_gradients_and_statistics(training, kind, dtype, device):
    for weight_dtype in weight_dtypes(dtype):
        for shape in SHAPES:
            x = (torch.randn(shape, device=device) * 2 + 0.5).to(dtype)
            weight, bias = affine(kind, True, shape[1:2], weight_dtype, device)
            running = running_statistics(shape[1], weight_dtype, device)
            assert_batch_norm(x, running, weight, bias, training, what=f"{shape}, weights {weight_dtype}")


@pytest.mark.parametrize("shape", [(6, 48, 40, 33), (3, 2, 200, 201), (4000, 33), (5, 1030, 3)], ids=str)
@TRAINING
def test_large(training, shape, dtype, device):
    x = (torch.randn(shape, device=device) * 2 + 0.5).to(dtype)
    formats = [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]
    weight, bias = affine("weight and bias", True, shape[1:2], torch.float32, device)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    for memory_format in formats:
        running = running_statistics(shape[1], weight.dtype, device)
        assert_batch_norm(x.to(memory_format=memory_format), running, weight, bias, training, what=f"{memory_format}")


# ---- running statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum(momentum, device):
    """0 leaves the statistics unchanged, 1 replaces them with the batch's."""
    x = torch.randn(4, 5, 6, device=device)
    running = running_statistics(5, device=device)
    before = [r.clone() for r in running]
    assert_batch_norm(x, running, momentum=momentum, what=f"momentum {momentum}")
    if momentum == 0:
        assert all(map(torch.equal, running, before))
    if momentum == 1:
        assert_close(running[0], x.mean((0, 2)), 1e-6, "running mean")
        assert_close(running[1], x.var((0, 2)), 2e-6, "running variance, unbiased")


@pytest.mark.parametrize("running_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@TRAINING
def test_running_statistics_of_any_dtype(training, running_dtype, dtype, device):
    """As model.to(dtype) and autocast leave them: rounded once, to their own dtype, which stays."""
    x = torch.randn(6, 7, 3, device=device).to(dtype)
    weight, bias = affine("weight and bias", True, (7,), dtype, device)
    running = running_statistics(7, running_dtype, device)
    assert_batch_norm(x, running, weight, bias, training, what=f"{running_dtype} statistics")
    assert [r.dtype for r in running] == [running_dtype] * 2


def test_without_running_statistics(dtype, device):
    """track_running_stats=False: training uses the batch's statistics; evaluation has none and raises."""
    x = torch.randn(6, 7, 3, device=device).to(dtype)
    assert_batch_norm(x, what="no statistics")
    with pytest.raises(RuntimeError, match=r"^running_mean must be defined in evaluation mode"):
        OF.batch_norm(x, None, None)


@TRAINING
def test_running_statistics_that_are_not_dense(training, device):
    """Slices of a larger array: only they are written, and autograd sees it."""
    base = torch.full((4, 14), 7.0, device=device)
    base[1, ::2], base[2, 1::2] = torch.randn(7, device=device), torch.rand(7, device=device) + 0.5
    running = base[1, ::2], base[2, 1::2]
    assert_batch_norm(torch.randn(6, 7, 3, device=device), running, training=training, what="strided statistics")
    base[1, ::2] = base[2, 1::2] = 7.0
    assert bool((base == 7).all()), "written beside the statistics"


def test_writing_statistics_is_seen_by_autograd(device):
    """The versions of both rise in training, so a graph that saved them before refuses to run."""
    x = torch.randn(6, 7, device=device)
    running = running_statistics(7, device=device)
    versions = [r._version for r in running]
    OF.batch_norm(x, *running)
    assert [r._version for r in running] == versions, "evaluation writes nothing"
    w = leaf(torch.ones(7, device=device))
    product = (w * running[0]).sum()
    OF.batch_norm(x, *running, training=True)
    assert all(r._version > v for r, v in zip(running, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_statistics_are_written_once_and_not_by_backward(device):
    x = leaf(torch.randn(6, 7, device=device))
    running = running_statistics(7, device=device)
    y = OF.batch_norm(x, *running, training=True)
    after = [bits(r) for r in running]
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert [bits(r) for r in running] == after


# ---- which gradients are asked for -----------------------------------------------------------------------------------


@TRAINING
def test_every_subset_of_gradients(training, device):
    values = torch.randn(6, 9, 5, device=device), *affine("weight and bias", True, (9,), torch.float32, device)
    statistics = running_statistics(9, device=device)
    dy = torch.randn(6, 9, 5, device=device)

    def call(inputs):
        return OF.batch_norm(inputs[0], *(s.clone() for s in statistics), *inputs[1:], training)

    everything = [leaf(v) for v in values]
    y = call(everything)
    expected = gradients(y, everything, dy)
    for subset in range(8):
        inputs = [leaf(v) if subset >> i & 1 else v for i, v in enumerate(values)]
        came = call(inputs)
        assert bits(came) == bits(y), f"y changes with the gradients wanted, {subset:03b}"
        assert came.requires_grad == bool(subset)
        if subset:
            came.backward(dy)
        for i, t in enumerate(inputs):
            if t.requires_grad:
                assert_close(t.grad, expected[i], 1e-6, f"gradient {i} of subset {subset:03b}")


# ---- memory formats --------------------------------------------------------------------------------------------------


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


@pytest.mark.parametrize("shape", PICTURES, ids=str)
@TRAINING
def test_channels_last(training, shape, dtype, device):
    """Without a copy: y and dx are channels_last too, with the values of the contiguous tensor."""
    x = channels_last((torch.randn(shape, device=device) * 2 + 0.5).to(dtype))
    weight, bias = affine("weight and bias", True, shape[1:2], dtype, device)
    running = running_statistics(shape[1], dtype, device)
    dys = channels_last(torch.randn_like(x)), torch.randn(shape, device=device).to(dtype)
    for dy in dys:
        y = assert_batch_norm(x, running, weight, bias, training, dy=dy, what="channels_last")
        dx = gradients(OF.batch_norm(leaf_x := leaf(x), *running, weight, bias, training), [leaf_x], dy)[0]
        for name, tensor in (("y", y), ("dx", dx)):
            assert tensor.stride() == x.stride(), f"{name}: strides of {x.stride()} expected, came {tensor.stride()}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@TRAINING
def test_contiguous_stays_contiguous(training, shape, device):
    x = leaf(torch.randn(shape, device=device))
    y = OF.batch_norm(x, *running_statistics(shape[1], device=device), training=training)
    dy = torch.randn_like(y)
    for other in (dy, channels_last(dy) if len(shape) > 3 else dy, dy.new_ones(()).expand(shape)):
        (dx,) = torch.autograd.grad(y, x, other, retain_graph=True)
        assert y.stride() == dx.stride() == x.stride(), f"{x.stride()} expected, came {y.stride()} and {dx.stride()}"


STRIDED = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "some channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "some channels of channels_last": lambda x: (
        torch.cat([x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : x.shape[1]]
    ),
    "channels innermost": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every second column": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "every second sample": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "offset by one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", STRIDED)
@TRAINING
def test_layouts(training, layout, dtype, device):
    """x and dy in memory of any order and alignment, including [N, C] and [N, L, C].transpose(1, 2)."""
    for shape in [(6, 5), (4, 3, 7), (3, 5, 4, 6), (2, 3, 2, 3, 4)]:
        x, dy = (STRIDED[layout](torch.randn(shape, device=device).to(dtype)) for _ in range(2))
        running = running_statistics(shape[1], dtype, device)
        weight, bias = affine("weight and bias", True, shape[1:2], dtype, device)
        assert_batch_norm(x, running, weight, bias, training, dy=dy, what=f"{layout} {shape}")
        shifted = [torch.cat([t[:1], t])[1:] for t in (weight, bias)]
        strided = [torch.stack([t, t], -1)[:, 0] for t in (weight, bias)]
        for weights in (shifted, strided):
            assert_batch_norm(x, running, *weights, training, dy=dy, what=f"{layout} {shape}, weights so too")


@TRAINING
def test_inputs_are_only_read(training, dtype, device):
    x, dy = (torch.randn(4, 5, 6, device=device).to(dtype) for _ in range(2))
    weight, bias = affine("weight and bias", True, (5,), dtype, device)
    inputs = {"x": x, "weight": weight, "bias": bias, "dy": dy}
    before = {key: bits(t) for key, t in inputs.items()}
    assert_batch_norm(x, running_statistics(5, dtype, device), weight, bias, training, dy=dy, what="")
    assert_same({key: bits(t) for key, t in inputs.items()}, before, "inputs")


# ---- values that are not ordinary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0)], ids=str)
@TRAINING
def test_empty(training, shape, dtype, device):
    """The statistics stay unchanged, and gradients of the weights are zero."""
    x = leaf(torch.empty(shape, device=device, dtype=dtype))
    weight, bias = map(leaf, affine("weight and bias", True, shape[1:2], dtype, device))
    running = running_statistics(shape[1], dtype, device)
    before = [bits(r) for r in running]
    y = OF.batch_norm(x, *running, weight, bias, training)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    came = gradients(y, (x, weight, bias), torch.empty_like(y))
    assert not came[1].any()
    assert not came[2].any()
    assert [bits(r) for r in running] == before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@TRAINING
def test_nan_and_inf_stay_in_their_channel(training, memory_format, dtype, device):
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(3, 4, 5, 5, device=device).to(dtype).to(memory_format=memory_format)
        x[1, 2, 3, 4] = bad
        running = running_statistics(4, dtype, device)
        y = assert_batch_norm(x, (None, None) if training else running, training=training, what=f"{bad}")
        assert bool(y[:, [0, 1, 3]].isfinite().all())
        OF.batch_norm(x, *running, training=training)
        for r in running:
            assert r.isfinite().tolist() == [True, True, not training, True], f"running statistics with {bad}: {r}"


@TRAINING
def test_nan_in_the_gradient(training, device):
    x, dy = torch.randn(2, 3, 4, 5, 5, device=device)
    dy[1, 2, 3, 4] = math.nan
    weight, bias = affine("weight and bias", True, (4,), torch.float32, device)
    assert_batch_norm(x, running_statistics(4, device=device), weight, bias, training, dy=dy, what="NaN in dy")


@pytest.mark.parametrize("shape", [(500, 4), (6, 4, 20, 20), (6, 4, 501)], ids=str)
@pytest.mark.parametrize("innermost", [False, True], ids=["contiguous", "channels innermost"])
def test_statistics_survive_a_large_mean(shape, innermost, dtype, device):
    """x = 1e4 + noise of 1e-2: y, the gradients and the deviation have three digits, the running mean all of its
    digits."""
    if dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the noise is smaller than a unit in the last place")
    x = (1e4 + 1e-2 * torch.randn(shape, device=device, dtype=torch.float64)).to(dtype)
    x = leaf(STRIDED["channels innermost"](x) if innermost else x)
    mean, var = torch.zeros(4, device=device, dtype=dtype), torch.ones(4, device=device, dtype=dtype)
    weight, bias = map(leaf, affine("weight and bias", True, (4,), dtype, device))
    y = OF.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=1e-12)
    values = as_numpy(x)[0]
    expected_mean, expected_var = batch_norm.running_statistics(values, *as_numpy(mean, var), 1.0)
    assert_close(mean, expected_mean, 0.0, "running mean", 2**-23 if dtype == torch.float32 else 1e-13)
    assert_close(var.double().sqrt() / torch.tensor(expected_var).sqrt(), torch.ones(4), 5e-4, "deviation")
    operands = values, *as_numpy(weight, bias)
    assert_close(y, batch_norm.batch_norm(*operands, eps=1e-12), 5e-4, "y")
    dy = torch.randn_like(x)
    came = gradients(y, (x, weight, bias), dy)
    expected = batch_norm.batch_norm_backward(*as_numpy(dy), *operands, eps=1e-12)
    for name, value in zip(("x", "weight", "bias"), came, strict=True):
        like = getattr(expected, name)
        assert_close(value / abs(like).max(), like / abs(like).max(), 5e-4, f"gradient of {name}")


@pytest.mark.parametrize("shape", [(2048, 3, 2), (500, 3, 7, 7), (4096, 3)], ids=str)
@pytest.mark.parametrize("innermost", [False, True], ids=["contiguous", "channels innermost"])
def test_statistics_survive_a_first_sample_unlike_the_others(shape, innermost, device):
    """The pivot is the mean of the first few values, which here are 40 deviations off."""
    x = torch.randn(shape, device=device)
    x[0] += 40
    x = STRIDED["channels innermost"](x) if innermost else x
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    OF.batch_norm(x, mean, var, training=True, momentum=1.0)
    expected_mean, expected_var = batch_norm.running_statistics(*as_numpy(x, mean, var), 1.0)
    assert_close(mean, expected_mean, 2e-6, "running mean")
    assert_close(var, expected_var, 0.0, "running variance", 5e-5)


def test_channels_of_very_different_size(dtype, device):
    """Each channel has its own statistics: 1e-4, 1 and 1e4 beside each other, in both formats."""
    scale = torch.tensor([1e-4, 1.0, 1e4], device=device).view(3, 1, 1)
    x = (torch.randn(4, 3, 6, 6, device=device) * scale).to(dtype)
    for values in (x, channels_last(x)):
        running = running_statistics(3, arithmetic_dtype(dtype), device)
        y = OF.batch_norm(values, *running, training=True, momentum=0.5, eps=1e-12)
        expected = batch_norm.batch_norm(*as_numpy(x), eps=1e-12)
        assert_close_to(y, expected, 10.0, f"y of {values.stride()}")


def test_against_torch_where_it_agrees(device):
    """float64 in evaluation and training with all defaults, against torch itself."""
    x = torch.randn(4, 3, 5, 5, device=device, dtype=torch.float64)
    ours, theirs = (running_statistics(3, torch.float64, device) for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.copy_(b)
    for training in (True, False):
        came, expected = (f(x, *r, training=training) for f, r in ((OF.batch_norm, ours), (F.batch_norm, theirs)))
        assert_close(came, expected, 1e-13, "y")
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-13, "running statistics")
