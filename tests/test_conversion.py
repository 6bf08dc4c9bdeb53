"""onepass.convert beyond torch's classes: norms of other packages, fused blocks, registration, the probe, the way back."""

import copy
import functools
import io
import logging
import pickle

import onepass
import pytest
import torch
from onepass._conversion.swap import replaced_forward
from support import assert_close
from torch import nn

C = 12


# --- norms as other packages write them: top-level classes, so that they pickle ------------------------------------------


class LlamaLikeRMSNorm(nn.Module):
    def __init__(self, size=C, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = eps

    def forward(self, x):
        h = x.to(torch.float32) if x.dtype != torch.float64 else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


class GemmaLikeRMSNorm(nn.Module):
    def __init__(self, size=C, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) - 0.5)
        self.eps = eps

    def forward(self, x):
        h = x.float() if x.dtype != torch.float64 else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 + self.weight.to(h.dtype))).type_as(x)


class T5LikeLayerNorm(nn.Module):
    def __init__(self, size=C, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = eps

    def forward(self, x):
        h = x if x.dtype == torch.float64 else x.to(torch.float32)
        h = x * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            h = h.to(self.weight.dtype)
        return self.weight * h


class OwnLayerNorm(nn.LayerNorm):
    """A subclass with a forward of its own that computes the same."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class TwiceRMSNorm(LlamaLikeRMSNorm):
    """Looks like the others and is not."""

    def forward(self, x):
        return super().forward(x) * 2


class NormInTraining(LlamaLikeRMSNorm):
    """Another function in evaluation: a comparison in training alone would miss it."""

    def forward(self, x):
        return super().forward(x) if self.training else x


NORMS = {
    "Llama": (LlamaLikeRMSNorm, (3, 4, C)),
    "Gemma": (GemmaLikeRMSNorm, (3, 4, C)),
    "T5": (T5LikeLayerNorm, (3, 4, C)),
    "subclass": (lambda: OwnLayerNorm(C), (3, 4, C)),
    "2d": (lambda: LayerNorm2d(C), (2, C, 3, 4)),
}


def run(module, *inputs):
    """Results and gradients, with fresh leaves."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad()
    y = module(*leaves)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
    return {"y": y.detach(), **{f"dx{i}": x.grad for i, x in enumerate(leaves)}} | {
        name: p.grad for name, p in module.named_parameters()
    }


def assert_same_numbers(module, twin, inputs, tolerance=1e-5):
    for training in (True, False):
        expected, came = run(twin.train(training), *inputs), run(module.train(training), *inputs)
        for name, value in expected.items():
            assert came[name].dtype == value.dtype, name
            assert_close(came[name], value, tolerance, f"{name}, training {training}")
    for (name, b), (_, other) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        assert_close(b, other, tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_other_packages(name, dtype):
    make, shape = NORMS[name]
    model = nn.Sequential(make().to(dtype))
    twin, kind = copy.deepcopy(model), type(model[0])
    parameters, keys = list(model.parameters()), list(model.state_dict())
    rows = onepass.convert(model, report=True)
    assert [row.now is not None for row in rows] == [True], rows
    assert replaced_forward(model[0]) is not None
    assert isinstance(model[0], kind)
    assert repr(model) == repr(twin)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    assert_same_numbers(model, twin, [torch.randn(shape).to(dtype)], tolerance)
    assert onepass.convert(model, report=True) == [], "a second call changes nothing"
    assert type(onepass.restore(model)[0]) is kind
    ones = torch.ones(shape, dtype=dtype)
    assert torch.equal(model(ones), twin(ones)), "restored"


@pytest.mark.parametrize("name", ["Llama", "Gemma", "T5"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_dtype_of_the_result(name, dtypes):
    """Input and weight of two dtypes: what autocast makes of a model. The result's dtype is the class's own."""
    weight, x = dtypes
    module = NORMS[name][0]().to(weight)
    twin = copy.deepcopy(module)
    onepass.convert(module)
    assert replaced_forward(module) is not None
    value = torch.randn(2, C).to(x)
    assert module(value).dtype == twin(value).dtype
    assert_close(module(value), twin(value), 3e-2, "y")


@pytest.mark.parametrize("kind", [TwiceRMSNorm, NormInTraining])
def test_a_module_that_computes_something_else_is_left(kind, caplog):
    model = nn.Sequential(kind())
    with caplog.at_level(logging.INFO, logger="onepass"):
        (row,) = onepass.convert(model, report=True)
    assert row.module == "0"
    assert row.now is None
    assert "differs" in row.why_not
    assert kind.__name__ in caplog.text
    assert type(model[0]) is kind


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_modules_that_cannot_be_compared_are_left():
    meta = nn.Sequential(LlamaLikeRMSNorm().to("meta"))
    (row,) = onepass.convert(meta, report=True)
    assert "meta" in row.why_not
    torchs = nn.Sequential(nn.TransformerEncoderLayer(C, 2, C), nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    left = [row.module for row in onepass.convert(torchs.to("meta"), report=True) if row.now is None]
    assert left == ["0.self_attn"], "torch's own are known, so nothing is compared"

    replaced = LlamaLikeRMSNorm()
    replaced.forward = lambda x: x
    (row,) = onepass.convert(nn.Sequential(replaced), report=True)
    assert "replaced on the instance" in row.why_not

    scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(C), nn.BatchNorm1d(C), nn.ReLU()))
    assert onepass.convert(scripted, report=True) == []


def test_the_comparison_leaves_no_trace():
    """Random state, hooks, gradients, buffers and the training flag are as before."""
    model = nn.Sequential(GemmaLikeRMSNorm()).eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[0].weight.grad = torch.ones(C)
    state, values = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    onepass.convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert (model[0].weight.grad == 1).all()
    assert torch.equal(model[0].weight, values["0.weight"])
    assert not model[0].training
    model(torch.randn(2, C))
    assert calls == [1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles(how):
    model = onepass.convert(nn.Sequential(GemmaLikeRMSNorm(), nn.BatchNorm1d(C), nn.ReLU()))
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert again[0].weight is not model[0].weight
    x = torch.randn(5, C)
    assert torch.equal(again(x), model(x))
    assert type(onepass.restore(again)[0]) is GemmaLikeRMSNorm


# --- blocks --------------------------------------------------------------------------------------------------------------


class Basic(nn.Module):
    """A residual block as torchvision has it, or, with acts, as timm has it."""

    def __init__(self, stride=1, activation=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, stride, 1, bias=False), nn.BatchNorm2d(C)
        self.relu = activation()
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, 1, 1, bias=False), nn.BatchNorm2d(C)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(C, C, 1, stride, bias=False), nn.BatchNorm2d(C))

    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + residual)


class BertOutput(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(C, C), nn.LayerNorm(C), nn.Dropout(p)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class VisionBlock(nn.Module):
    def __init__(self, scale=nn.Identity):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.mlp = nn.Linear(C, C), nn.Sequential(nn.Linear(C, C), nn.GELU())
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = scale(), scale(), nn.Identity(), nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Attention(nn.Module):
    head_dim = 4

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(C, C)

    def forward(self, hidden_states, position_embeddings, attention_mask):
        cos, sin = position_embeddings
        return self.proj(hidden_states) * cos[..., :1] + sin[..., :1], None


class DecoderBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), nn.Linear(C, C)
        self.input_layernorm, self.post_attention_layernorm = LlamaLikeRMSNorm(), LlamaLikeRMSNorm()

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None):
        h, _ = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, attention_mask)
        x = hidden_states + h
        return x + self.mlp(self.post_attention_layernorm(x))


def tokens(*shape):
    return torch.randn(*shape)


BLOCKS = {
    "Sequential": (lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()), [(2, C, 5, 5)]),
    "Sequential of leaky": (lambda: nn.Sequential(nn.BatchNorm1d(C), nn.LeakyReLU(0.2), nn.Linear(C, 3)), [(5, C)]),
    "Basic": (Basic, [(2, C, 6, 6)]),
    "Basic of stride 2": (lambda: Basic(2), [(2, C, 6, 6)]),
    "BertOutput": (BertOutput, [(2, 5, C), (2, 5, C)]),
    "VisionBlock": (VisionBlock, [(2, 5, C)]),
    "DecoderBlock": (DecoderBlock, [(2, 5, C), "angles"]),
    **{
        f"{kind.__name__}, norm_first {first}": (
            lambda kind=kind, first=first: kind(C, 2, 16, dropout=0.0, norm_first=first, batch_first=True),
            [(2, 5, C)] * (2 if kind is nn.TransformerDecoderLayer else 1),
        )
        for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        for first in (False, True)
    },
}


def inputs_of(name):
    torch.manual_seed(3)
    return [torch.randn(2, 5, 4) if shape == "angles" else torch.randn(shape) for shape in BLOCKS[name][1]]


def call(block, inputs):
    if isinstance(block, DecoderBlock):
        x, angles = inputs
        return lambda *leaves: block(leaves[0], position_embeddings=(angles, angles)), [x]
    return block, inputs


class Wrapped(nn.Module):
    """Calls a DecoderBlock as models do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *angles):
        return self.block(x, position_embeddings=(angles[0], angles[0])) if angles else self.block(x)


def wrapped(name):
    block = BLOCKS[name][0]()
    return Wrapped(block) if isinstance(block, DecoderBlock) else block


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_blocks(name):
    model = wrapped(name).double()
    twin, inputs = copy.deepcopy(model), [x.double() for x in inputs_of(name)]
    onepass.convert(model)
    converted = model.block if isinstance(model, Wrapped) else model
    assert replaced_forward(converted) is not None, "not fused"
    assert_same_numbers(model, twin, inputs, 1e-9)
    onepass.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse_false_converts_layers_alone(name):
    model = onepass.convert(wrapped(name), fuse=False)
    assert all(not list(m.children()) for m in model.modules() if replaced_forward(m) is not None)


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_of_modules_inside_are_called(name):
    """A module whose call is observed is called, and what its hook returns counts."""
    model = wrapped(name)
    twin, inputs = copy.deepcopy(model), inputs_of(name)
    onepass.convert(model)
    calls = []
    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    for module in leaves:
        module.register_forward_hook(lambda module, _, y: calls.append(module))
    model(*inputs)
    observed = {id(m) for m in calls}
    expected = []
    for module in twin.modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(lambda module, _, y: expected.append(module))
    twin(*inputs)
    assert len(observed) == len({id(m) for m in expected})


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ["Sequential", "Basic of stride 2", "BertOutput", "VisionBlock"])
def test_compiled_exported_and_traced_blocks(name):
    model = onepass.convert(wrapped(name).eval())
    inputs = inputs_of(name)
    expected = model(*inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), expected, 1e-5, "compiled")
    assert_close(torch.fx.symbolic_trace(model)(*inputs), expected, 1e-5, "fx")
    exported = torch.export.export(model, tuple(inputs)).module()
    assert_close(exported(*inputs), expected, 1e-5, "exported")
    if name == "Sequential":
        assert_close(torch.jit.script(model)(*inputs), expected, 1e-5, "scripted")


def test_dropout_inside_a_block_drops():
    block = onepass.convert(BertOutput(p=0.5))
    with torch.no_grad():  # LayerNorm of the dropped values alone: equal where all of a row is dropped
        block.dense.weight.copy_(torch.eye(C))
        block.dense.bias.zero_()
    x, zero = torch.ones(2000, C), torch.zeros(2000, C)
    torch.manual_seed(0)
    first, second = block(x, zero), block(x, zero)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(block(x, zero), first)
    dropped = (first < 0).float().mean()  # below the mean of the row
    assert abs(dropped - 0.5) < 0.02
    block.eval()
    assert torch.equal(block(x, zero), block(x, zero))


def test_masks_of_transformer_layers():
    layer = nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True)
    twin, x = copy.deepcopy(layer), torch.randn(2, 5, C)
    onepass.convert(layer)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for options in ({"src_key_padding_mask": padding}, {"src_mask": causal}, {"src_mask": causal, "is_causal": True}):
        assert_close(layer(x, **options), twin(x, **options), 1e-5, str(options.keys()))
    whole = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 16, dropout=0.1, batch_first=True), 2)
    onepass.convert(whole)
    whole(x, src_key_padding_mask=padding).sum().backward()
    assert whole.eval()(x).isfinite().all()


@pytest.mark.parametrize("change", ["scale", "downsample", "norm"])
def test_a_block_that_is_changed_afterwards_computes_what_it_says(change):
    block = onepass.convert(VisionBlock() if change == "scale" else Basic())
    assert replaced_forward(block) is not None
    twin = onepass.restore(copy.deepcopy(block))
    for module in (block, twin):
        torch.manual_seed(1)
        if change == "scale":
            module.ls1 = nn.Linear(C, C)
        elif change == "downsample":
            module.downsample = nn.Conv2d(C, C, 1)
        else:
            module.bn1 = nn.GroupNorm(3, C)
    x = torch.randn(2, 5, C) if change == "scale" else torch.randn(2, C, 6, 6)
    assert_close(block(x), twin(x), 1e-5, change)


def test_a_block_with_layer_scale_is_not_fused():
    block = onepass.convert(VisionBlock(lambda: nn.Linear(C, C)))
    assert replaced_forward(block) is None


# --- modules that look alike and are not -----------------------------------------------------------------------------------


class EpsOutsideRMSNorm(LlamaLikeRMSNorm):
    def forward(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon))


class UnitRMSNorm(LlamaLikeRMSNorm):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * C**0.5 * self.weight


class AnyRankLayerNorm(nn.LayerNorm):
    def forward(self, x):
        if x.dim() == 4:
            x = x.permute(0, 2, 3, 1)
            return nn.functional.layer_norm(x, (C,), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
        return nn.functional.layer_norm(x, (C,), self.weight, self.bias, self.eps)


class PerHeadRMSNorm(LlamaLikeRMSNorm):
    def forward(self, x):
        return super().forward(x.unflatten(-1, (-1, C))).flatten(-2)


class CountingRMSNorm(LlamaLikeRMSNorm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class DropoutLast(BertOutput):
    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.LayerNorm(self.dense(hidden_states) + input_tensor))


class TupleBlock(VisionBlock):
    def forward(self, x):
        return (super().forward(x),)


class OtherFeedForward(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return x * 0


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (EpsOutsideRMSNorm, [(2, C)]),
        (UnitRMSNorm, [(2, C)]),
        (lambda: AnyRankLayerNorm(C), [(2, C, 3, C)]),
        (PerHeadRMSNorm, [(2, 3 * C)]),
        (CountingRMSNorm, [(2, C)]),
        (lambda: DropoutLast(0.0), [(2, C), (2, C)]),
        (TupleBlock, [(2, 3, C)]),
        (lambda: OtherFeedForward(C, 2, 16, dropout=0.0, batch_first=True), [(2, 3, C)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_look_alikes_are_left(make, shapes):
    module = make()
    twin, inputs = copy.deepcopy(module), [1e-3 * torch.randn(shape) for shape in shapes]
    onepass.convert(module, fuse=True)
    if not isinstance(module, (TupleBlock, OtherFeedForward)):
        assert replaced_forward(module) is None
    expected, actual = twin(*inputs), module(*inputs)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected)


class PrivateRMSNorm(LlamaLikeRMSNorm):
    def __init__(self, factor):
        super().__init__()
        self._factor = factor

    def forward(self, x):
        return self._factor * super().forward(x)


def test_modules_made_alike_share_a_comparison_others_do_not():
    model = onepass.convert(nn.ModuleList([PrivateRMSNorm(1.0), PrivateRMSNorm(2.0), PrivateRMSNorm(1.0)]))
    assert [replaced_forward(m) is not None for m in model] == [True, False, True]


def test_parts_replaced_on_an_instance_are_called():
    """How attention maps are captured."""
    layer = onepass.convert(nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True))
    x, calls = torch.randn(2, 3, C), []
    before = layer(x)
    own = layer._sa_block
    layer._sa_block = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    assert_close(layer(x), before, 1e-5, "y")
    assert calls == [1]


# --- calls in other forms ------------------------------------------------------------------------------------------------


class GatedRMSNorm(LlamaLikeRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


def test_names_and_further_arguments():
    norm, x = GatedRMSNorm(), torch.randn(2, C)
    twin = copy.deepcopy(norm)
    onepass.convert(norm)
    assert replaced_forward(norm) is not None
    assert_close(norm(hidden_states=x), twin(x), 1e-5, "by name")
    assert_close(norm(x, x), twin(x, x), 1e-5, "with a gate")
    assert_close(norm(x, gate=None), twin(x), 1e-5, "without a gate")
    with pytest.raises(TypeError, match="argument"):
        norm(other=x)
    block, angles = onepass.convert(DecoderBlock()), torch.randn(2, 3, 4)
    twin = onepass.restore(copy.deepcopy(block))
    x = torch.randn(2, 3, C)
    assert_close(block(x, (angles, angles), None), twin(x, (angles, angles), None), 1e-5, "in order")


def test_fx_traces_the_norms_own_forward():
    model = nn.Sequential(OwnLayerNorm(C), nn.Linear(C, C))
    x, nodes = torch.randn(2, C), len(torch.fx.symbolic_trace(model).graph.nodes)
    expected = model(x)
    traced = torch.fx.symbolic_trace(onepass.convert(model))
    assert len(traced.graph.nodes) == nodes
    assert_close(traced(x), expected, 1e-5, "y")


def test_strides_of_the_result():
    norm = LlamaLikeRMSNorm()
    x = torch.randn(2, 3, 4, C).transpose(1, 2)
    expected = norm(x).stride()
    assert onepass.convert(norm)(x).stride() == expected


def test_a_class_derived_from_the_converted_one(caplog):
    """As FSDP derives one for a module that it shards."""
    layer = onepass.convert(nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True))
    layer.__class__ = type("FSDPLayer", (type(layer),), {})
    x = torch.randn(2, 3, C)
    layer(x).sum().backward()
    assert layer.eval()(x).isfinite().all()
    kind = type(layer)
    with caplog.at_level(logging.WARNING, logger="onepass"):
        onepass.restore(layer)
    assert type(layer) is kind
    assert "derives from the converted one" in caplog.text


def test_a_graph_module_is_left_its_parts_are_not():
    graph = onepass.convert(torch.fx.symbolic_trace(BertOutput()))
    assert replaced_forward(graph) is None
    assert type(graph.LayerNorm) is onepass.nn.LayerNorm
    pickle.dumps(graph)
    graph.recompile()


class OwnReduceNorm(LlamaLikeRMSNorm):
    def __reduce__(self):
        return OwnReduceNorm, ()


def test_modules_that_say_how_to_copy_them():
    again = copy.deepcopy(onepass.convert(OwnReduceNorm()))
    assert replaced_forward(again) is not None
    again(torch.randn(2, C))


def test_errors_of_a_module_leave_it_and_convert_the_rest(registry):
    class FailingNorm(LlamaLikeRMSNorm):
        @property
        def bias(self):
            raise KeyError("bias")

    plain = VisionBlock()
    plain.norm1 = nn.LayerNorm(C, elementwise_affine=False)
    onepass.register_conversion(Scaled, lambda module: module.missing)
    model = nn.ModuleList([nn.LayerNorm(C), FailingNorm(), Scaled(), plain, nn.LayerNorm(C)])
    report = onepass.convert(model, report=True)
    why_not = {row.module: row.why_not for row in report if row.now is None}
    assert "KeyError" in why_not["1"]
    assert "AttributeError" in why_not["2"]
    assert type(model[0]) is type(model[4]) is onepass.nn.LayerNorm


def test_converted_classes_do_not_stay_behind():
    import gc
    import weakref

    class Local(LlamaLikeRMSNorm):
        pass

    gone = weakref.ref(type(onepass.convert(Local())))
    del Local
    gc.collect()
    assert gone() is None


def test_random_generators_are_left(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA was seeded"))
    model = nn.ModuleList([LlamaLikeRMSNorm(), BertOutput(0.5)])
    state = torch.get_rng_state()
    onepass.convert(model)
    assert torch.equal(torch.get_rng_state(), state)


# --- registration --------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """No name, no attribute gives it away."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.gain


def scaled_forward(module, x):
    return onepass.nn.functional.rms_norm(x, (C,), module.gain, 1e-6)


def wrong_forward(module, x):
    return onepass.nn.functional.rms_norm(x, (C,), module.gain, 1.0)


@pytest.fixture
def registry(monkeypatch):
    from onepass._conversion import registry

    monkeypatch.setattr(registry, "_REGISTERED", {})


def test_registered_conversions(registry):
    model = nn.Sequential(Scaled())
    twin = copy.deepcopy(model)
    assert onepass.convert(model, report=True) == []
    onepass.register_conversion(Scaled, lambda module: scaled_forward, example=lambda module: torch.empty(3, C))
    (row,) = onepass.convert(model, report=True)
    assert row.now.endswith("scaled_forward")
    assert_same_numbers(model, twin, [torch.randn(4, C)])
    assert torch.equal(pickle.loads(pickle.dumps(model))[0].gain, model[0].gain)
    onepass.restore(model)
    onepass.register_conversion(Scaled, lambda module: wrong_forward, example=lambda module: torch.empty(3, C))
    (row,) = onepass.convert(model, report=True)
    assert row.now is None
    onepass.register_conversion(Scaled, lambda module: None)
    assert onepass.convert(model, report=True) == []


def group_norm_forward(module, x):
    return nn.functional.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)


def test_a_class_of_torch_can_be_registered(registry):
    """Also one that convert would leave."""
    onepass.register_conversion(nn.GroupNorm, lambda module: group_norm_forward, example=lambda _: torch.empty(2, C, 3))
    (row,) = onepass.convert(nn.Sequential(nn.GroupNorm(3, C)), report=True)
    assert row.now.endswith("group_norm_forward")


def test_a_forward_without_a_name(registry):
    forward = functools.partial(scaled_forward)
    model = nn.Sequential(Scaled())
    onepass.register_conversion(Scaled, lambda module: forward, example=lambda module: torch.empty(3, C))
    (row,) = onepass.convert(model, report=True)
    assert "partial" in row.now
    assert replaced_forward(model[0]) is forward


def test_registration_errors(registry):
    with pytest.raises(TypeError, match="cls must be a subclass of"):
        onepass.register_conversion(torch.ones, lambda module: None)
    with pytest.raises(TypeError, match="make must be callable"):
        onepass.register_conversion(Scaled, 3)
    with pytest.raises(TypeError, match="example must be callable"):
        onepass.register_conversion(Scaled, lambda module: None, example=3)

    def failing(module, x):
        raise KeyError("no")

    onepass.register_conversion(Scaled, lambda module: failing, example=lambda module: torch.empty(3, C))
    (row,) = onepass.convert(nn.Sequential(Scaled()), report=True)
    assert "KeyError" in row.why_not


def test_the_report_is_a_table():
    model = nn.Sequential(nn.LayerNorm(C), TwiceRMSNorm(), nn.GroupNorm(3, C), nn.Linear(C, C))
    report = onepass.convert(model, report=True)
    assert [(row.module, row.now is None, row.why_not is None) for row in report] == [
        ("0", False, True),
        ("1", True, False),
        ("2", True, False),
    ]
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["module", "was", "is", "why", "not"]
    for model in (nn.Linear(C, C), onepass.convert(nn.LayerNorm(C))):
        assert str(onepass.convert(model, report=True)).startswith("nothing to convert: ")


def test_the_report_says_what_is_fused_and_names_attention_with_dropout():
    model = nn.Sequential(nn.TransformerEncoderLayer(C, 2, C), nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    model.append(nn.MultiheadAttention(C, 2))  # without dropout: nothing to say
    rows = {row.module: row for row in onepass.convert(model, report=True)}
    assert rows["0"].now == "fused: dropout + residual + LayerNorm"
    assert rows["1"].now == "fused: BatchNorm + ReLU"
    assert rows["0.self_attn"].now is None
    assert "onepass.patch()" in rows["0.self_attn"].why_not
    assert "2" not in rows


def test_restore_of_a_model_never_converted():
    model = Basic()
    kinds = [type(m) for m in model.modules()]
    assert onepass.restore(model) is model
    assert [type(m) for m in model.modules()] == kinds


# --- the packages themselves, where they are installed -------------------------------------------------------------------


def test_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=2)
    report = onepass.convert(model, report=True)
    assert all(row.now for row in report), report
    assert sum(row.was.endswith("Block") for row in report) == 2


def test_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=10, **sizes))
    report = onepass.convert(model, report=True)
    assert sum(row.was.endswith("LlamaRMSNorm") for row in report if row.now) == 5
