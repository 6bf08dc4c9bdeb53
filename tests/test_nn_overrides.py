"""Modes and subclasses with __torch_function__ see our functions; torch.fx keeps our modules whole."""

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


# A call of every function, given a list of all its tensors.
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
def test_every_argument_with_torch_function_intercepts_the_call(name, position):
    """Any object with __torch_function__ intercepts the call, in every position; it need not be a tensor."""

    class Interceptor:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, types

    call, tensors = CALLS[name]
    tensors = [Interceptor() if i == position else t for i, t in enumerate(tensors)]
    function, types = call(*tensors)
    assert function is getattr(OF, name)
    assert Interceptor in types


class Named(torch.Tensor):
    """A subclass as in torch's documentation: results are of the subclass too."""


@pytest.mark.parametrize("name", CALLS)
def test_results_are_of_the_subclass(name):
    call, tensors = CALLS[name]
    expected = call(*tensors)
    came = call(tensors[0].as_subclass(Named), *tensors[1:])
    for y, like in zip(as_tuple(came), as_tuple(expected), strict=True):
        assert type(y) is Named
        assert_close(y.as_subclass(torch.Tensor), like, 1e-6, name)


def test_disabled_overrides_are_not_called():
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
    """There is a graph, and the mode sees the call to the extent that torch.compile supports for Python functions."""
    norm = onepass.nn.LayerNorm(C)
    x = torch.randn(4, C)
    with Watch():
        came = torch.compile(norm, backend="eager")(x)
    torch._dynamo.reset()
    assert_close(came, norm(x), 1e-6, "compiled under a mode")


# --- torch.fx ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", layers(nn))
def test_symbolic_trace_keeps_modules_whole(kind):
    """One call_module node, as for torch's modules; training and evaluation remain the module's decision."""
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


def test_symbolic_trace_enters_modified_layers():
    """A subclass with its own forward, or a forward replaced on the instance, is more than the layer."""
    patched = onepass.nn.RMSNorm(C)
    patched.forward = lambda x: OF.rms_norm(x, (C,)) + 1
    x = torch.randn(4, C)
    for layer in (Doubled(C), patched):
        model = nn.Sequential(layer)
        traced = torch.fx.symbolic_trace(model)
        assert torch.equal(traced(x), model(x))
        assert not [n for n in traced.graph.nodes if n.op == "call_module"]


def test_a_tracer_that_keeps_nothing_whole():
    """It traces into a layer and finds our function with the layer's parameters."""

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own warning about TorchScript
def test_fusion_of_convolutions():
    """fx folds by exact type: a converted model stays unfolded and correct, a restored one is folded."""
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
