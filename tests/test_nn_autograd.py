"""First and second derivatives, forward mode, torch.func's transforms, vmap and checkpointing against torch's formulas."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from onepass.nn import functional as OF
from support import assert_close, bits
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*performance drop:UserWarning"
    ),  # vmap's warning about operators without a batching rule
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # forward mode's own warning
]

SEED, P, SIZE = 6, 0.4, 5


@dataclass(frozen=True)
class Op:
    ours: Callable[..., torch.Tensor]
    formula: Callable[..., torch.Tensor]  # the same in elementary operations, which every transform supports
    shapes: tuple[tuple[int, ...], ...]  # shapes of the operands


def normalized(x: torch.Tensor, dims, eps: float = 1e-5, centred: bool = True) -> torch.Tensor:
    """Not torch's own layer_norm and batch_norm, whose third derivatives are wrong (torch 2.13)."""
    x = x - x.mean(dims, keepdim=True) if centred else x
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()


def times(x: torch.Tensor, w=None, b=None) -> torch.Tensor:
    """w·x + b"""
    x = x if w is None else w * x
    return x if b is None else x + b


def per_channel(x: torch.Tensor, *values) -> list:
    """[C] as [1, C, 1 ...]; works inside vmap."""
    return [None if v is None else v.reshape(1, -1, *(1,) * (x.dim() - 2)) for v in values]


def batch_norm(x: torch.Tensor, w=None, b=None) -> torch.Tensor:
    return times(normalized(x, (0, *range(2, x.dim()))), *per_channel(x, w, b))


def statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ones = torch.ones(like.shape[1], dtype=torch.float64, device=like.device)
    return ones * 0.3, ones * 1.7


def batch_norm_in_evaluation(x: torch.Tensor, w, b) -> torch.Tensor:
    mean, var, w, b = per_channel(x, *statistics(x), w, b)
    return times((x - mean) / (var + 1e-5).sqrt(), w, b)


def masked(x: torch.Tensor, scale: float = 1 / (1 - P)) -> torch.Tensor:
    return torch.where(OF.dropout_mask((3, SIZE), P, SEED, device=x.device), x * scale, 0.0)


def both_of(y: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Both results in one tensor."""
    return torch.stack([y, total])


ROWS = (3, SIZE)
OPS = {
    "layer_norm": Op(
        lambda x, w, b: OF.layer_norm(x, (SIZE,), w, b),
        lambda x, w, b: times(normalized(x, -1), w, b),
        (ROWS, (SIZE,), (SIZE,)),
    ),
    "layer_norm without weights": Op(
        lambda x: OF.layer_norm(x, ROWS, eps=0.1), lambda x: normalized(x, (-2, -1), 0.1), ((2, *ROWS),)
    ),
    "layer_norm, scalar affine": Op(
        lambda x, w, b: OF.layer_norm(x, (SIZE,), w, b), lambda x, w, b: times(normalized(x, -1), w, b), (ROWS, (), ())
    ),
    "rms_norm": Op(
        lambda x, w: OF.rms_norm(x, (SIZE,), w, eps=1e-3),
        lambda x, w: times(normalized(x, -1, 1e-3, centred=False), w),
        (ROWS, (SIZE,)),
    ),
    "batch_norm of rows": Op(
        lambda x: OF.batch_norm(x, None, None, training=True), lambda x: batch_norm(x), ((4, SIZE),)
    ),
    "batch_norm of pictures": Op(
        lambda x, w, b: OF.batch_norm(x, None, None, w, b, training=True), batch_norm, ((2, 3, 2, 2), (3,), (3,))
    ),
    "batch_norm in evaluation": Op(
        lambda x, w, b: OF.batch_norm(x, *statistics(x), w, b), batch_norm_in_evaluation, ((2, 3, 4), (3,), (3,))
    ),
    "batch_norm_activation": Op(
        lambda x, w, b, r: OF.batch_norm_activation(
            x, None, None, w, b, True, activation="leaky_relu", negative_slope=0.3, residual=r
        ),
        lambda x, w, b, r: F.leaky_relu(batch_norm(x, w, b) + r, 0.3),
        ((4, 3, 2), (3,), (3,), (4, 3, 2)),
    ),
    "batch_norm_activation in evaluation": Op(
        lambda x, w, b: OF.batch_norm_activation(x, *statistics(x), w, b),
        lambda x, w, b: batch_norm_in_evaluation(x, w, b).relu(),
        ((4, 3, 2), (3,), (3,)),
    ),
    "dropout": Op(lambda x: OF.dropout(x, P, seed=SEED), masked, (ROWS,)),
    "dropout of the paper": Op(
        lambda x: OF.dropout(x, P, seed=SEED, inverted=False), lambda x: masked(x, 1.0), (ROWS,)
    ),
    "dropout of the paper in evaluation": Op(
        lambda x: OF.dropout(x, P, training=False, inverted=False), lambda x: x * (1 - P), (ROWS,)
    ),
    "dropout_add_layer_norm": Op(
        lambda x, r, w, b: both_of(*OF.dropout_add_layer_norm(x, r, (SIZE,), w, b, p=P, seed=SEED)),
        lambda x, r, w, b: both_of(times(normalized(r + masked(x), -1), w, b), r + masked(x)),
        (ROWS, ROWS, (SIZE,), (SIZE,)),
    ),
    "dropout_add_rms_norm": Op(
        lambda x, r, w: both_of(*OF.dropout_add_rms_norm(x, r, (SIZE,), w, 1e-3, p=P, seed=SEED)),
        lambda x, r, w: both_of(times(normalized(r + masked(x), -1, 1e-3, centred=False), w), r + masked(x)),
        (ROWS, ROWS, (SIZE,)),
    ),
}
EVERY_OP = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def operands(op: Op, device, requires_grad: bool = False) -> list[torch.Tensor]:
    made = [torch.randn(shape, dtype=torch.float64, device=device) for shape in op.shapes]
    return [t.requires_grad_(requires_grad) for t in made]


def assert_equal(came, expected, what: str) -> None:
    """Trees of tensors, to rounding."""
    if isinstance(expected, torch.Tensor):
        assert_close(came, expected, 1e-11, what)
    else:
        assert len(came) == len(expected), what
        for i, (a, b) in enumerate(zip(came, expected, strict=True)):
            assert_equal(a, b, f"{what}[{i}]")


# ---- derivatives -----------------------------------------------------------------------------------------------------


@EVERY_OP
def test_gradcheck(op, device):
    """Against finite differences: backward, forward mode, batched gradients and missing gradients."""
    assert gradcheck(
        op.ours, operands(op, device, True), check_forward_ad=True, check_batched_grad=True, check_undefined_grad=True
    )


@EVERY_OP
def test_gradgradcheck(op, device):
    inputs = operands(op, device, True)
    assert gradgradcheck(op.ours, inputs, check_batched_grad=True)


@EVERY_OP
def test_gradients_of_gradients_of_gradients(op, device):
    inputs = operands(op, device, True)

    def third(function):
        y = function(*inputs).sin().sum()
        for _ in range(2):
            found = torch.autograd.grad(y, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
            y = sum(g.sin().sum() for g in found)
        return torch.autograd.grad(y, inputs, allow_unused=True, materialize_grads=True)

    assert_equal(third(op.ours), third(op.formula), "third derivatives")


@EVERY_OP
def test_forward_mode_with_dual_numbers(op, device):
    """Tangents on some of the operands."""
    inputs = operands(op, device)
    tangents = [torch.randn_like(t) for t in inputs]
    for subset in range(1, 2 ** len(inputs)):

        def derivative(function, subset=subset):
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(t, tangent) if subset >> i & 1 else t
                    for i, (t, tangent) in enumerate(zip(inputs, tangents, strict=True))
                ]
                return tuple(forward_ad.unpack_dual(function(*duals)))

        assert_equal(derivative(op.ours), derivative(op.formula), f"tangents of {subset:03b}")


TRANSFORMS = {
    "grad": lambda f, inputs: grad(lambda *t: f(*t).sin().sum(), argnums=tuple(range(len(inputs))))(*inputs),
    "vjp": lambda f, inputs: vjp(f, *inputs)[1](torch.ones_like(f(*inputs))),
    "jvp": lambda f, inputs: jvp(f, tuple(inputs), tuple(t.cos() for t in inputs)),
    "jacrev": lambda f, inputs: jacrev(f, argnums=tuple(range(len(inputs))))(*inputs),
    "jacfwd": lambda f, inputs: jacfwd(f, argnums=tuple(range(len(inputs))))(*inputs),
    "hessian": lambda f, inputs: hessian(lambda t: f(t, *inputs[1:]).sin().sum())(inputs[0]),
    "grad of grad": lambda f, inputs: grad(lambda t: grad(lambda u: f(u, *inputs[1:]).sin().sum())(t).sin().sum())(
        inputs[0]
    ),
    "vmap": lambda f, inputs: vmap(f)(*(torch.stack([t, t.sin()]) for t in inputs)),
    "vmap over x": lambda f, inputs: vmap(lambda t: f(t, *inputs[1:]), in_dims=1, out_dims=1)(
        torch.stack([inputs[0], inputs[0].sin()], 1)
    ),
    "vmap of grad": lambda f, inputs: vmap(grad(lambda *t: f(*t).sin().sum()))(
        *(torch.stack([t, t.sin()]) for t in inputs)
    ),
    "grad of vmap": lambda f, inputs: grad(
        lambda t: vmap(f)(*(torch.stack([u, u.sin()]) for u in (t, *inputs[1:]))).sin().sum()
    )(inputs[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@EVERY_OP
def test_function_transforms(op, transform, device):
    """Equal to the transforms of torch's formula. Dropout with an explicit seed has the same mask for every sample."""
    if "dropout" in next(key for key, value in OPS.items() if value is op) and "vmap" in transform:
        pytest.skip("test_vmap_of_dropout")
    inputs = operands(op, device)
    come, expected = (TRANSFORMS[transform](f, inputs) for f in (op.ours, op.formula))
    assert_equal(come, expected, transform)


def test_gradients_reach_weights_inside_transforms(device):
    """Per-sample gradients of a module's parameters, with functional_call."""
    import onepass

    model = (
        torch.nn.Sequential(torch.nn.Linear(4, 6), onepass.nn.LayerNorm(6), torch.nn.Linear(6, 1)).double().to(device)
    )
    params = dict(model.named_parameters())
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    per_sample = vmap(grad(lambda p, t: functional_call(model, p, (t,)).square().sum()), in_dims=(None, 0))(params, x)
    for i in range(5):
        model.zero_grad()
        model(x[i]).square().sum().backward()
        for name, p in model.named_parameters():
            assert_close(per_sample[name][i], p.grad, 1e-12, f"{name} of sample {i}")


# ---- vmap and randomness ---------------------------------------------------------------------------------------------


def test_vmap_of_dropout(device):
    x = torch.ones(8, 500, device=device)
    with pytest.raises(RuntimeError, match=r"^vmap: called random operation while in randomness error mode"):
        vmap(lambda t: OF.dropout(t, 0.5))(x)
    same = vmap(lambda t: OF.dropout(t, 0.5), randomness="same")(x)
    assert all(torch.equal(row, same[0]) for row in same), "randomness='same': one mask for all samples"
    different = vmap(lambda t: OF.dropout(t, 0.5), randomness="different")(x)
    masks = {bits(row) for row in different}
    assert len(masks) == 8, f"randomness='different': 8 masks expected, came {len(masks)}"
    for y in (same, different):
        assert set(y.unique().tolist()) == {0.0, 2.0}
        assert 1500 < int((y == 0).sum()) < 2500
    seeded = vmap(lambda t: OF.dropout(t, 0.5, seed=3), randomness="same")(x)
    assert all(bits(row) == bits(OF.dropout(x[0], 0.5, seed=3)) for row in seeded)


def test_gradient_through_vmapped_dropout(device):
    """Backward uses forward's mask."""
    for randomness in ("same", "different"):
        x = torch.randn(4, 50, device=device, requires_grad=True)
        y = vmap(lambda t: OF.dropout(t, 0.5), randomness=randomness)(x)
        y.sum().backward()
        assert torch.equal(x.grad, (y != 0) * 2.0)


# ---- checkpointing ---------------------------------------------------------------------------------------------------

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


@REENTRANT
def test_checkpointing_uses_the_same_mask(use_reentrant, device):
    x = torch.randn(64, 30, device=device, requires_grad=True)

    def block(t):
        return OF.dropout(OF.layer_norm(OF.dropout(t, 0.3).exp(), (30,)), 0.5)

    torch.manual_seed(3)
    y = block(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    torch.manual_seed(3)
    came = checkpoint(block, x, use_reentrant=use_reentrant)
    torch.manual_seed(99)  # random numbers drawn between forward and backward
    came.square().sum().backward()
    assert bits(came) == bits(y)
    assert bits(x.grad) == bits(expected)


# ---- hooks, saved tensors, modes -------------------------------------------------------------------------------------


@EVERY_OP
def test_saved_tensors_hooks(op, device):
    """Backward reads torch's saved tensors, which hooks may have moved elsewhere in between."""
    inputs = operands(op, device, True)
    y = op.ours(*inputs)
    expected = torch.autograd.grad(y.sin().sum(), inputs)
    with torch.autograd.graph.save_on_cpu():
        y = op.ours(*inputs)
    assert_equal(torch.autograd.grad(y.sin().sum(), inputs), expected, "gradients of what was saved on the CPU")


@EVERY_OP
def test_inference_mode(op, device):
    inputs = operands(op, device)
    expected = op.ours(*inputs)
    with torch.inference_mode():
        y = op.ours(*inputs)
        assert bits(y) == bits(expected)
        assert y.is_inference()
        assert bits(op.ours(*(t.clone() for t in inputs))) == bits(expected)
