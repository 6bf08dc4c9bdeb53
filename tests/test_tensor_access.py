"""Both ways of reading a tensor's address and layout give the same steps: DLPack's C interface and Python attributes."""

from collections.abc import Iterator

import onepass
import pytest
import torch
from onepass import _compat, _native
from support import assert_same, snapshot


@pytest.fixture
def attributes() -> Iterator[None]:
    """Read tensors as in a torch without DLPack's C interface (before 2.10)."""
    _native._C.set_reader(None, _compat.describe)
    yield
    _native._C.set_reader(_compat.exchange_api(), _compat.describe)


def three_steps(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, bytes]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    params.append(torch.nn.Parameter(torch.randn(4, 6, dtype=dtype)[:, ::2]))  # not dense
    optimizer = onepass.optim.AdamW(params, lr=0.1, amsgrad=True, max_norm=1.0)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return snapshot(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_same_steps_either_way(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    shapes = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4, 5), (40_000,)]
    expected = three_steps(shapes, dtype)
    request.getfixturevalue("attributes")
    assert_same(three_steps(shapes, dtype), expected, "Python attributes against DLPack")


def test_errors_either_way(attributes: None) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = onepass.optim.AdamW([p], lr=0.1)
    p.grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        optimizer.step()
