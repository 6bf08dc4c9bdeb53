"""Operators pass torch.library's checks; torch.compile and torch.export have no graph break, forward and backward."""

import copy

import onepass
import pytest
import torch
from layers import gradients
from onepass.nn import functional as OF
from support import assert_close, assert_same, bits
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own warning, while it compiles
    pytest.mark.filterwarnings("ignore:.*graph break:UserWarning"),
]
C = 6  # channels or elements of a row


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linspace(-1, 1, C), torch.linspace(0.5, 2, C)


# Calls, and the shapes of their operands.
CALLS = {
    "layer_norm": (lambda x, w, b: OF.layer_norm(x, (C,), w, b), ((4, C), (C,), (C,))),
    "layer_norm without weights": (lambda x: OF.layer_norm(x, (C,)), ((4, C),)),
    "layer_norm, scalar affine": (lambda x, w, b: OF.layer_norm(x, (C,), w, b), ((4, C), (), ())),
    "rms_norm": (lambda x, w: OF.rms_norm(x, (C,), w), ((4, C), (C,))),
    "batch_norm": (
        lambda x, w, b: OF.batch_norm(x, *statistics(), w, b, training=True),
        ((4, C, 3, 3), (C,), (C,)),
    ),
    "batch_norm without statistics": (lambda x: OF.batch_norm(x, None, None, training=True), ((4, C),)),
    "batch_norm in evaluation": (lambda x, w, b: OF.batch_norm(x, *statistics(), w, b), ((4, C, 3), (C,), (C,))),
    "batch_norm_activation": (
        lambda x, w, b, r: OF.batch_norm_activation(x, *statistics(), w, b, True, residual=r),
        ((4, C, 3, 3), (C,), (C,), (4, C, 3, 3)),
    ),
    "batch_norm_activation in evaluation": (
        lambda x, w, b: OF.batch_norm_activation(x, *statistics(), w, b, activation="leaky_relu"),
        ((4, C, 3), (C,), (C,)),
    ),
    "dropout": (lambda x: OF.dropout(x, 0.4, seed=3), ((4, C),)),
    "dropout, seed drawn": (lambda x: OF.dropout(x, 0.4), ((4, C),)),
    "dropout of the paper": (lambda x: OF.dropout(x, 0.4, seed=3, inverted=False), ((4, C),)),
    "dropout in evaluation": (lambda x: OF.dropout(x, 0.4, training=False, inverted=False), ((4, C),)),
    "dropout_add_layer_norm": (
        lambda x, r, w, b: OF.dropout_add_layer_norm(x, r, (C,), w, b, p=0.4, seed=3),
        ((4, C), (4, C), (C,), (C,)),
    ),
    "dropout_add_rms_norm": (lambda x, r, w: OF.dropout_add_rms_norm(x, r, (C,), w), ((4, C), (4, C), (C,))),
    "dropout_add_layer_norm in evaluation": (
        lambda x, r: OF.dropout_add_layer_norm(x, r, (C,), p=0.4, training=False),
        ((4, C), (4, C)),
    ),
    "dropout_mask": (lambda x: x * OF.dropout_mask((C,), 0.4, 3), ((4, C),)),
}
EVERY_CALL = pytest.mark.parametrize(("call", "shapes"), CALLS.values(), ids=CALLS)


def as_tuple(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def operands(shapes) -> list[torch.Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


# ---- torch.library ---------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records every call of our operators, with copies of the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "onepass":
            grad = "backward" not in func.name()  # backward operators are not differentiated: the formula is
            copies = (
                a.detach().clone().requires_grad_(grad and a.requires_grad) if isinstance(a, torch.Tensor) else a
                for a in args
            )
            self.calls.append((func, tuple(copies), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def registered() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("onepass::")}


def record(call, shapes) -> list:
    inputs = operands(shapes)
    with Recorder() as recorder:
        outputs = [t for t in as_tuple(call(*inputs)) if t.requires_grad]
        torch.autograd.grad([t.sin().sum() for t in outputs], inputs)
    return recorder.calls


@EVERY_CALL
def test_opcheck(call, shapes):
    """Schema, fake, autograd and tracing of every operator that the call and its backward use."""
    for op, args, kwargs in record(call, shapes):
        torch.library.opcheck(op, args, kwargs)


def test_every_operator_is_checked():
    """SyncBatchNorm's operators run in several processes: test_nn_distributed."""
    called = {op.name() for call, shapes in CALLS.values() for op, _, _ in record(call, shapes)}
    missed = {name for name in registered() if "sync" not in name} - {name.split(".")[0] for name in called}
    assert not missed, f"operators that no call of the table reaches: {missed}"
    assert called, "the calls do not go through operators where a mode is active"


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def run(function, inputs) -> list[torch.Tensor]:
    """Results and gradients."""
    ys = as_tuple(function(*inputs))
    dys = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype) for t in ys]
    return [*ys, *torch.autograd.grad(ys, inputs, dys)]


def assert_same_results(came, expected, what) -> None:
    for i, (a, b) in enumerate(zip(came, expected, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"{what}, result {i}"
        assert_close(a, b, 2e-6, f"{what}, result {i}")


@EVERY_CALL
def test_compiled_as_one_graph(call, shapes):
    """With dynamic sizes; test_compiled_network has static ones."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        inputs = operands([(rows, *s[1:]) if s[:1] == (4,) else s for s in shapes])
        torch.manual_seed(1)
        came = run(compiled, inputs)
        torch.manual_seed(1)
        assert_same_results(came, run(call, inputs), f"{rows} rows")


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm_activation", "dropout", "dropout_add_rms_norm"])
def test_the_graph_holds_the_operator(name):
    """One node, which compilers neither decompose nor split."""
    torch._dynamo.reset()
    nodes = []

    def backend(graph_module, example_inputs):
        nodes.extend(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module

    call, shapes = CALLS[name]
    torch.compile(call, fullgraph=True, backend=backend)(*operands(shapes))
    ours = [target for target in nodes if target.startswith("onepass.")]
    assert len(ours) == 1, f"one operator of ours expected in the graph, it has {nodes}"


# Nothing between the operators, so no C++ to compile, which would take longer than everything else here.
@pytest.mark.parametrize(
    "name", ["layer_norm", "rms_norm", "batch_norm without statistics", "dropout", "dropout_add_layer_norm"]
)
def test_inductor_calls_the_operators(name):
    torch._dynamo.reset()
    call, shapes = CALLS[name]
    inputs = operands(shapes)
    assert_same_results(run(torch.compile(call, fullgraph=True), inputs), run(call, inputs), name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_memory_formats(memory_format):
    """The fake returns the kernel's strides."""
    torch._dynamo.reset()
    call = CALLS["batch_norm"][0]
    x, w, b = operands(((4, C, 3, 2), (C,), (C,)))
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    came = run(torch.compile(call, fullgraph=True, backend="aot_eager"), (x, w, b))
    assert_same_results(came, run(call, (x, w, b)), str(memory_format))


class Net(torch.nn.Module):
    """Every layer once, with other operations between them."""

    def __init__(self) -> None:
        super().__init__()
        nn = onepass.nn
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(C, C), nn.BatchNorm1d(C), torch.nn.ReLU(), nn.LayerNorm(C), nn.Dropout(0.3), nn.RMSNorm(C)
        )

    def forward(self, x):
        return self.layers(x).sin() + x


def trained(model, runner, batches) -> list[torch.Tensor]:
    """Outputs and gradients of several batches, in training and then in evaluation."""
    torch.manual_seed(1)
    results = []
    for i, x in enumerate(batches):
        model.train(i < len(batches) - 1)
        model.zero_grad()
        y = runner(x)
        y.square().sum().backward()
        results += [y, *(p.grad.clone() for p in model.parameters())]
    return results


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)], ids=str
)
def test_compiled_network(backend, dynamic):
    """Training and evaluation against eager: outputs, gradients, running statistics, the counter."""
    torch._dynamo.reset()
    model = Net()
    twin = copy.deepcopy(model)
    if backend == "inductor":  # opcheck draws random numbers itself
        model.layers[4].p = twin.layers[4].p = 0.0
    batches = [torch.randn(rows, C) for rows in ((5, 7, 9, 4) if dynamic else (5, 5, 5))]
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic or None)
    came, expected = trained(model, compiled, batches), trained(twin, twin, batches)
    for i, (a, b) in enumerate(zip(came, expected, strict=True)):
        assert_close(a, b, 1e-5, f"result {i}")
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert_close(a, b, 1e-6, key)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_dropout_draws(backend):
    """A new mask for every call, the same after the same manual_seed, and the same in backward."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: OF.dropout(x, 0.4), fullgraph=True, backend=backend)
    x = torch.ones(4000, requires_grad=True)
    torch.manual_seed(2)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(2)
    assert bits(compiled(x)) == bits(first)
    assert not torch.equal(first, second)
    assert 1450 < int((first == 0).sum()) < 1750
    for y in (first, second):
        assert bits(gradients(y, [x], torch.ones_like(y))[0]) == bits(y)


def test_compiled_transforms():
    """torch.func inside a compiled function: right or refused, never silently wrong."""
    torch._dynamo.reset()
    x, w = torch.randn(3, C), torch.randn(C)

    def per_sample(x):
        return torch.func.vmap(torch.func.grad(lambda t: OF.layer_norm(t, (C,), w).sin().sum()))(x)

    def tangent(x):
        return torch.func.jvp(lambda t: OF.rms_norm(t, (C,), w), (x,), (x.cos(),))[1]

    for function in (per_sample, tangent):
        assert_close(torch.compile(function, backend="aot_eager")(x), function(x), 1e-6, function.__name__)


def test_exported():
    model = Net().eval()
    x = torch.randn(3, C)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    for rows in (3, 8):
        x = torch.randn(rows, C)
        assert_close(program.module()(x), model(x), 1e-6, f"{rows} rows")


def test_fake_tensors():
    """Every call works on tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, (call, shapes) in CALLS.items():
        if "batch_norm" in name and "without" not in name:
            continue  # the module's statistics are real tensors
        expected = call(*operands(shapes))
        with FakeTensorMode():
            came = call(*operands(shapes))
        for y, like in zip(as_tuple(came), as_tuple(expected), strict=True):
            assert (y.shape, y.dtype, y.stride()) == (like.shape, like.dtype, like.stride()), name


def test_results_do_not_change_under_a_mode():
    """The operators and the direct route to the kernels give the same bits."""

    def results() -> dict[str, bytes]:
        found = {}
        for name, (call, shapes) in CALLS.items():
            torch.manual_seed(5)
            inputs = operands(shapes)
            for i, t in enumerate(run(call, inputs)):
                found[f"{name}, result {i}"] = bits(t)
        return found

    expected = results()
    with Recorder():
        came = results()
    assert_same(came, expected, "under a dispatch mode")


@pytest.mark.parametrize("rows", [6, 3000], ids=["statistics recomputed", "statistics kept"])
def test_a_mode_sees_operators_in_backward(rows):
    """It sees only the operators, not their parts, whether the norm kept its statistics or not."""
    x = torch.randn(rows, 8, requires_grad=True)
    y = OF.layer_norm(x, (8,))
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    dy = torch.ones_like(y)
    with Names():
        y.backward(dy)
    assert any("onepass" in name for name in names), names
    assert not any("new_empty" in name or "empty_like" in name for name in names), names
