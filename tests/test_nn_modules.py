"""The modules behave as torch.nn's: classes, names, state dicts, numbers, copies, meta device, autocast, training."""

import copy
import io
import pickle

import onepass
import pytest
import torch
from layers import as_numpy, assert_close_to, gradients
from reference import batch_norm, dropout
from support import assert_close, assert_same, bits
from torch.utils.checkpoint import checkpoint

# Name, arguments, keyword arguments and an input's shape.
MODULES = {
    "LayerNorm": ("LayerNorm", (6,), {}, (4, 6)),
    "LayerNorm of a list": ("LayerNorm", ([3, 6],), {"eps": 1e-3}, (4, 3, 6)),
    "LayerNorm without bias": ("LayerNorm", (6,), {"bias": False}, (4, 6)),
    "LayerNorm without affine": ("LayerNorm", (6,), {"elementwise_affine": False}, (4, 6)),
    "RMSNorm": ("RMSNorm", (6,), {}, (4, 6)),
    "RMSNorm with eps": ("RMSNorm", ([3, 6],), {"eps": 1e-3}, (4, 3, 6)),
    "RMSNorm without affine": ("RMSNorm", (6,), {"elementwise_affine": False}, (4, 6)),
    "BatchNorm1d": ("BatchNorm1d", (3,), {}, (5, 3)),
    "BatchNorm1d of sequences": ("BatchNorm1d", (3,), {"momentum": 0.3, "eps": 1e-3}, (5, 3, 4)),
    "BatchNorm2d": ("BatchNorm2d", (3,), {}, (5, 3, 4, 2)),
    "BatchNorm3d": ("BatchNorm3d", (3,), {}, (2, 3, 4, 2, 2)),
    "BatchNorm2d without affine": ("BatchNorm2d", (3,), {"affine": False}, (5, 3, 4, 2)),
    "BatchNorm2d without statistics": ("BatchNorm2d", (3,), {"track_running_stats": False}, (5, 3, 4, 2)),
    "BatchNorm2d with the mean of all batches": ("BatchNorm2d", (3,), {"momentum": None}, (5, 3, 4, 2)),
    "SyncBatchNorm": ("SyncBatchNorm", (3,), {}, (5, 3, 4, 2)),
    "Dropout": ("Dropout", (0.3,), {}, (4, 6)),
}
EVERY_MODULE = pytest.mark.parametrize("spec", MODULES.values(), ids=MODULES)


def pair(spec, device, dtype=torch.float64) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, with the same weights, which differ from the initial ones."""
    name, args, kwargs, _ = spec
    ours, theirs = (getattr(nn, name)(*args, **kwargs).to(device, dtype) for nn in (onepass.nn, torch.nn))
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def content(module: torch.nn.Module) -> dict[str, bytes]:
    return {key: bits(value) for key, value in module.state_dict().items()}


# ---- the class -------------------------------------------------------------------------------------------------------


@EVERY_MODULE
def test_is_torchs_module(spec, device):
    ours, theirs = pair(spec, device)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    assert type(ours).__module__.startswith("onepass.nn")
    for name in ("named_parameters", "named_buffers"):
        came, expected = (
            {key: (t.shape, t.dtype, t.device.type, t.requires_grad) for key, t in getattr(m, name)()}
            for m in (ours, theirs)
        )
        assert came == expected, name
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@EVERY_MODULE
def test_initial_weights_are_torchs(spec):
    name, args, kwargs, _ = spec
    more = {} if name == "Dropout" else {"device": "cpu", "dtype": torch.bfloat16}
    ours, theirs = (getattr(nn, name)(*args, **kwargs, **more) for nn in (onepass.nn, torch.nn))
    assert_same(content(ours), content(theirs), "state dict of a fresh module")
    if hasattr(ours, "reset_parameters"):
        with torch.no_grad():
            for p in ours.parameters():
                p.fill_(7)
        ours.reset_parameters()
        assert_same(content(ours), content(theirs), "after reset_parameters")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@EVERY_MODULE
def test_trains_like_torchs(spec, device):
    """Outputs, gradients and statistics over several batches, then in evaluation. Dropout's random numbers are not torch's."""
    ours, theirs = pair(spec, device)
    for step in range(5):
        for module in (ours, theirs):
            module.train(step < 3)
            module.zero_grad()
        x, dy = torch.randn(2, *spec[3], dtype=torch.float64, device=device)
        if isinstance(ours, torch.nn.Dropout) and ours.training:
            continue
        results = []
        for module in (ours, theirs):
            t = x.clone().requires_grad_()
            y = module(t)
            results.append((y, *gradients(y, [t, *module.parameters()], dy)))
        for i, (came, expected) in enumerate(zip(*results, strict=True)):
            assert_close(came, expected, 1e-11, f"result {i} of step {step}")
        for (key, came), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert_close(came, expected, 1e-12, f"{key} after step {step}")


def test_mean_of_all_batches(device):
    """momentum=None: after t batches, the mean of their statistics."""
    bn = onepass.nn.BatchNorm1d(3, momentum=None).to(device)
    batches = torch.randn(6, 7, 3, device=device)
    for t, x in enumerate(batches, 1):
        bn(x)
        assert int(bn.num_batches_tracked) == t
        assert_close(bn.running_mean, batches[:t].mean((0, 1)), 1e-6, f"mean of {t} batches")
        assert_close(bn.running_var, batches[:t].var(1).mean(0), 2e-6, f"variance of {t} batches")


def test_an_empty_batch_is_counted(device):
    bn = onepass.nn.BatchNorm2d(3).to(device)
    assert bn(torch.empty(0, 3, 4, 4, device=device)).shape == (0, 3, 4, 4)
    assert int(bn.num_batches_tracked) == 1
    assert torch.equal(bn.running_mean, torch.zeros(3, device=device))
    assert torch.equal(bn.running_var, torch.ones(3, device=device))


def test_evaluation_mode_is_by_the_flag_and_the_buffers(device):
    """Without buffers, evaluation uses the batch's statistics too."""
    x = torch.randn(5, 3, device=device)
    tracked, untracked = (onepass.nn.BatchNorm1d(3, track_running_stats=t).to(device).eval() for t in (True, False))
    state = content(tracked)
    assert_close(tracked(x), x / (1 + 1e-5) ** 0.5, 1e-6, "running statistics 0 and 1")
    assert_same(content(tracked), state, "evaluation changed the buffers")
    assert_close_to(untracked(x), batch_norm.batch_norm(*as_numpy(x)), 1.0, "the batch's own statistics")


def test_dropout_module(device):
    x = torch.randn(300, device=device)
    torch.manual_seed(1)
    expected = onepass.nn.functional.dropout(x, 0.3)
    torch.manual_seed(1)
    module = onepass.nn.Dropout(0.3)
    assert torch.equal(module(x), expected)
    assert not torch.equal(module(x), expected)
    assert torch.equal(module.eval()(x), x)
    paper = onepass.nn.Dropout(0.25, inverted=False)
    y = paper(x)
    assert torch.equal(y[y != 0], x[y != 0])
    assert_close_to(
        paper.eval()(x), dropout.dropout(*as_numpy(x), 0.25, 0, training=False, inverted=False), 1.0, "(1-p)x"
    )
    assert repr(onepass.nn.Dropout(0.3)) == "Dropout(p=0.3, inplace=False)"
    assert "inverted=False" in repr(paper)
    copied = x.clone()
    assert onepass.nn.Dropout(0.5, inplace=True)(copied).data_ptr() == copied.data_ptr()
    assert int((copied == 0).sum()) > 100


# ---- state dicts, copies, devices ------------------------------------------------------------------------------------


@EVERY_MODULE
def test_state_dict_both_ways(spec, device):
    """Mid-training; both continue equally."""
    ours, theirs = pair(spec, device)
    batches = torch.randn(6, *spec[3], dtype=torch.float64, device=device)
    for x in batches[:3]:
        ours(x)
        theirs(x)
    fresh_ours, fresh_theirs = pair(spec, device)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    fresh_theirs.load_state_dict(torch.load(buffer, weights_only=True))
    fresh_ours.load_state_dict(theirs.state_dict())
    for x in batches[3:]:
        if not isinstance(ours, torch.nn.Dropout):
            assert_close(fresh_ours(x), theirs(x), 1e-11, "ours from torch's")
            assert_close(fresh_theirs(x), ours(x), 1e-11, "torch's from ours")
    for key, expected in theirs.state_dict().items():
        for module in (ours, fresh_ours, fresh_theirs):
            assert_close(module.state_dict()[key], expected, 1e-12, key)


@EVERY_MODULE
def test_copies(spec, device):
    ours, _ = pair(spec, device)
    ours.train(False)
    x = torch.randn(spec[3], dtype=torch.float64, device=device)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        assert other.training is False
        assert_same(content(other), content(ours), "a copy")
        assert bits(other(x)) == bits(ours(x))
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(other.parameters(), ours.parameters(), strict=True))


def test_pickled_by_torch_is_torchs():
    """A pickled module of torch stays torch's: nothing in torch.nn is replaced."""
    assert type(pickle.loads(pickle.dumps(torch.nn.LayerNorm(3)))) is torch.nn.LayerNorm
    assert torch.nn.functional.layer_norm is not onepass.nn.functional.layer_norm


@EVERY_MODULE
def test_meta_device(spec):
    """Created without memory, run without memory, then filled."""
    name, args, kwargs, shape = spec
    if kwargs.get("momentum", 0) is None:
        pytest.skip("the count of batches has no value to divide by, as in torch")
    with torch.device("meta"):
        module = getattr(onepass.nn, name)(*args, **kwargs)
    x = torch.empty(shape, device="meta", requires_grad=True)
    y = module(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", torch.Size(shape), torch.float32)
    y.sum().backward()
    assert x.grad.shape == x.shape
    filled = module.to_empty(device="cpu")
    if hasattr(filled, "reset_parameters"):
        filled.reset_parameters()
        filled(torch.randn(shape))


@EVERY_MODULE
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_module_of_another_dtype(spec, to, device):
    """model.to(dtype): parameters and running statistics of that dtype, and an input of it."""
    name, args, kwargs, shape = spec
    module = getattr(onepass.nn, name)(*args, **kwargs).to(device, to)
    x = torch.randn(shape, device=device, dtype=to, requires_grad=True)
    y = module(x)
    assert y.dtype == to
    y.sum().backward()
    for tensor in (*module.parameters(), *(b for b in module.buffers() if b.dim())):
        assert tensor.dtype == to
    module.eval()(x.detach())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@EVERY_MODULE
def test_autocast(spec, low, device):
    """float32 parameters with an autocast matmul's result, and with float32 inputs. Dtypes are torch's or the input's."""
    name, args, kwargs, shape = spec
    module = getattr(onepass.nn, name)(*args, **kwargs).to(device)
    module.eval()
    linear = torch.nn.Linear(shape[-1], shape[-1]).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=low):
        h = linear(x)
        assert h.dtype == low
        came = module(h)
        same = module(x)
    assert came.dtype in (low, torch.float32)
    assert same.dtype == torch.float32
    with torch.no_grad():
        expected = module(h.float())
    assert_close(came, expected, 1e-5, "under autocast", torch.finfo(low).eps)
    came.float().square().sum().backward()
    for p in (x, *module.parameters(), *linear.parameters()):
        assert p.grad.dtype == torch.float32
        assert bool(p.grad.isfinite().all())


# ---- checkpointing and counters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_counts_a_batch_once(momentum, use_reentrant, device):
    """The recomputation in backward sees the same batch, which does not enter the running statistics twice."""
    plain, checkpointed = (onepass.nn.BatchNorm1d(3, momentum=momentum).to(device) for _ in range(2))
    for _ in range(2):
        x = torch.randn(6, 3, device=device)
        results = []
        for bn in (plain, checkpointed):
            t = x.clone().requires_grad_()
            y = checkpoint(bn, t, use_reentrant=use_reentrant) if bn is checkpointed else bn(t)
            y.square().sum().sin().backward()
            results.append(t.grad)
        assert_close(results[1], results[0], 1e-6, "gradient")
        assert_same(content(checkpointed), content(plain), "running statistics")


def test_a_network_learns_the_same(device):
    """Convolutions, norms, dropout with p = 0 and one of our optimizers: twenty steps against torch's modules."""

    def network(nn):
        torch.manual_seed(2)
        return torch.nn.Sequential(
            torch.nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            torch.nn.ReLU(),
            nn.Dropout(0.0),
            torch.nn.Flatten(),
            nn.LayerNorm(96),
            torch.nn.Linear(96, 5),
            nn.RMSNorm(5),
        ).to(device, torch.float64)

    models = network(onepass.nn), network(torch.nn)
    optimizers = (
        onepass.optim.AdamW(models[0].parameters(), lr=0.01),
        torch.optim.AdamW(models[1].parameters(), lr=0.01),
    )
    for step in range(20):
        x = torch.randn(8, 2, 6, 6, device=device, dtype=torch.float64)
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(x) - x[:, 0, :1, :5].squeeze(1)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert_close(losses[0], losses[1], 1e-9, f"loss of step {step}")
    for (key, came), expected in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert_close(came, expected, 1e-8, key)
