"""Faults from outside: a hook, a parametrization or Ctrl-C interrupts; copies and pickles before and after a conversion."""

import copy
import io
import pickle

import onepass
import pytest
import torch
from onepass._native import batch_norm as native
from support import assert_close, assert_same, bits
from torch import nn
from torch.nn.utils import parametrize

C = 6
ours = onepass.nn

LAYERS = {
    "LayerNorm": lambda: ours.LayerNorm(C),
    "RMSNorm": lambda: ours.RMSNorm(C),
    "BatchNorm1d": lambda: ours.BatchNorm1d(C),
    "BatchNorm1d, cumulative": lambda: ours.BatchNorm1d(C, momentum=None),
    "BatchNorm1d, float64 statistics": lambda: with_statistics(torch.zeros(C, dtype=torch.float64)),
    "BatchNorm1d, strided statistics": lambda: with_statistics(torch.zeros(2 * C)[::2]),
    "SyncBatchNorm": lambda: ours.SyncBatchNorm(C),
    "BatchNormAct1d": lambda: ours.BatchNormAct1d(C),
    "Dropout": lambda: ours.Dropout(0.5),
    "DropoutAddLayerNorm": lambda: ours.DropoutAddLayerNorm(C),
    "DropoutAddRMSNorm": lambda: ours.DropoutAddRMSNorm(C),
}
FAULTS = (RuntimeError, KeyboardInterrupt)


def with_statistics(mean: torch.Tensor) -> nn.Module:
    bn = ours.BatchNorm1d(C)
    bn.running_mean, bn.running_var = mean, torch.ones_like(mean)
    return bn


def inputs_of(layer: nn.Module) -> tuple[torch.Tensor, ...]:
    count = 2 if isinstance(layer, (ours.DropoutAddLayerNorm, ours.DropoutAddRMSNorm)) else 1
    torch.manual_seed(8)
    return tuple(torch.randn(4, C).requires_grad_() for _ in range(count))


def content(layer: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in layer.state_dict().items()}


def results(layer: nn.Module) -> list[torch.Tensor]:
    """Outputs and gradients of one step."""
    layer.zero_grad()
    inputs = inputs_of(layer)
    torch.manual_seed(9)
    y = layer(*inputs)
    y = y if isinstance(y, tuple) else (y,)
    sum(t.sin().sum() for t in y).backward()
    return [*(t.detach() for t in y), *(t.grad for t in inputs), *(p.grad for p in layer.parameters())]


def assert_counted(layer: nn.Module, untouched: dict[str, bytes], counted: dict[str, bytes]) -> None:
    """Assert that statistics and count match: both from before the batch, or both from after it."""
    assert content(layer) in (untouched, counted), (
        "the running statistics without the count of batches, or the other way"
    )


class Fault:
    """Raises at the n-th call only."""

    def __init__(self, error: type[BaseException], call: int = 0):
        self.error, self.left = error, call

    def __call__(self, *arguments):
        self.left -= 1
        if self.left == -1:
            raise self.error("from outside")


PLACES = {
    "forward pre-hook": lambda layer, fault: layer.register_forward_pre_hook(fault),
    "forward hook": lambda layer, fault: layer.register_forward_hook(fault),
    "backward pre-hook": lambda layer, fault: layer.register_full_backward_pre_hook(fault),
    "backward hook": lambda layer, fault: layer.register_full_backward_hook(fault),
    "gradient's hook": lambda layer, fault: next(layer.parameters()).register_hook(fault),
}


@pytest.mark.parametrize("error", FAULTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_that_raises(name, place, error):
    """The next step is that of a layer that either saw the batch or did not."""
    layer = LAYERS[name]()
    if place == "gradient's hook" and not list(layer.parameters()):
        pytest.skip("no parameters")
    fresh = copy.deepcopy(layer)
    untouched = content(layer)
    results(fresh)
    counted = content(fresh)
    handle = PLACES[place](layer, Fault(error))
    with pytest.raises(error, match="from outside"):
        results(layer)
    handle.remove()
    assert_same(content(layer), untouched if place == "forward pre-hook" else counted, name)
    expected, came = results(fresh if place != "forward pre-hook" else LAYERS[name]()), results(layer)
    for i, (a, b) in enumerate(zip(came, expected, strict=True)):
        assert_close(a, b, 1e-6, f"result {i}")


@pytest.mark.parametrize("error", FAULTS)
@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize("name", LAYERS)
def test_a_saved_tensor_hook_that_raises(name, call, error):
    """Hooks of saved tensors run between the kernel and the end of the call; offloading may run out of memory there."""
    layer = LAYERS[name]()
    fresh = copy.deepcopy(layer)
    untouched = content(layer)
    results(fresh)
    counted = content(fresh)
    fault = Fault(error, call)

    def pack(tensor):
        fault()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(*inputs_of(layer))
    except error:
        pass
    assert_counted(layer, untouched, counted)
    layer.load_state_dict(fresh.state_dict())
    for i, (a, b) in enumerate(zip(results(layer), results(fresh), strict=True)):
        assert_close(a, b, 1e-6, f"result {i}")


@pytest.mark.parametrize("name", [name for name in LAYERS if "BatchNorm" in name])
def test_memory_that_runs_out(name, monkeypatch):
    """An allocation fails before the kernel: nothing changes, the batch is not counted, and a smaller one works."""
    layer = LAYERS[name]()
    untouched = content(layer)

    def refuse(*arguments, **options):
        raise torch.OutOfMemoryError("none left")

    for function in ("empty_like", "empty"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, function, refuse)
            with pytest.raises(torch.OutOfMemoryError):
                layer(*inputs_of(layer))
        assert_same(content(layer), untouched, f"{name} after torch.{function} failed")
    layer(torch.randn(2, C))
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [name for name in LAYERS if "BatchNorm" in name and "statistics" not in name])
def test_an_interrupted_kernel(name, grad, monkeypatch):
    """Python raises KeyboardInterrupt when the running kernel returns: the batch is in the statistics and is counted."""
    layer = LAYERS[name]()
    fresh = copy.deepcopy(layer)
    kernel = native.batch_norm

    def interrupted(*arguments):
        kernel(*arguments)
        raise KeyboardInterrupt

    with torch.set_grad_enabled(grad):
        fresh(*inputs_of(layer))
        monkeypatch.setattr(native, "batch_norm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer(*inputs_of(layer))
    assert_same(content(layer), content(fresh), name)


# --- parametrizations -------------------------------------------------------------------------------------------------


class Sometimes(nn.Module):
    """A parametrization that fails on demand."""

    fault = staticmethod(lambda: None)

    def forward(self, weight):
        self.fault()
        return weight * 2


@pytest.mark.parametrize("error", FAULTS)
@pytest.mark.parametrize("name", [name for name, make in LAYERS.items() if list(make().parameters())])
def test_a_parametrization_that_raises(name, error):
    layer = LAYERS[name]()
    scale = Sometimes()
    parametrize.register_parametrization(layer, "weight", scale)
    expected_layer = copy.deepcopy(layer)
    before = content(layer)
    scale.fault = Fault(error)
    with pytest.raises(error, match="from outside"):
        results(layer)
    assert_same(content(layer), before, "a step that did not happen")
    for i, (a, b) in enumerate(zip(results(layer), results(expected_layer), strict=True)):
        assert_close(a, b, 1e-6, f"result {i}")


def test_weight_norm_trains_the_same():
    """torch's own parametrization, with and without conversion."""
    made = []
    for convert in (lambda layer: layer, onepass.convert):
        torch.manual_seed(2)
        layer = convert(nn.utils.parametrizations.weight_norm(nn.LayerNorm([3, C])))
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(2, 3, C)).sin().sum().backward()
            optimizer.step()
        made.append(layer)
    assert isinstance(made[1], ours.LayerNorm)
    for (name, came), expected in zip(made[1].named_parameters(), made[0].parameters(), strict=True):
        assert_close(came.detach(), expected.detach(), 1e-5, name)


# --- copies and pickles -----------------------------------------------------------------------------------------------


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}


def model() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Linear(C, C), nn.BatchNorm1d(C), nn.LayerNorm(C), nn.RMSNorm(C), nn.Dropout(0.3), nn.Linear(C, C)
    )
    made(torch.randn(4, C))
    return made


def step(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    x = torch.randn(4, C).requires_grad_()
    y = model(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_models(way):
    """Before and after a conversion, and after undoing it: the same classes, results and states."""
    take = COPIES[way]
    plain = model()
    converted = onepass.convert(model())
    restored = onepass.restore(onepass.convert(model()))
    for original, after in (
        (converted, take(converted)),
        (converted, onepass.convert(take(plain))),
        (plain, take(restored)),
        (plain, onepass.restore(take(converted))),
    ):
        assert [type(m) for m in after.modules()] == [type(m) for m in original.modules()]
        for i, (a, b) in enumerate(zip(step(after), step(copy.deepcopy(original)), strict=True)):
            assert torch.equal(a, b), f"result {i} of a copy"


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", LAYERS)
def test_copies_of_layers(name, way):
    layer = LAYERS[name]()
    results(layer)
    twin = COPIES[way](layer)
    assert type(twin) is type(layer)
    assert repr(twin) == repr(layer)
    assert vars(twin).keys() == vars(layer).keys()
    for i, (a, b) in enumerate(zip(results(twin), results(layer), strict=True)):
        assert torch.equal(a, b), f"result {i}"
    assert_same(content(twin), content(layer), "state")


def test_state_dicts_go_either_way():
    """Checkpoints are independent of a conversion."""
    plain, converted = model(), onepass.convert(model())
    step(plain)
    converted.load_state_dict(plain.state_dict())
    assert_same(content(converted), content(plain), "loaded")
    step(converted)
    plain.load_state_dict(onepass.restore(converted).state_dict())
    assert_same(content(plain), content(converted), "loaded back")
