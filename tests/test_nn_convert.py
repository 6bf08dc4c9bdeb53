"""onepass.convert replaces torch's modules in place, keeps everything about them and leaves everything else."""

import copy
import logging

import onepass
import pytest
import torch
from support import assert_close, assert_same, bits

KINDS = {
    "LayerNorm": lambda: torch.nn.LayerNorm(6, eps=1e-3, bias=False),
    "RMSNorm": lambda: torch.nn.RMSNorm([3, 6]),
    "BatchNorm1d": lambda: torch.nn.BatchNorm1d(6, momentum=None),
    "BatchNorm2d": lambda: torch.nn.BatchNorm2d(6, momentum=0.3, affine=False),
    "BatchNorm3d": lambda: torch.nn.BatchNorm3d(6, track_running_stats=False),
    "SyncBatchNorm": lambda: torch.nn.SyncBatchNorm(6),
    "Dropout": lambda: torch.nn.Dropout(0.3, inplace=True),
}


class Subclass(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = torch.nn.LayerNorm(6)
        self.first = torch.nn.Sequential(torch.nn.Linear(6, 6), self.shared, torch.nn.Dropout(0.0))
        self.second = torch.nn.ModuleDict({"norm": self.shared, "rms": torch.nn.RMSNorm(6)})
        self.bn = torch.nn.BatchNorm1d(6)
        self.special = Subclass(6)

    def forward(self, x):
        return self.special(self.bn(self.second["rms"](self.second["norm"](self.first(x)))))


@pytest.mark.parametrize("kind", KINDS)
def test_root_module(kind):
    """The root is replaced too: the result has our class and the same Parameter objects and settings."""
    module = KINDS[kind]()
    if kind != "Dropout":
        module.train(False)
        for p in module.parameters():
            p.requires_grad_(False)
        module.extra = "kept"
    before, parameters = repr(module), dict(module.named_parameters())
    buffers, state = dict(module.named_buffers()), {key: bits(t) for key, t in module.state_dict().items()}
    training = module.training
    converted = onepass.convert(module)
    assert type(converted) is getattr(onepass.nn, kind)
    assert repr(converted) == before
    assert converted.training is training
    assert all(p is parameters[name] for name, p in converted.named_parameters()), "other Parameter objects"
    assert all(b is buffers[name] for name, b in converted.named_buffers()), "other buffers"
    assert dict(converted.named_parameters()).keys() == parameters.keys()
    assert_same({key: bits(t) for key, t in converted.state_dict().items()}, state, "state dict")
    assert all(not p.requires_grad for p in converted.parameters())
    if kind != "Dropout":
        assert converted.extra == "kept"
    assert onepass.convert(converted) is converted


def test_a_model():
    model = Net().double()
    twin = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted = onepass.convert(model)
    assert converted is model
    assert type(model.shared) is onepass.nn.LayerNorm
    assert model.shared is model.first[1] is model.second["norm"], "a shared module must stay one"
    assert type(model.first[2]) is onepass.nn.Dropout
    assert type(model.second["rms"]) is onepass.nn.RMSNorm
    assert type(model.bn) is onepass.nn.BatchNorm1d
    assert type(model.special) is Subclass, "a subclass may compute something else and is left"
    assert type(model.first[0]) is torch.nn.Linear
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        for m in (model, twin):
            m(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            assert_close(p.grad, q[1].grad, 1e-11, name)
        twin.zero_grad()
    assert_close(model.eval()(x), twin.eval()(x), 1e-12, "evaluation")
    model.load_state_dict(twin.state_dict())


def test_second_call_changes_nothing():
    model = onepass.convert(Net())
    before = {name: id(m) for name, m in model.named_modules()}
    assert onepass.convert(model) is model
    assert {name: id(m) for name, m in model.named_modules()} == before


def test_hooks_are_kept():
    model = torch.nn.Sequential(torch.nn.LayerNorm(6))
    seen = []
    norm = model[0]
    norm.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    norm.register_forward_hook(lambda m, args, out: seen.append("forward"))
    norm.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    handle = norm.register_forward_hook(lambda m, args, out: seen.append("removed"))
    register = getattr(norm, "register_state_dict_post_hook", norm._register_state_dict_hook)  # the name in older torch
    register(lambda m, state, prefix, meta: seen.append("state"))
    norm.weight.register_hook(lambda g: seen.append("weight"))
    onepass.convert(model)
    handle.remove()
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    model.state_dict()
    assert set(seen) == {"pre", "forward", "backward", "state", "weight"}, seen


def test_what_was_done_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="onepass"):
        onepass.convert(Net())
    text = caplog.text
    for name in ("shared", "first.2", "second.rms", "bn"):
        assert name in text, f"{name} was swapped and is not in the log:\n{text}"
    assert "special" in text, f"what was left is not in the log:\n{text}"
    assert "Subclass" in text


def test_an_instance_with_a_forward_of_its_own_is_left():
    """A forward replaced on the instance survives a change of class, but may rely on torch's class."""
    norm = torch.nn.LayerNorm(6)
    norm.forward = lambda x: x + 1
    x = torch.zeros(2, 6)
    model = onepass.convert(torch.nn.Sequential(norm))
    assert torch.equal(model(x), x + 1)


def test_nothing_to_convert():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    before = list(model)
    assert onepass.convert(model) is model
    assert all(a is b for a, b in zip(model, before, strict=True))
    with pytest.raises(TypeError):
        onepass.convert(torch.ones(3))


def test_parametrized_and_lazy_modules_still_work():
    weight_normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.LayerNorm([2, 6]))
    x = torch.randn(3, 2, 6)
    expected = weight_normed(x)
    assert_close(onepass.convert(torch.nn.Sequential(weight_normed))(x), expected, 1e-6, "parametrized")
    lazy = onepass.convert(torch.nn.Sequential(torch.nn.LazyBatchNorm1d()))
    assert lazy(torch.randn(4, 3)).shape == (4, 3)


def test_transformer_layers():
    """Modules inside torch's modules; torch's fast path in evaluation must not bypass them wrongly."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    twin = copy.deepcopy(layer)
    onepass.convert(layer)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    for train in (True, False):
        assert_close(layer.train(train)(x), twin.train(train)(x), 1e-12, f"training={train}")
    with torch.no_grad():
        assert_close(layer.eval()(x), twin.eval()(x), 1e-12, "fast path")


def test_parametrized_modules():
    """Replaced like others, each on its own: copies of a module share the class that torch created for it."""
    norm = torch.nn.utils.parametrizations.weight_norm(torch.nn.LayerNorm([2, 6]))
    twin, x = copy.deepcopy(norm), torch.randn(3, 2, 6)
    expected = norm(x)
    for _ in range(2):
        onepass.convert(norm)
        assert isinstance(norm, onepass.nn.LayerNorm)
        assert not isinstance(twin, onepass.nn.LayerNorm), "the copy was converted too"
        assert_close(norm(x), expected, 1e-6, "converted")
        assert type(norm).__name__ == "ParametrizedLayerNorm"
    assert_close(copy.deepcopy(norm)(x), expected, 1e-6, "a copy of the converted")
    onepass.restore(norm)
    assert not isinstance(norm, onepass.nn.LayerNorm)
    assert_close(norm(x), expected, 1e-6, "restored")
    onepass.convert(norm)
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is onepass.nn.LayerNorm
    assert_close(norm(x), expected, 1e-6, "without parametrization")


# ---- restore ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_restore_undoes(kind):
    """The same class, objects, settings, hooks and numbers."""
    module = KINDS[kind]()
    if kind != "Dropout":
        for p in module.parameters():
            p.requires_grad_(False)
    module.extra, module.training = "kept", False
    before, attributes = repr(module), {key: value for key, value in vars(module).items() if key != "training"}
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    restored = onepass.restore(onepass.convert(module))
    assert restored is module
    assert type(restored) is getattr(torch.nn, kind)
    assert repr(restored) == before
    assert not restored.training
    assert all(vars(restored)[key] is value for key, value in attributes.items())
    assert all(p is parameters[name] for name, p in restored.named_parameters())
    assert all(b is buffers[name] for name, b in restored.named_buffers())
    assert onepass.restore(restored) is restored, "a second call"
    if kind == "Dropout":
        restored(torch.ones(3))
        assert seen == [torch.nn.Dropout]


def test_restore_of_a_model(caplog):
    model, twin = Net(), None
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, logger="onepass"):
        onepass.restore(onepass.convert(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert model.shared is model.first[1] is model.second["norm"]
    assert "restored second.rms: torch.nn.RMSNorm" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    x = torch.randn(5, 6)
    assert torch.equal(model(x), twin(x))
    for (name, came), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(came, expected), name


class OfOurs(onepass.nn.LayerNorm):
    pass


LEFT = {
    "DropoutAddLayerNorm": (lambda: onepass.nn.DropoutAddLayerNorm(6), "torch.nn has no such layer"),
    "DropoutAddRMSNorm": (lambda: onepass.nn.DropoutAddRMSNorm(6), "torch.nn has no such layer"),
    "BatchNormAct1d": (lambda: onepass.nn.BatchNormAct1d(6), "torch.nn has no such layer"),
    "SyncBatchNormAct": (lambda: onepass.nn.SyncBatchNormAct(6), "torch.nn has no such layer"),
    "Dropout": (lambda: onepass.nn.Dropout(0.5, inverted=False), "torch.nn has no such layer"),
    "OfOurs": (lambda: OfOurs(6), "a subclass of ours"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_restore_leaves_what_torch_does_not_have(kind, caplog):
    """And warns, because the tool for which restore was called will not know these layers."""
    make, reason = LEFT[kind]
    model = torch.nn.Sequential(make(), onepass.nn.RMSNorm(6))
    before = type(model[0])
    with caplog.at_level(logging.WARNING, logger="onepass"):
        onepass.restore(model)
    assert type(model[0]) is before
    assert type(model[1]) is torch.nn.RMSNorm
    assert caplog.messages == [f"left 0: {kind}, {reason}"]


def test_restore_leaves_a_forward_of_its_own(caplog):
    norm = onepass.nn.LayerNorm(6)
    norm.forward = lambda x: x + 1
    with caplog.at_level(logging.WARNING, logger="onepass"):
        assert type(onepass.restore(norm)) is onepass.nn.LayerNorm
    assert caplog.messages == ["left the model itself: LayerNorm, its forward was replaced on the instance"]
    with pytest.raises(TypeError, match=r"restore\(\): argument 'model' must be a torch\.nn\.Module, not Tensor"):
        onepass.restore(torch.ones(3))
