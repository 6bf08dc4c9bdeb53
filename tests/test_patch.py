"""onepass.patch: torch's functions on our kernels, in this thread, for as long as it lasts."""

import subprocess
import sys
import threading

import onepass
import pytest
import torch
from support import assert_close
from torch import nn
from torch.nn import functional as F

NAMES = ("dropout", "layer_norm", "rms_norm", "batch_norm", "scaled_dot_product_attention")
OWN = {name: getattr(F, name) for name in NAMES} | {f"torch.{n}": getattr(torch, n) for n in ("layer_norm", "rms_norm")}


@pytest.fixture(autouse=True)
def gone():
    yield
    assert all(getattr(F, name) is OWN[name] for name in NAMES), "a patch is left"
    assert torch.layer_norm is OWN["torch.layer_norm"]
    assert torch.rms_norm is OWN["torch.rms_norm"]


@pytest.fixture
def calls(monkeypatch):
    """Names of our functions in the order of their calls."""
    from onepass._conversion import functions

    seen = []

    def spy(name):
        own = getattr(onepass.nn.functional, name)

        def call(*args, **kwargs):
            seen.append(name)
            return own(*args, **kwargs)

        return call

    namespace = type("F", (), {name: staticmethod(spy(name)) for name in NAMES[:4]})
    monkeypatch.setattr(functions, "F", namespace)
    return seen


X = torch.randn(6, 8)
W, B, MEAN, VAR = torch.rand(8), torch.rand(8), torch.zeros(8), torch.ones(8)
CALLS = {
    "dropout": lambda: F.dropout(X, 0.5),
    "layer_norm": lambda: F.layer_norm(X, (8,), W, B),
    "rms_norm": lambda: F.rms_norm(X, (8,), W, 1e-6),
    "batch_norm": lambda: F.batch_norm(X, MEAN, VAR, W, B, True),
    "torch.layer_norm": lambda: torch.layer_norm(X, (8,), W, B),
    "torch.rms_norm": lambda: torch.rms_norm(X, (8,), W, 1e-6),
    "nn.LayerNorm": lambda: nn.LayerNorm(8)(X),
    "nn.Dropout": lambda: nn.Dropout(0.5)(X),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_run_on_our_kernels(name, calls):
    with onepass.patch():
        y = CALLS[name]()
    assert len(calls) == 1
    if "ropout" not in name:
        assert_close(y, CALLS[name](), 1e-5, name)
    CALLS[name]()
    assert len(calls) == 1, "a call after the end"


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.dropout(torch.ones(3, device="meta"), 0.5),
        lambda: F.layer_norm(nn.Buffer(X) if hasattr(nn, "Buffer") else X.as_subclass(Subclass), (8,)),
        lambda: F.layer_norm(X.as_subclass(Subclass), (8,)),
    ],
    ids=["meta", "buffer", "subclass"],
)
def test_the_rest_is_torchs(call, calls):
    expected = call()
    with onepass.patch():
        y = call()
    assert type(y) is type(expected)
    assert y.dtype == expected.dtype
    assert y.device == expected.device


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.layer_norm(X, (7,)),
        lambda: F.dropout(X, 1.5),
        lambda: F.dropout(torch.ones(3, dtype=torch.int64), 0.5),
        lambda: F.batch_norm(X[:1], MEAN, VAR, training=True),
        lambda: F.scaled_dot_product_attention(X, X, X, X, 0.5, True),
    ],
    ids=["shape", "p", "integers", "one value", "mask and causal"],
)
def test_errors_are_torchs(call):
    with pytest.raises((RuntimeError, ValueError)) as expected:
        call()
    with onepass.patch(), pytest.raises(type(expected.value)) as came:
        call()
    assert str(came.value)[:25] == str(expected.value)[:25]


def test_nested_patches_and_exceptions(calls):
    with onepass.patch():
        with pytest.raises(KeyError), onepass.patch():
            raise KeyError
        CALLS["layer_norm"]()
        assert calls == ["layer_norm"], "the inner end ended the outer one"
    CALLS["layer_norm"]()
    assert calls == ["layer_norm"]


def test_start_and_stop(calls):
    patcher = onepass.patch().start()
    CALLS["rms_norm"]()
    patcher.stop()
    CALLS["rms_norm"]()
    assert calls == ["rms_norm"]
    with pytest.raises(RuntimeError, match="no patch is active"):
        patcher.stop()


def test_as_a_decorator(calls):
    @onepass.patch()
    def step():
        return CALLS["layer_norm"]()

    step()
    assert step.__name__ == "step"
    assert calls == ["layer_norm"]


def test_other_threads_are_not_affected(calls):
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        CALLS["layer_norm"]()
        with onepass.patch():
            CALLS["rms_norm"]()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with onepass.patch():
        inside.set()
        assert done.wait(10)
        assert calls == ["rms_norm"]
        CALLS["dropout"]()
    thread.join()
    assert calls == ["rms_norm", "dropout"]


def test_under_compile_and_transforms():
    """torch.compile has torch's functions; transforms have ours."""
    expected = F.layer_norm(X, (8,), W, B)
    with onepass.patch():
        compiled = torch.compile(lambda x: F.layer_norm(F.dropout(x, 0.0), (8,), W, B), backend="aot_eager")
        assert_close(compiled(X), expected, 1e-5, "compiled")
        assert_close(torch.vmap(lambda x: F.layer_norm(x, (8,), W, B))(X), expected, 1e-5, "vmap")
        gradient = torch.func.grad(lambda x: F.layer_norm(x, (8,), W, B).square().sum())(X)
    assert_close(compiled(X), expected, 1e-5, "compiled, afterwards")
    x = X.clone().requires_grad_()
    F.layer_norm(x, (8,), W, B).square().sum().backward()
    assert_close(gradient, x.grad, 1e-4, "gradient")


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch.func.jvp
@pytest.mark.parametrize("name", NAMES[:4])
def test_transforms_of_every_function(name):
    """What falls back to torch's function must not come back to ours."""
    call = {
        "dropout": lambda x: F.dropout(x, 0.0),
        "layer_norm": lambda x: F.layer_norm(x, (8,), W, B),
        "rms_norm": lambda x: F.rms_norm(x, (8,), W, 1e-6),
        "batch_norm": lambda x: F.batch_norm(x, None, None, W, B, True),
    }[name]
    x = torch.randn(5, 8)
    expected = torch.func.grad(lambda x: call(x).pow(3).sum())(x)
    with onepass.patch():
        assert_close(torch.func.grad(lambda x: call(x).pow(3).sum())(x), expected, 1e-4, "grad")
        assert torch.vmap(call)(torch.randn(3, 5, 8)).shape == (3, 5, 8)
        torch.func.jvp(call, (x,), (x,))
        assert call(x[:0]).shape == (0, 8) if name != "batch_norm" else True


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_tools_see_torchs_functions():
    class Norm(nn.Module):
        def forward(self, x):
            return F.layer_norm(F.dropout(x, 0.5, self.training), (8,))

    with onepass.patch():
        graph = torch.fx.symbolic_trace(Norm().eval()).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [OWN["dropout"], OWN["layer_norm"]]

    class Overriding(torch.Tensor):
        seen: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = X.as_subclass(Overriding)
    with onepass.patch():
        F.layer_norm(x, (8,))
    assert OWN["layer_norm"] in Overriding.seen
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])
    with onepass.patch():
        assert F.dropout(nested, 0.5).is_nested


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripting_within_a_patch():
    with onepass.patch():
        scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.0)))
    assert_close(scripted(X), F.layer_norm(X, (8,)), 1e-5, "y")


def test_generators_and_coroutines_are_refused():
    def generate():
        yield 1

    async def wait():
        pass

    for function in (generate, wait):
        with pytest.raises(TypeError, match="generator or coroutine"):
            onepass.patch()(function)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(1000, requires_grad=True)
    with onepass.patch():
        y = checkpoint(lambda x: F.dropout(x * x, 0.5), x, use_reentrant=reentrant)
        y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0)


def test_a_sample_that_is_all_padding():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    padding = torch.tensor([[False] * 3, [True] * 3])
    with onepass.patch():
        layer(torch.randn(2, 3, 8), src_key_padding_mask=padding).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


FIRST_COMPILED = """
import torch, onepass
call = lambda x: torch.nn.functional.layer_norm(x, (8,))
x = torch.randn(3, 8)
if {loaded}:
    torch.compile(lambda x: x + 1, backend="eager")(x)
with onepass.patch():
    first = torch.compile(call, backend="eager", fullgraph=True)(x)
torch._dynamo.reset()
assert torch.allclose(torch.compile(call, backend="eager", fullgraph=True)(x), first, atol=1e-6)
"""


@pytest.mark.parametrize("loaded", [False, True])
def test_a_first_compilation_within_a_patch(loaded):
    """torch.compile looks torch's functions up by name once: it must not keep ours."""
    run = subprocess.run([sys.executable, "-c", FIRST_COMPILED.format(loaded=loaded)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_autocast_keeps_torchs_dtypes():
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.layer_norm(X.bfloat16(), (8,)).dtype
        with onepass.patch():
            assert F.layer_norm(X.bfloat16(), (8,)).dtype == expected


# --- attention -----------------------------------------------------------------------------------------------------------


def attention_cases():
    bool_mask = torch.rand(5, 7) < 0.7
    empty = bool_mask.clone()
    empty[2] = False
    yield "plain", {}, (5, 7, 4, 4)
    yield "causal", {"is_causal": True}, (6, 6, 4, 4)
    yield "causal, not square", {"is_causal": True}, (3, 7, 4, 4)
    yield "bool mask", {"attn_mask": bool_mask}, (5, 7, 4, 4)
    yield "a row without keys", {"attn_mask": empty}, (5, 7, 4, 4)
    yield "float mask", {"attn_mask": torch.randn(2, 1, 5, 7)}, (5, 7, 4, 4)
    yield "a row without keys, float", {"attn_mask": torch.zeros(5, 7).masked_fill(~empty, float("-inf"))}, (5, 7, 4, 4)
    yield "scale", {"scale": 0.3}, (5, 7, 4, 4)
    yield "negative scale", {"scale": -0.3}, (5, 7, 4, 4)
    yield "grouped queries", {"enable_gqa": True}, (5, 7, 4, 2)


@pytest.mark.parametrize(("name", "options", "sizes"), list(attention_cases()), ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_with_dropout(name, options, sizes, dtype, calls, monkeypatch):
    """Without dropping anything it is torch's formula; the mask is that of our dropout."""
    length, keys, heads, key_heads = sizes
    query = torch.randn(2, heads, length, 8).to(dtype)
    key, value = (torch.randn(2, key_heads, keys, 8).to(dtype) for _ in range(2))
    if options.get("attn_mask") is not None and options["attn_mask"].is_floating_point():
        options = {**options, "attn_mask": options["attn_mask"].to(dtype)}
    inputs = [t.requires_grad_() for t in (query, key, value)]
    from onepass._conversion import _attention

    monkeypatch.setattr(_attention, "F", type("F", (), {"dropout": staticmethod(lambda x, p: x)}))
    try:
        expected = F.scaled_dot_product_attention(*inputs, dropout_p=0.0, **options)
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"this torch refuses it: {error}")
    if expected.isnan().any():
        pytest.skip("this torch gives NaN for a row without keys")
    with onepass.patch():
        y = F.scaled_dot_product_attention(*inputs, dropout_p=0.5, **options)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(y, expected, tolerance, "y")
    dy = torch.randn(y.shape).to(dtype)
    for came, wanted, label in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), "qkv", strict=True
    ):
        assert_close(came, wanted, 5 * tolerance, f"d{label}")


def test_attention_drops_and_scales():
    query, key, value = torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 100, 4), torch.ones(1, 1, 100, 1)
    with onepass.patch():
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    assert 0.97 < y.mean() < 1.03
    assert y.std() > 0.01, "nothing was dropped"
    with onepass.patch():
        torch.manual_seed(0)
        first = F.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, dropout_p=0.25), first)


def test_a_model_in_training():
    """A transformer layer of torch's modules: functional dropout inside attention, norms, feed-forward."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    x = torch.randn(3, 5, 8)
    with onepass.patch():
        layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
