"""More elements than an int32 can count, if memory allows: indices, sizes and masks have 64 bits."""

import onepass
import pytest
import torch
from onepass.nn import functional as OF

N = 2**31 + 1024
GIB = 2**30


def available() -> int:
    """Bytes that the process can still allocate; 0 if the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


pytestmark = pytest.mark.skipif(available() < 14 * GIB, reason="needs 14 GiB of free memory")


def test_update():
    param = torch.nn.Parameter(torch.zeros(N, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    param.grad[-1] = 2
    onepass.optim.SGD([param], lr=0.5).step()
    assert param[[0, 1, 2**31 - 1, 2**31, -2, -1]].tolist() == [-0.5] * 5 + [-1.0]
    assert param.amax() == -0.5


def test_layer_norm():
    x = torch.zeros(N // 1024, 1024, dtype=torch.bfloat16)
    x[-1].normal_()
    y = OF.layer_norm(x, (1024,))
    assert torch.equal(y[-1], OF.layer_norm(x[-1], (1024,)))
    assert (y[:-1].amax(), y[:-1].amin()) == (0, 0)


def test_dropout():
    x = torch.ones(N, dtype=torch.bfloat16)
    y = OF.dropout(x, 0.5, seed=3)
    mask = OF.dropout_mask((N,), 0.5, 3, packed=True)
    bit = torch.arange(8, dtype=torch.uint8)
    for first in (0, 2**31 - 512, N - 512):
        kept = ((mask[first // 8 : first // 8 + 64].unsqueeze(1) >> bit) & 1).flatten().bool()
        assert torch.equal(y[first : first + 512], kept * 2.0)
    assert not torch.equal(mask[:64], mask[2**28 : 2**28 + 64]), "the counter has more than 32 bits"
