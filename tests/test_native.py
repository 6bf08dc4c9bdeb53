"""The last checks before a kernel gets an address, the state after a failed launch, and the cost of an import."""

import subprocess
import sys
import warnings

import onepass
import pytest
import torch
from onepass import _C, _native
from onepass._native import batch_norm, devices, layers
from onepass._native.batch_norm import BatchNormOptions, Operands, Running, Saved
from onepass._native.layers import DropoutOptions, NormOptions
from onepass.optim._staging import Staging
from support import assert_close

N = 1000


def seed(value: int = 7, **options) -> torch.Tensor:
    return torch.tensor(value, **{"dtype": torch.int64, **options})


@pytest.mark.parametrize(
    ("name", "wrong_seed", "wrong_mask"),
    [
        ("seed", torch.tensor(7, dtype=torch.int32), None),
        ("seed", torch.tensor([7, 8]), None),
        ("seed", torch.tensor(7.0), None),
        ("seed", torch.tensor(7, device="meta"), None),
        ("mask", None, torch.zeros(1, dtype=torch.uint8)),
        ("mask", None, torch.zeros((N + 7) // 8 + 1, dtype=torch.uint8)),
        ("mask", None, torch.zeros((N + 7) // 8, dtype=torch.int8)),
        ("mask", None, torch.zeros(2 * ((N + 7) // 8), dtype=torch.uint8)[::2]),
        ("mask", None, torch.zeros((N + 7) // 8, dtype=torch.uint8, device="meta")),
    ],
    ids=lambda value: None if value is None else value if isinstance(value, str) else f"{value.dtype}{[*value.shape]}",
)
def test_seed_and_mask_are_what_a_kernel_reads(name, wrong_seed, wrong_mask):
    x = torch.ones(N)
    mask = torch.full(((N + 7) // 8,), 255, dtype=torch.uint8) if wrong_mask is None else wrong_mask
    given = seed() if wrong_seed is None else wrong_seed
    with pytest.raises(ValueError, match=name):
        layers.dropout_backward(x, DropoutOptions(given, 0.5, True), mask)
    rows, norm = x.view(10, 100), NormOptions(100, 1e-5, False)
    y, total, stats, _ = layers.dropout_add_norm(
        rows, rows, None, None, DropoutOptions(seed(), 0.5, True), norm, keep_mask=True
    )
    with pytest.raises(ValueError, match=name):
        layers.dropout_add_norm_backward(
            (y, None), (total, None, stats, mask), DropoutOptions(given, 0.5, True), norm, (True, True, False, False)
        )


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_is_a_probability(p):
    with pytest.raises(ValueError, match="p is a probability"):
        layers.dropout(torch.ones(3), DropoutOptions(seed(), p, True), False)


def test_rows_are_contiguous():
    """Density is not enough: the rows of a transposed matrix are its columns."""
    x = torch.randn(6, 8)
    for transposed in (x.t(), torch.randn(4, 3, 8).transpose(0, 1)):
        with pytest.raises(ValueError, match="x is not of the size, dtype, device or layout"):
            layers.norm(transposed, None, None, NormOptions(transposed.shape[-1], 1e-5, False))
    y, stats = layers.norm(x, None, None, NormOptions(8, 1e-5, False))
    with pytest.raises(ValueError, match="dy is not of"):
        layers.norm_backward(torch.randn(8, 6).t(), x, None, stats, NormOptions(8, 1e-5, False), (True, False, False))
    assert_close(y, torch.nn.functional.layer_norm(x, (8,)), 1e-6, "y")


def test_channels_are_where_the_call_says():
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    options, want = BatchNormOptions(1e-5, None, channels_last=True), (True, False, False, False)
    _, stats = batch_norm.batch_norm(Operands(last, None, None, None), Running(None, None), options)
    with pytest.raises(ValueError, match="dy is not of"):
        batch_norm.batch_norm_backward(torch.randn(2, 3, 4, 5), Saved(last, None, None, stats), options, True, want)
    innermost_batch = Operands(torch.randn(3, 4, 5, 2).permute(3, 0, 1, 2), None, None, None)  # dense nevertheless
    for channels_last in (False, True):
        options = BatchNormOptions(1e-5, None, channels_last)
        with pytest.raises(ValueError, match="x is not of"):
            batch_norm.batch_norm(innermost_batch, Running(None, None), options)


@pytest.mark.parametrize("weight", [None, torch.ones(8), torch.ones(())])
def test_gradients_of_an_empty_batch_are_zero(weight):
    x = torch.empty(0, 8)
    torch.full((10_000,), 7.0)  # freed at once, to leave memory that is not zero
    stats = torch.empty(3, 0)
    norm = NormOptions(8, 1e-5, False)
    _, dweight, dbias = layers.norm_backward(x, x, weight, stats, norm, (True, weight is not None, True))
    for gradient in (dweight, dbias):
        assert gradient is None or (gradient == 0).all()
    residual = layers.dropout_add_norm_backward(
        (x, None),
        (x, weight, stats, torch.empty(0, dtype=torch.uint8)),
        DropoutOptions(seed(), 0.5, True),
        norm,
        (True, True, True, True),
    )
    assert all(gradient is None or (gradient == 0).all() for gradient in residual)


# --- a step that fails, or must not happen ----------------------------------------------------------------------------


def gathered(plan, params: list[torch.Tensor]) -> Staging:
    staging = Staging(lambda index: f"parameter {index}", ())
    _native.Group("clip", (), params, {}, {"limit": 1.0}, staging, reads_grad=False).gather(plan)
    return staging


@pytest.mark.skipif(_native.cuda_kernels and not _native.has_cuda, reason="the CUDA kernels take such numbers")
def test_updates_before_a_failure_are_completed():
    """A launch that fails leaves the groups before it written: their copies are written back, their versions bumped."""
    first = torch.full((4, 6), 3.0)[:, ::2]  # not dense, so updated in a copy
    second = torch.full((3,), 3.0)
    plan = _native.new_plan()
    stagings = [gathered(plan, [first])]
    group = _native.Group("clip", (), [second], {}, {"limit": 1.0}, stagings[0], reads_grad=False)
    group.hyper = (torch.tensor(1.0),)  # a number in device memory, which CPU kernels cannot read
    group.gather(plan)
    version = first._version
    with pytest.raises(ValueError, match="hyper-parameter in device memory"):
        _native.update(plan, stagings, _native.GradientFactor())
    assert first.tolist() == [[1.0] * 3] * 4
    assert first._version > version
    assert second.tolist() == [3.0] * 3


@pytest.mark.parametrize("overflow", [True, False])
def test_overflow_on_another_device_is_skipped(overflow, monkeypatch):
    """With found_inf on CUDA the kernels there decide; for parameters on the CPU the host has to."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = onepass.optim.AdamW([param], lr=0.1, fused_unscale=True)
    param.grad = torch.full((3,), float("inf") if overflow else 1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(overflow))
    monkeypatch.setattr(_native, "is_on_cuda", lambda tensor: tensor is optimizer.found_inf)
    optimizer.step()
    assert param.isfinite().all()
    assert (param == 1).all().item() == overflow
    assert all(float(state["step"]) == 1 - overflow for state in optimizer.state.values())


# --- numbers at the edge of their type --------------------------------------------------------------------------------


@pytest.mark.skipif(_native.cuda_kernels and not _native.has_cuda, reason="CUDA kernels add up in the arithmetic type")
@pytest.mark.parametrize("shape", [(8, 3, 5, 7), (40, 3), (9, 3, 4, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_of_huge_numbers_is_finite(shape, channels_last):
    """Their squares, and the difference of two of them, overflow float32."""
    x = torch.randn(shape)
    x = x / x.abs().max() * 3.4e38
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    running = torch.zeros(3), torch.ones(3)
    y = onepass.nn.functional.batch_norm(x, *running, training=True)
    assert (
        y == 0
    ).all()  # as torch, unless its layout makes them NaN: any difference divided by an infinite deviation is 0
    assert_close(running[0] / 1e36, x.double().mean((0, *range(2, x.dim()))) / 1e37, 1e-5, "running_mean")
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_alone_in_its_row_has_no_gradient(dtype, device):
    x = torch.randn(50, 1, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(1, dtype=dtype, device=device, requires_grad=True)
    y = onepass.nn.functional.layer_norm(x, (1,), weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn_like(x))
    assert (dx == 0).all()
    assert (dweight == 0).all()


# --- the import -------------------------------------------------------------------------------------------------------


def test_import_needs_no_compiler():
    """Modules that take longer to import than all of onepass are imported only when needed."""
    program = (
        "import sys, torch; before = set(sys.modules); import onepass; "
        "print(*(name for name in ('torch._dynamo', 'sympy', 'torch.distributed') if name in sys.modules.keys() - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("built", "driver", "too_old"),
    [
        (13000, 12080, True),
        (13000, 11020, True),
        (13000, 13000, False),
        (12080, 12010, False),  # any driver of the same major version runs machine code
        (12080, 12000, True),  # but 12.0 takes no more than 4 KB of parameters
        (12040, 13010, False),
        (13000, 0, False),  # no driver, no GPU
        (0, 0, False),  # a build for the CPU
    ],
)
def test_a_driver_older_than_the_build_is_told_at_import(monkeypatch, built, driver, too_old):
    monkeypatch.setattr(_C, "cuda_versions", lambda: (built, driver))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        devices._warn_of_old_driver()
    assert len(caught) == too_old
    if too_old:
        assert caught[0].category is RuntimeWarning
        for part in (
            f"CUDA {built // 1000}.{built % 1000 // 10}",
            f"CUDA {driver // 1000}.{driver % 1000 // 10}",
            "newer driver",
        ):
            assert part in str(caught[0].message)
