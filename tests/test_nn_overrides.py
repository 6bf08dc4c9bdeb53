"""Modes and subclasses with a __torch_function__ see our functions; torch.fx keeps our modules whole."""

import copy
import pickle

import onepass
import pytest
import torch
from onepass.nn import functional as OF
from support import assert_close
from torch import nn
from torch.overrides import TorchFunctionMode

C = 6
STATISTICS = torch.zeros(C), torch.ones(C)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


# A call of every function, on a list of all its tensors.
CALLS = {
    "layer_norm": (lambda x, w, b: OF.layer_norm(x, (C,), w, b), [ones(4, C), ones(C), ones(C)]),
    "rms_norm": (lambda x, w: OF.rms_norm(x, (C,), w), [ones(4, C), ones(C)]),
    "dropout": (lambda x: OF.dropout(x, 0.5, seed=3), [ones(4, C)]),
    "batch_norm": (
        lambda x, m, v, w, b: OF.batch_norm(x, m, v, w, b),
        [ones(4, C), *STATISTICS, ones(C), ones(C)],
    ),
    "batch_norm_activation": (
        lambda x, m, v, w, b, r: OF.batch_norm_activation(x, m, v, w, b, residual=r),
        [ones(4, C), *STATISTICS, ones(C), ones(C), ones(4, C)],
    ),
    "dropout_add_layer_norm": (
        lambda x, r, w, b: OF.dropout_add_layer_norm(x, r, (C,), w, b, seed=3),
        [ones(4, C), ones(4, C), ones(C), ones(C)],
    ),
    "dropout_add_rms_norm": (
        lambda x, r, w: OF.dropout_add_rms_norm(x, r, (C,), w, seed=3),
        [ones(4, C), ones(4, C), ones(C)],
    ),
}
EVERY_ARGUMENT = [(name, i) for name, (_, tensors) in CALLS.items() for i in range(len(tensors))]


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_mode_sees_every_function(name):
    call, tensors = CALLS[name]
    expected = call(*tensors)
    with Watch() as outer, Watch() as inner:
        came = call(*tensors)
    assert getattr(OF, name) in inner.seen
    assert getattr(OF, name) in outer.seen
    for y, like in zip(as_tuple(came), as_tuple(expected), strict=True):
        assert torch.equal(y, like)


@pytest.mark.parametrize(("name", "position"), EVERY_ARGUMENT)
def test_an_argument_of_another_kind_answers(name, position):
    """It need not be a tensor, and hears of the call in every place."""

    class Answers:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, types

    call, tensors = CALLS[name]
    tensors = [Answers() if i == position else t for i, t in enumerate(tensors)]
    function, types = call(*tensors)
    assert function is getattr(OF, name)
    assert Answers in types


class Named(torch.Tensor):
    """A subclass as torch's documentation shows it: its results are of it, too."""


@pytest.mark.parametrize("name", CALLS)
def test_results_are_of_the_subclass(name):
    call, tensors = CALLS[name]
    expected = call(*tensors)
    came = call(tensors[0].as_subclass(Named), *tensors[1:])
    for y, like in zip(as_tuple(came), as_tuple(expected), strict=True):
        assert type(y) is Named
        assert_close(y.as_subclass(torch.Tensor), like, 1e-6, name)


def test_nobody_is_asked_where_overrides_are_off():
    with Watch() as mode, torch._C.DisableTorchFunction():
        OF.layer_norm(ones(4, C), (C,))
    assert OF.layer_norm not in mode.seen


def layers(lib) -> dict[str, nn.Module]:
    return {
        "LayerNorm": lib.LayerNorm(C),
        "RMSNorm": lib.RMSNorm(C),
        "BatchNorm1d": lib.BatchNorm1d(C),
        "SyncBatchNorm": lib.SyncBatchNorm(C),
        "Dropout": lib.Dropout(0.5),
    }


OURS = {
    "BatchNormAct1d": onepass.nn.BatchNormAct1d(C),
    "DropoutAddLayerNorm": onepass.nn.DropoutAddLayerNorm(C),
    "DropoutAddRMSNorm": onepass.nn.DropoutAddRMSNorm(C),
}
FUNCTIONS = {
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "BatchNorm1d": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "Dropout": "dropout",
    "BatchNormAct1d": "batch_norm_activation",
    "DropoutAddLayerNorm": "dropout_add_layer_norm",
    "DropoutAddRMSNorm": "dropout_add_rms_norm",
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_mode_sees_modules_call_functions(kind):
    module = (layers(onepass.nn) | OURS)[kind]
    x = torch.randn(4, C)
    inputs = (x, x) if kind.startswith("DropoutAdd") else (x,)
    before = copy.deepcopy(module)
    expected = module(*inputs) if "Drop" not in kind else None
    with Watch() as mode:
        came = before(*inputs)
    assert getattr(OF, FUNCTIONS[kind]) in mode.seen
    if expected is not None:
        assert torch.equal(came, expected)
    for (name, b), c in zip(module.named_buffers(), before.buffers(), strict=True):
        if expected is not None:
            assert torch.equal(b, c), f"{name} differs under a mode"


def test_a_mode_under_compile():
    """A graph, and the mode, as torch.compile has it for Python functions, sees something of the call."""
    norm = onepass.nn.LayerNorm(C)
    x = torch.randn(4, C)
    with Watch():
        came = torch.compile(norm, backend="eager")(x)
    torch._dynamo.reset()
    assert_close(came, norm(x), 1e-6, "compiled under a mode")


# --- torch.fx ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", layers(nn))
def test_symbolic_trace_keeps_modules_whole(kind):
    """One node call_module, as for torch's; training and evaluation stay a matter of the module."""
    model = nn.Sequential(nn.Linear(3, C), layers(nn)[kind])
    expected = [(node.op, node.target, str(node.args)) for node in torch.fx.symbolic_trace(model).graph.nodes]
    onepass.convert(model)
    before = copy.deepcopy(model.state_dict())
    traced = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target, str(node.args)) for node in traced.graph.nodes] == expected
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"tracing wrote to {key}"
    x = torch.randn(5, 3)
    assert torch.equal(traced.eval()(x), model.eval()(x))
    reloaded = pickle.loads(pickle.dumps(traced))
    assert torch.equal(reloaded(x), model(x))


class TwoInputs(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, residual):
        return self.layer(x, residual=residual)


@pytest.mark.parametrize("kind", OURS)
def test_symbolic_trace_of_layers_with_a_residual(kind):
    model = TwoInputs(copy.deepcopy(OURS[kind])).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["layer"]
    x, residual = torch.randn(4, C), torch.randn(4, C)
    for y, like in zip(as_tuple(traced(x, residual)), as_tuple(model(x, residual)), strict=True):
        assert torch.equal(y, like)


class Doubled(onepass.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


def test_symbolic_trace_goes_into_what_is_not_only_ours():
    """A subclass with a forward of its own, and a forward replaced on the instance, are more than the layer."""
    patched = onepass.nn.RMSNorm(C)
    patched.forward = lambda x: OF.rms_norm(x, (C,)) + 1
    x = torch.randn(4, C)
    for layer in (Doubled(C), patched):
        model = nn.Sequential(layer)
        traced = torch.fx.symbolic_trace(model)
        assert torch.equal(traced(x), model(x))
        assert not [n for n in traced.graph.nodes if n.op == "call_module"]


def test_a_tracer_that_keeps_nothing_whole():
    """It asks what a layer is made of, and finds our function with the layer's parameters."""

    class Flat(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    model = nn.Sequential(onepass.nn.LayerNorm(C), onepass.nn.Dropout(0.5)).eval()
    graph = Flat().trace(model)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [OF.layer_norm, OF.dropout]
    traced = torch.fx.GraphModule(model, graph)
    x = torch.randn(4, C)
    assert torch.equal(traced(x), model(x))


def test_functions_in_a_traced_forward():
    class Net(nn.Module):
        def forward(self, x, residual):
            return OF.dropout_add_rms_norm(OF.layer_norm(x, (C,)), residual, (C,), training=self.training)

    model = Net().eval()
    traced = torch.fx.symbolic_trace(model)
    x, residual = torch.randn(4, C), torch.randn(4, C)
    for y, like in zip(traced(x, residual), model(x, residual), strict=True):
        assert torch.equal(y, like)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its TorchScript
def test_fusion_of_convolutions():
    """fx folds by exact type: a converted model stays as it is and right, a restored one is folded."""
    import torch.fx.experimental.optimization as fx_optimization

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    onepass.convert(model)
    assert_close(fx_optimization.fuse(model)(x), expected, 1e-5, "fused as it is")
    folded = fx_optimization.fuse(onepass.restore(model))
    assert [type(m) for m in folded.children()] == [nn.Conv2d]
    assert_close(folded(x), expected, 1e-5, "folded")


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)
