"""Nested tensors (examples of different lengths) work as in torch's layers, or an error says why not."""

import onepass
import pytest
import torch
from onepass.nn import functional as OF
from support import assert_close
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def jagged(*lengths: int, size: int = 6) -> torch.Tensor:
    rows = [torch.randn(length, size, dtype=torch.float64) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def twins(nested: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One leaf per side, with the same offsets."""
    values = [nested.values().detach().clone().requires_grad_() for _ in range(2)]
    return tuple(torch.nested.nested_tensor_from_jagged(v, nested.offsets()) for v in values), values


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_of_jagged_tensors(name):
    """Values, gradients of values and weights; the result can be combined with the input."""
    (ours, theirs), (a, b) = twins(jagged(2, 5, 0, 3))
    weights = [torch.randn(6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        weights[1].copy_(weights[0])

    def on_values(x: torch.Tensor, *rest, **options) -> torch.Tensor:  # rms_norm of torch 2.4 accepts no nested tensor
        return torch.nested.nested_tensor_from_jagged(getattr(F, name)(x.values(), *rest, **options), x.offsets())

    for function, x, weight in ((getattr(OF, name), ours, weights[0]), (on_values, theirs, weights[1])):
        y = function(x, (6,), weight, eps=1e-5) + x
        assert y.is_nested
        y.values().sin().sum().backward()
    assert_close(a.grad, b.grad, 1e-12, "gradient of x")
    assert_close(weights[0].grad, weights[1].grad, 1e-12, "gradient of weight")
    assert_close(getattr(OF, name)(ours, (6,)).values(), on_values(theirs, (6,)).values(), 1e-12, "y")


def test_dropout_of_jagged_tensors():
    x = jagged(2, 5)
    y = OF.dropout(x, 0.5, seed=3)
    assert (y + x).is_nested
    assert torch.equal(y.values(), OF.dropout(x.values(), 0.5, seed=3))
    layer = onepass.nn.Dropout(0.5)
    assert layer(x).is_nested
    assert layer.eval()(x) is x


def test_dropout_add_norm_of_jagged_tensors():
    (x, residual), _ = twins(jagged(2, 5))
    y, total = OF.dropout_add_layer_norm(x, residual, (6,), p=0.0)
    assert_close(total.values(), 2 * x.values(), 1e-12, "sum")
    assert_close(y.values(), F.layer_norm(2 * x.values(), (6,)), 1e-12, "y")


def with_holes() -> torch.Tensor:
    values = torch.randn(7, 6)
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 4, 7]), torch.tensor([2, 3]))


REFUSED = {
    "layer_norm, strided layout": lambda: OF.layer_norm(torch.nested.nested_tensor([torch.randn(2, 6)]), (6,)),
    "rms_norm, strided layout": lambda: OF.rms_norm(torch.nested.nested_tensor([torch.randn(2, 6)]), (6,)),
    "dropout, strided layout": lambda: OF.dropout(torch.nested.nested_tensor([torch.randn(2, 6)])),
    "batch_norm, strided layout": lambda: OF.batch_norm(torch.nested.nested_tensor([torch.randn(2, 6)]), None, None),
    "batch_norm": lambda: OF.batch_norm(jagged(2, 3), None, None, training=True),
    "BatchNorm1d": lambda: onepass.nn.BatchNorm1d(6).double()(jagged(2, 3)),
    "normalised over the ragged dimension": lambda: OF.layer_norm(jagged(2, 2), (2, 6)),
    "transposed": lambda: OF.layer_norm(jagged(2, 3).transpose(1, 2), (6,)),
    "holes": lambda: OF.layer_norm(with_holes(), (6,)),
    "weight": lambda: OF.layer_norm(torch.randn(3, 6).double(), (6,), jagged(2, 3)),
    "residual": lambda: OF.dropout_add_rms_norm(jagged(2, 3).values(), jagged(2, 3), (6,)),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refused(call):
    with pytest.raises((RuntimeError, ValueError), match=r"nested|pointwise"):
        call()
