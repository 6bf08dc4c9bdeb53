"""batch_norm_activation (BatchNorm, + residual, ReLU or leaky ReLU) against float64 and against torch's three calls."""

import copy
import math
import pickle

import onepass
import pytest
import torch
from layers import ACTIVATIONS, affine, assert_batch_norm, gradients, leaf, running_statistics
from onepass.nn import functional as OF
from support import assert_close, bits
from torch.nn import functional as F

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
SHAPES = [(5, 3), (33, 17), (4, 3, 7), (3, 19, 9, 11), (7, 64, 1, 1), (2, 3, 2, 3, 4)]


def formats(x: torch.Tensor) -> list[torch.Tensor]:
    """In every memory format, and in none of them."""
    views = [x, torch.stack([x, -x], -1).flatten(-2)[..., ::2]]
    if x.dim() > 3:
        views.append(x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d))
    return views


@RESIDUAL
@ACTIVATION
@TRAINING
def test_values_and_gradients(training, activation, with_residual, dtype, device):
    for shape in SHAPES:
        x, residual, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        weight, bias = affine("weight and bias", True, shape[1:2], dtype, device)
        for x_view, residual_view in zip(formats(x), reversed(formats(residual)), strict=True):
            assert_batch_norm(
                x_view,
                running_statistics(shape[1], dtype, device),
                weight,
                bias,
                training,
                activation=activation,
                residual=residual_view if with_residual else None,
                dy=dy,
                what=f"{shape} {x_view.stride()}",
            )


@pytest.mark.parametrize("shape", [(4, 6, 101, 97), (3001, 67)], ids=str)
@TRAINING
def test_large(training, shape, dtype, device):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    for x_view, residual_view in zip(formats(x), formats(residual), strict=True):
        assert_batch_norm(
            x_view,
            running_statistics(shape[1], dtype, device),
            training=training,
            activation="relu",
            residual=residual_view,
            what=f"{shape} {x_view.stride()}",
        )


@RESIDUAL
@TRAINING
def test_every_subset_of_gradients(training, with_residual, device):
    x, residual, dy = (torch.randn(6, 9, 5, device=device) for _ in range(3))
    values = [x, *affine("weight and bias", True, (9,), torch.float32, device), *([residual] if with_residual else [])]
    statistics = running_statistics(9, device=device)

    def call(x, weight, bias, residual=None):
        running = [s.clone() for s in statistics]
        return OF.batch_norm_activation(x, *running, weight, bias, training, residual=residual)

    everything = [leaf(v) for v in values]
    y = call(*everything)
    expected = gradients(y, everything, dy)
    for subset in range(2 ** len(values)):
        inputs = [leaf(v) if subset >> i & 1 else v for i, v in enumerate(values)]
        came = call(*inputs)
        assert bits(came) == bits(y), f"y changes with the gradients wanted, {subset:04b}"
        if subset:
            came.backward(dy)
        for i, t in enumerate(inputs):
            if t.requires_grad:
                assert_close(t.grad, expected[i], 1e-6, f"gradient {i} of subset {subset:04b}")


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-38])
@ACTIVATION
def test_special_values_are_activated_as_in_torch(activation, special, device):
    """In evaluation, where elements are independent: ReLU of -Inf is 0, of NaN NaN, and it stops an infinite gradient."""
    x = leaf(torch.tensor([[special, 1.0], [-1.0, 2.0]], device=device))
    running = torch.zeros(2, device=device), torch.ones(2, device=device)
    y = OF.batch_norm_activation(x, *running, activation=activation, negative_slope=0.2, eps=0.0)
    twin = leaf(x)
    expected = F.batch_norm(twin, *running, eps=0.0)
    if activation is not None:
        expected = F.relu(expected) if activation == "relu" else F.leaky_relu(expected, 0.2)
    assert_close(y, expected, 1e-6, f"y of {special}")
    for dy in (torch.ones_like(y), torch.full_like(y, math.inf)):
        (came,), (wanted,) = gradients(y, [x], dy), gradients(expected, [twin], dy)
        if not math.isnan(special):
            assert_close(came, wanted, 1e-6, f"gradient at {special} of dy={dy[0, 0]}")
        y, expected = (
            OF.batch_norm_activation(x, *running, activation=activation, negative_slope=0.2, eps=0.0),
            F.batch_norm(twin, *running, eps=0.0),
        )
        if activation is not None:
            expected = F.relu(expected) if activation == "relu" else F.leaky_relu(expected, 0.2)


@TRAINING
def test_an_infinite_gradient_stops_at_relu(training, device):
    """dy = Inf where y is 0 does not enter the sums over the channel."""
    x = torch.randn(6, 3, device=device)
    y = OF.batch_norm_activation(x, *running_statistics(3, device=device), training=training)
    dy = torch.where(y > 0, 1.0, math.inf)
    assert_batch_norm(x, running_statistics(3, device=device), training=training, activation="relu", dy=dy, what="Inf")


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)], ids=str)
def test_empty(shape, device):
    x, residual = (leaf(torch.empty(shape, device=device)) for _ in range(2))
    y = OF.batch_norm_activation(x, *running_statistics(3, device=device), training=True, residual=residual)
    y.sum().backward()
    assert x.grad.shape == residual.grad.shape == y.shape == shape


MODULES = {2: "BatchNormAct1d", 4: "BatchNormAct2d", 5: "BatchNormAct3d"}


@pytest.mark.parametrize("dims", MODULES)
def test_modules(dims, device):
    """Against a sequence of torch's modules; the state dict is that of torch's BatchNorm."""
    module = getattr(onepass.nn, MODULES[dims])(6, activation="leaky_relu", negative_slope=0.2).to(device)
    plain = getattr(torch.nn, MODULES[dims].replace("Act", ""))(6).to(device)
    assert isinstance(module, type(plain))
    with torch.no_grad():
        module.weight.normal_()
    plain.load_state_dict(module.state_dict())
    for step in range(4):
        for m in (module, plain):
            m.train(step < 3)
        x, residual = torch.randn(2, 5, 6, *range(2, dims), device=device)
        assert_close(module(x, residual), F.leaky_relu(plain(x) + residual, 0.2), 2e-6, f"step {step}")
        assert_close(module(x), F.leaky_relu(plain(x), 0.2), 2e-6, f"step {step}")
    for key, value in plain.state_dict().items():
        assert_close(module.state_dict()[key], value, 1e-6, key)
    assert "activation=leaky_relu" in repr(module)


def test_refuses():
    x, running = torch.ones(3, 4), running_statistics(4)
    before = [bits(r) for r in running]
    for options, error in (
        ({"activation": "gelu"}, ValueError),
        ({"activation": "leaky_relu", "negative_slope": -0.1}, ValueError),
        ({"activation": "leaky_relu", "negative_slope": math.nan}, ValueError),
        ({"residual": torch.ones(3, 5)}, RuntimeError),
        ({"residual": torch.ones(4)}, RuntimeError),
        ({"residual": torch.ones(3, 4).double()}, RuntimeError),
        ({"residual": torch.ones(3, 4, device="meta")}, RuntimeError),
    ):
        with pytest.raises(error):
            OF.batch_norm_activation(x, *running, training=True, **options)
    with pytest.raises(ValueError, match="activation"):
        onepass.nn.BatchNormAct2d(4, activation="tanh")
    assert [bits(r) for r in running] == before


# ---- functions that rebuild a BatchNorm ------------------------------------------------------------------------------

ACTIVATED = {
    1: onepass.nn.BatchNormAct1d,
    2: onepass.nn.BatchNormAct2d,
    3: onepass.nn.BatchNormAct3d,
}


@pytest.mark.parametrize("dims", ACTIVATED)
@pytest.mark.parametrize("options", [{}, {"activation": "leaky_relu", "negative_slope": 0.3}, {"activation": None}])
def test_synchronising_keeps_activation_and_residual(dims, options):
    model = torch.nn.Sequential(torch.nn.Identity(), ACTIVATED[dims](4, eps=0.1, momentum=None, **options))
    x, residual = torch.randn(2, 3, 4, *(5,) * dims).unbind()
    model(x)
    twin = copy.deepcopy(model)
    synced = onepass.nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=None)
    assert type(synced[1]) is onepass.nn.SyncBatchNormAct
    assert synced[1].weight is model[1].weight
    for training in (True, False):
        for module in (synced.train(training), twin.train(training)):
            module.requires_grad_(False)
        assert torch.equal(synced[1](x, residual), twin[1](x, residual))
        assert torch.equal(synced(x), twin(x))
    for (name, came), expected in zip(synced.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(came, expected), name


def test_a_root_is_synchronised():
    bn = onepass.nn.BatchNormAct1d(4).eval()
    synced = onepass.nn.SyncBatchNorm.convert_sync_batchnorm(bn)
    assert type(synced) is onepass.nn.SyncBatchNormAct
    assert not synced.training


def fold_linear(bn):
    return torch.nn.utils.fusion.fuse_linear_bn_eval(torch.nn.Linear(3, 4).eval(), bn)


REBUILDERS = {
    "convert_sync_batchnorm": torch.nn.SyncBatchNorm.convert_sync_batchnorm,
    "convert_sync_batchnorm of a model": lambda bn: torch.nn.SyncBatchNorm.convert_sync_batchnorm(
        torch.nn.Sequential(bn)
    ),
    "fuse_conv_bn_eval": lambda bn: torch.nn.utils.fusion.fuse_conv_bn_eval(torch.nn.Conv2d(3, 4, 1).eval(), bn),
    "fuse_linear_bn_eval": fold_linear,
}


@pytest.mark.parametrize("name", REBUILDERS)
@pytest.mark.parametrize("kind", [*ACTIVATED.values(), onepass.nn.SyncBatchNormAct])
def test_torchs_functions_are_refused_by_name(kind, name):
    """They would silently drop the activation; on layers that torch has too they work."""
    with pytest.raises(RuntimeError, match=rf"^{name.split()[0]} would drop the activation .*{kind.__name__}"):
        REBUILDERS[name](kind(4).eval())
    REBUILDERS[name](onepass.nn.BatchNorm2d(4).eval())


def test_folding_by_hand():
    """The workaround that the error message suggests."""
    conv, bn = torch.nn.Conv2d(3, 4, 1), onepass.nn.BatchNormAct2d(4)
    x = torch.randn(2, 3, 5, 5)
    bn(conv(x))
    folded = copy.deepcopy(conv)
    folded.weight, folded.bias = torch.nn.utils.fusion.fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    assert_close(folded(x).relu(), bn.eval()(conv(x)), 1e-5, "folded")


def test_eps_is_an_attribute():
    bn = onepass.nn.BatchNormAct1d(4, eps=0.5)
    bn.eps = 0.25
    for module in (bn, copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert module.eps == 0.25
        assert "eps=0.25" in repr(module)
        assert torch.equal(module(torch.ones(3, 4)), torch.zeros(3, 4))
