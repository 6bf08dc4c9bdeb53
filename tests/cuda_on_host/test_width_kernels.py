"""Every width of an access and every block of the layers: sizes that are odd multiples of 1, 2, 4 and 8 elements."""

import onepass
import pytest
import torch
from cuda_on_host import backend
from onepass.nn import functional

DEVICE = backend.kernel_device()
if DEVICE is None:
    pytest.skip("no CUDA kernels here: neither a GPU nor the backend cuda-on-host", allow_module_level=True)

pytestmark = pytest.mark.cuda_kernels
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}  # of 16-bit results: a few units in the last place
TARGETS = (40, 300, 700, 1300, 2100, 3100, 5000, 9000, 13000, 17000)  # between the sizes at which blocks change


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype).requires_grad_()


def compare(came: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    tolerance = TOLERANCE.get(came.dtype, 0.03)
    scale = float(expected.abs().max()) + 1
    torch.testing.assert_close(
        came.double(), expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_rows_of_every_width(width, has_residual, dtype):
    """Forward and backward of LayerNorm, alone and after an addition."""
    torch.manual_seed(0)
    for target in TARGETS:
        size = target // (2 * width) * 2 * width + width
        x, residual = random(3, size, dtype=dtype), random(3, size, dtype=dtype)
        weight, bias = random(size, dtype=dtype), random(size, dtype=dtype)
        grad = torch.randn(3, size).to(DEVICE, dtype)
        leaves = [x, weight, bias, *([residual] if has_residual else [])]
        if has_residual:
            y = functional.dropout_add_layer_norm(x, residual, (size,), weight, bias, p=0.0)[0]
        else:
            y = functional.layer_norm(x, (size,), weight, bias)
        y.backward(grad)
        twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
        total = twins[0] + twins[3] if has_residual else twins[0]
        exact = torch.nn.functional.layer_norm(total, (size,), twins[1], twins[2])
        exact.backward(grad.double())
        compare(y.detach(), exact.detach(), f"result of {size}")
        for leaf, twin in zip(leaves, twins, strict=True):
            compare(leaf.grad, twin.grad, f"gradient of {size}")


@pytest.mark.parametrize(
    "shape", [(4, 12, 5, 5), (3, 5, 7, 7), (3, 4, 14, 14), (2, 3, 6, 6), (4, 9, 3, 3), (5, 6, 4, 4)], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
def test_channels_of_every_width(shape, channels_last, dtype):
    """Forward and backward of BatchNorm over spaces and channels of every width."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout)
    layer = onepass.nn.BatchNorm2d(shape[1]).to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    y = layer(x)
    y.backward(grad)
    twin = x.detach().double().requires_grad_()
    exact = torch.nn.functional.batch_norm(twin, None, None, training=True)
    exact.backward(grad.double())
    compare(y.detach(), exact.detach(), "result")
    compare(x.grad, twin.grad, "gradient")
