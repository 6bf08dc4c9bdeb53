"""Activation checkpointing: a batch counts once, every other forward counts, and every route saves the same tensors."""

import contextlib
import copy
import functools

import onepass
import pytest
import torch
from layers import leaf
from onepass.nn import functional as OF
from support import assert_close, assert_same, bits
from torch import nn
from torch.utils import checkpoint as torchs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

C = 6
ours = onepass.nn


class Nothing(TorchDispatchMode):
    """A mode that changes nothing, but keeps calls off the direct route to the kernels."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(C, C), ours.BatchNorm1d(C, momentum=momentum), nn.Tanh(), nn.Linear(C, C))


def batches(*models: nn.Module) -> list[int]:
    return [
        int(m.num_batches_tracked) for model in models for m in model.modules() if hasattr(m, "num_batches_tracked")
    ]


# --- a batch counts once ----------------------------------------------------------------------------------------------


class CheckpointFunction(torch.autograd.Function):
    """Checkpointing as other libraries implement it."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, dy):
        x = leaf(ctx.saved_tensors[0])
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


def nested(model, x):
    inner = lambda t: checkpoint(model[1:], t, use_reentrant=False)  # noqa: E731
    return checkpoint(lambda t: inner(model[0](t)), x, use_reentrant=False)


def without_early_stop(model, x):
    with set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


def selective(model, x, *saved):
    if not hasattr(torchs, "create_selective_checkpoint_contexts"):
        pytest.skip("this torch has no selective checkpointing")

    def policy(context, operator, *args, **kwargs):
        return torchs.CheckpointPolicy.MUST_SAVE if operator in saved else torchs.CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(torchs.create_selective_checkpoint_contexts, policy)
    return checkpoint(model, x, use_reentrant=False, context_fn=contexts)


WAYS = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "without early stop": without_early_stop,
    "nested": nested,
    "nested reentrant": lambda model, x: checkpoint(
        lambda t: checkpoint(model[1:], model[0](t), use_reentrant=True), x, use_reentrant=True
    ),
    "mixed": lambda model, x: checkpoint(
        lambda t: checkpoint(model[1:], model[0](t), use_reentrant=False), x, use_reentrant=True
    ),
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "selective": lambda model, x: selective(model, x, torch.ops.aten.addmm.default),
    "another library's": CheckpointFunction.apply,
}


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch's warning about nested reentrant checkpoints
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_counts_once(way, momentum):
    model, plain = network(momentum), network(momentum)
    for _ in range(3):
        x = torch.randn(8, C)
        a, b = leaf(x), leaf(x)
        run = (lambda m, t: CheckpointFunction.apply(m, t)) if way.startswith("another") else WAYS[way]
        run(model, a).square().sum().backward()
        plain(b).square().sum().backward()
        assert_close(a.grad, b.grad, 1e-5, "gradient")
    assert batches(model) == [3]
    for (key, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(value.double(), expected.double(), 1e-6, key)


def test_selective_checkpointing_counts_on_the_order_of_operators():
    """It replays the saved results of an operator in order, so an update of statistics must not come between them."""
    aten = torch.ops.aten
    kept = (aten.square.default, aten.reciprocal.default, aten.lerp.Scalar, aten.mul.Tensor, aten.clamp.default)

    def model(bn, x):
        return (bn(x).square() * x).reciprocal().clamp(-10, 10)

    x = torch.randn(8, C)
    a, b, bn = leaf(x), leaf(x), ours.BatchNorm1d(C)
    model(copy.deepcopy(bn), a).sum().backward()
    selective(functools.partial(model, bn), b, *kept).sum().backward()
    assert_close(b.grad, a.grad, 1e-5, "gradient")
    assert batches(bn) == [1]


# --- any other forward counts, also inside of a backward --------------------------------------------------------------


def hooked(kind: str, learn):
    """A model, and the function that runs it, such that `learn` runs in its backward."""
    model = network()
    if kind == "tensor":

        def run(x):
            y = model(x)
            y.register_hook(lambda g: learn())
            return y

        return model, run
    if kind == "parameter":
        model[0].weight.register_post_accumulate_grad_hook(lambda p: learn())
    else:
        model[2].register_full_backward_hook(lambda m, gi, go: learn())
    return model, model


@pytest.mark.parametrize("inner", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("outer", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["tensor", "parameter", "module"])
def test_a_network_trained_in_a_hook(kind, outer, inner):
    """Its batches count once each, whichever model is checkpointed, and the statistics are torch's."""
    if kind != "parameter" and outer == "reentrant":
        pytest.skip("hooks of a forward without gradients: torch refuses or repeats them")

    def train(lib) -> list[nn.Module]:
        torch.manual_seed(4)
        guess = nn.Sequential(nn.Linear(C, C), lib.BatchNorm1d(C), nn.Tanh(), nn.Linear(C, 1))
        optimizer = torch.optim.SGD(guess.parameters(), 0.1)

        def learn():
            with torch.enable_grad():
                x = torch.randn(8, C)
                optimizer.zero_grad()
                run = guess if inner == "plain" else lambda t: WAYS[inner](guess, t)
                run(x.requires_grad_()).square().mean().backward()
                optimizer.step()

        model, run = hooked(kind, learn)
        for _ in range(3):
            x = torch.randn(8, C).requires_grad_()
            y = run(x) if outer == "plain" else WAYS[outer](run, x)
            y.square().sum().backward()
        return [model, guess]

    model, guess = train(ours)
    assert batches(model) == [3]
    assert batches(guess) == [3]
    if inner == "plain":  # torch counts a checkpointed batch twice
        for (key, value), expected in zip(guess.state_dict().items(), train(nn)[1].state_dict().values(), strict=True):
            assert_close(value.double(), expected.double(), 1e-5, key)


def test_a_function_that_runs_a_forward_in_its_backward():
    """Nothing marks it as a recomputation, so it counts as a forward, as in torch."""

    class Learns(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bn):
            ctx.bn = bn
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            ctx.bn(dy)
            return dy, None

    bn = ours.BatchNorm1d(C)
    Learns.apply(torch.randn(4, C).requires_grad_(), bn).sum().backward()
    assert batches(bn) == [1]


# --- the same is saved on every way -----------------------------------------------------------------------------------


def strided(bn: nn.Module) -> nn.Module:
    bn.running_mean, bn.running_var = torch.zeros(2 * C)[::2], torch.ones(2 * C)[::2]
    return bn


# Calls with one tensor; the second value is its shape.
CALLS = {
    "LayerNorm, small": (ours.LayerNorm(C), (4, C)),
    "LayerNorm, large": (ours.LayerNorm(64), (200, 64)),
    "LayerNorm without weights": (ours.LayerNorm(C, elementwise_affine=False), (4, C)),
    "RMSNorm, small": (ours.RMSNorm(C), (4, C)),
    "RMSNorm, large": (ours.RMSNorm(64), (200, 64)),
    "BatchNorm1d": (ours.BatchNorm1d(C), (4, C)),
    "BatchNorm1d, cumulative": (ours.BatchNorm1d(C, momentum=None), (4, C)),
    "BatchNorm1d, strided": (strided(ours.BatchNorm1d(C)), (4, C)),
    "BatchNorm1d without statistics": (ours.BatchNorm1d(C, track_running_stats=False), (4, C)),
    "BatchNorm1d in evaluation": (ours.BatchNorm1d(C).eval(), (4, C)),
    "BatchNorm2d, float64 statistics": (ours.BatchNorm2d(C), (4, C, 3, 3)),
    "BatchNormAct1d": (ours.BatchNormAct1d(C), (4, C)),
    "BatchNormAct1d in evaluation": (ours.BatchNormAct1d(C).eval(), (4, C)),
    "BatchNormAct1d with a residual": (lambda x: RESIDUAL(x, residual=x.sin()), (4, C)),
    "Dropout": (ours.Dropout(0.5), (4, C)),
    "dropout in place": (lambda x: OF.dropout(x.sin(), 0.5, inplace=True), (4, C)),
    "DropoutAddLayerNorm": (lambda x: ADD(x, x.sin())[0], (4, C)),
    "DropoutAddLayerNorm in evaluation": (lambda x: ADD_EVAL(x, x.sin())[0], (4, C)),
    "DropoutAddRMSNorm": (lambda x: OF.dropout_add_rms_norm(x, x.sin(), (C,))[1], (4, C)),
}
RESIDUAL, ADD, ADD_EVAL = ours.BatchNormAct1d(C), ours.DropoutAddLayerNorm(C), ours.DropoutAddLayerNorm(C).eval()
CALLS["BatchNorm2d, float64 statistics"][0].running_mean = torch.zeros(C, dtype=torch.float64)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_is_saved_under_a_mode(name):
    call, shape = CALLS[name]

    def saved(context) -> list[tuple]:
        found = []

        def pack(tensor):
            found.append((tensor.shape, tensor.dtype, tensor.device))
            return tensor

        x = torch.randn(shape).requires_grad_()
        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            copy.deepcopy(call)(x) if isinstance(call, nn.Module) else call(x)
        return found

    assert saved(Nothing()) == saved(contextlib.nullcontext())


@pytest.mark.parametrize("first", [True, False], ids=["mode in forward", "mode in backward"])
@pytest.mark.parametrize("name", CALLS)
def test_checkpointing_from_one_way_to_another(name, first):
    call, shape = CALLS[name]
    x = torch.randn(shape)
    gradients = []
    for use in (False, True):
        t = leaf(x)
        torch.manual_seed(9)
        layer = copy.deepcopy(call) if isinstance(call, nn.Module) else call
        with Nothing() if use and first else contextlib.nullcontext():
            y = checkpoint(layer, t, use_reentrant=False) if use else layer(t)
        with Nothing() if use and not first else contextlib.nullcontext():
            y.sin().sum().backward()
        gradients.append(t.grad)
        if isinstance(layer, nn.Module):
            state = {key: bits(value) for key, value in layer.state_dict().items()}
            if not use:
                expected = state
            elif not first:
                assert_same(state, expected, "statistics")
    assert_close(gradients[1], gradients[0], 1e-5, name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # forward mode's own warning
@pytest.mark.parametrize("name", CALLS)
def test_checkpointing_beside_forward_mode(name):
    """A level of forward-mode AD without a tangent for the call changes nothing, so backward may run after it ended."""
    call, shape = CALLS[name]
    layer = copy.deepcopy(call) if isinstance(call, nn.Module) else call
    x = torch.randn(shape)
    a, b = leaf(x), leaf(x)
    torch.manual_seed(9)
    layer(a).sin().sum().backward()
    torch.manual_seed(9)
    with torch.autograd.forward_ad.dual_level():
        y = checkpoint(layer, b, use_reentrant=False)
    y.sin().sum().backward()
    assert_close(b.grad, a.grad, 1e-5, name)
