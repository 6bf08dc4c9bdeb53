"""Exporting a model: TorchScript, torch.export, AOTInductor and ONNX find torch's own operators in our layers."""

import copy
import io
import shutil

import onepass
import pytest
import torch
from onepass.nn import functional as OF
from support import assert_close
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own warning: TorchScript is deprecated
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch's own warning, while it copies an exported program
]
C = 6
ours = onepass.nn

# Layers, and the number and shape of their inputs.
LAYERS = {
    "LayerNorm": (lambda: ours.LayerNorm(C), 1, (4, C)),
    "LayerNorm over two dimensions": (lambda: ours.LayerNorm((5, C), bias=False), 1, (4, 5, C)),
    "LayerNorm without weights": (lambda: ours.LayerNorm(C, elementwise_affine=False), 1, (4, C)),
    "RMSNorm": (lambda: ours.RMSNorm(C), 1, (4, C)),
    "RMSNorm with eps": (lambda: ours.RMSNorm(C, eps=0.1), 1, (4, C)),
    "BatchNorm1d": (lambda: ours.BatchNorm1d(C), 1, (4, C)),
    "BatchNorm1d, cumulative": (lambda: ours.BatchNorm1d(C, momentum=None), 1, (4, C)),
    "BatchNorm1d without statistics": (lambda: ours.BatchNorm1d(C, track_running_stats=False), 1, (4, C)),
    "BatchNorm2d": (lambda: ours.BatchNorm2d(C, affine=False), 1, (4, C, 3, 3)),
    "BatchNorm3d": (lambda: ours.BatchNorm3d(C), 1, (4, C, 3, 3, 2)),
    "BatchNormAct1d": (lambda: ours.BatchNormAct1d(C), 1, (4, C)),
    "BatchNormAct1d with a residual": (lambda: ours.BatchNormAct1d(C, activation="leaky_relu"), 2, (4, C)),
    "BatchNormAct1d without activation": (lambda: ours.BatchNormAct1d(C, activation=None), 2, (4, C)),
    "Dropout": (lambda: ours.Dropout(0.4), 1, (4, C)),
    "Dropout of the paper": (lambda: ours.Dropout(0.4, inverted=False), 1, (4, C)),
    "DropoutAddLayerNorm": (lambda: ours.DropoutAddLayerNorm(C, 0.4), 2, (4, C)),
    "DropoutAddRMSNorm": (lambda: ours.DropoutAddRMSNorm(C, 0.4, inverted=False), 2, (4, C)),
}
# torch.jit.trace cannot record torch's own check of the batch size either.
CHECKS_THE_BATCH = "ignore:Converting a tensor to a Python boolean"
CASES = [(name, training) for name in LAYERS for training in (False, True)]


def make(name: str, training: bool) -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    """A layer that has already been trained, and two inputs with different batch sizes."""
    torch.manual_seed(3)
    create, count, shape = LAYERS[name]
    layer = create()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    inputs = [tuple(torch.randn(rows, *shape[1:]) for _ in range(count)) for rows in (shape[0], 2 * shape[0])]
    return layer.train(training), inputs


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def assert_same_layer(name, training, came, inputs) -> None:
    """Assert equal outputs and buffers; for dropout in training, equal values where kept."""
    layer, _ = make(name, training)
    expected, found = as_tuple(layer(*inputs)), as_tuple(came(*inputs))
    if training and "Dropout" in name:
        total = found[-1] - (inputs[1] if len(inputs) == 2 else 0)
        scale = 1.0 if layer.inverted is False else 1 / 0.6
        kept = (total - inputs[0] * scale).abs() < 1e-5
        assert kept.any()
        assert ((total.abs() < 1e-6) | kept).all(), "neither kept nor dropped"
        assert not kept.all()
        return
    for y, like in zip(found, expected, strict=True):
        assert_close(y, like, 2e-6, name)
    buffers = dict(came.named_buffers())
    for key, buffer in layer.named_buffers() if training else ():
        found = next(value for name, value in buffers.items() if name.endswith(key))  # strict export adds a prefix
        assert_close(found.double(), buffer.double(), 1e-6, f"{key} of {name}")


# --- TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "training"), CASES)
def test_script(name, training):
    """Also saved and loaded; it contains none of our operators."""
    layer, inputs = make(name, training)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    assert "torch.ops.onepass" not in scripted.code
    assert type(layer).__module__.startswith("onepass.nn."), "scripting changed the layer"
    assert_same_layer(name, training, scripted, inputs[1])


def test_script_of_a_converted_model():
    model = onepass.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))).eval()
    x = torch.randn(2, 3, 5, 5)
    frozen = torch.jit.freeze(torch.jit.script(model))
    assert_close(frozen(x), model(x), 1e-5, "frozen")
    assert isinstance(model[1], ours.BatchNorm2d)


@pytest.mark.filterwarnings(CHECKS_THE_BATCH)
@pytest.mark.parametrize(("name", "training"), CASES)
def test_trace(name, training):
    layer, inputs = make(name, training)
    traced = torch.jit.trace(layer, inputs[0], check_trace=False)
    for key, buffer in make(name, training)[0].named_buffers():
        traced.get_buffer(key).copy_(buffer)  # tracing ran the layer
    graph = str(traced.inlined_graph)
    assert "onepass::" not in graph
    assert "PythonOp" not in graph
    assert_same_layer(name, training, traced, inputs[1])


def test_trace_of_evaluation_is_silent():
    """No shape becomes a constant, and torch does not warn that one might."""
    model = nn.Sequential(ours.BatchNorm1d(C), ours.LayerNorm(C), ours.RMSNorm(C), ours.Dropout(0.5)).eval()
    torch.jit.trace(model, (torch.randn(4, C),))


@pytest.mark.parametrize("options", [{"seed": 3}, {"generator": torch.Generator()}], ids=["seed", "generator"])
def test_trace_refuses_a_given_mask(options):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a dropout with a seed or a generator"):
        torch.jit.trace(lambda x: OF.dropout(x, 0.5, **options), (torch.ones(4, C),))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a dropout with a seed or a generator"):
        torch.jit.trace(lambda x: OF.dropout_add_rms_norm(x, x, (C,), **options), (torch.ones(4, C),))


# --- torch.export -----------------------------------------------------------------------------------------------------


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize(("name", "training"), CASES)
def test_export(name, training, strict):
    """For every batch size; the operators are torch's, before and after decomposition."""
    layer, inputs = make(name, training)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, inputs[0], strict=strict, dynamic_shapes=tuple({0: rows} for _ in inputs[0]))
    decomposed = program.run_decompositions()
    for each in (program, decomposed):
        assert not [target for target in operators(each) if "onepass" in target]
    for each in (program, decomposed):  # they share their buffers
        assert_same_layer(name, training, copy.deepcopy(each.module()), inputs[1])


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm1d", "Dropout"])
def test_exported_operators_are_those_of_torchs_layer(name):
    """The operators of torch's exported layer: a single one, with nothing around it, if torch has one."""
    if name == "RMSNorm" and not onepass._compat.RMS_NORM_TAKES_SYMBOLS:
        pytest.skip("this torch exports its own rms_norm for one batch size only")
    come, expected = [], []
    for lib, found in ((ours, come), (nn, expected)):
        layer = getattr(lib, name)(*([] if name == "Dropout" else [C]))
        layer.num_batches_tracked = None
        found += operators(torch.export.export(layer, (torch.ones(4, C),), strict=False))
    assert come == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_export_of_mixed_dtypes(dtype):
    """float32 weights beside 16-bit inputs, which torch's functions do not always accept."""
    x = torch.randn(4, C).to(dtype)
    for layer in (ours.LayerNorm(C), ours.RMSNorm(C), ours.BatchNorm1d(C)):
        program = torch.export.export(layer, (x,), strict=False)
        expected = copy.deepcopy(layer)(x)
        came = program.module()(x)
        assert came.dtype == dtype
        assert_close(came.float(), expected.float(), 1e-2, str(layer))


def test_export_with_a_seed():
    """The mask is a function of the seed, for every shape; its operator stays in the program."""

    class Net(nn.Module):
        def forward(self, x):
            return OF.dropout(x, 0.5, seed=7)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Net(), (torch.ones(4, C),), dynamic_shapes=({0: rows},))
    x = torch.randn(9, C)
    assert torch.equal(program.module()(x), OF.dropout(x, 0.5, seed=7))


class Small(nn.Module):
    """Every kind of layer once."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.norm, self.rms, self.drop = nn.LayerNorm(C), nn.RMSNorm(C), nn.Dropout(0.5)

    def forward(self, x):
        h = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.rms(self.drop(self.norm(h)))


def trained() -> tuple[nn.Module, torch.Tensor]:
    model, x = Small(), torch.randn(4, 3, 8, 8)
    model(x)
    return model.eval(), x


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path):
    """A converted model becomes a library that does not need onepass."""
    if not hasattr(torch._inductor, "aoti_compile_and_package"):
        pytest.skip("this torch cannot package a compiled library")
    model, x = trained()
    expected = model(x).detach()
    program = torch.export.export(onepass.convert(model), (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_close(torch._inductor.aoti_load_package(path)(x).detach(), expected, 1e-5, "AOTInductor")


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx(dynamo, tmp_path):
    """The same operators as before conversion."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = trained()
    if not dynamo:
        model.rms = nn.Identity()  # this exporter does not support torch's RMSNorm

    def nodes(which: nn.Module) -> list[str]:
        path = str(tmp_path / "model.onnx")
        torch.onnx.export(which, (x,), path, dynamo=dynamo, verbose=False)
        return [f"{node.domain}::{node.op_type}" for node in onnx.load(path).graph.node]

    expected = nodes(copy.deepcopy(model))
    assert nodes(onepass.convert(model)) == expected
