"""Tools that look layers up by their exact class find ours: torch's eager quantization and Opacus."""

import copy
import logging
import sys
import types

import onepass
import pytest
import torch
from onepass import _registries
from support import assert_close
from torch import nn

C = 6
SWAPS = {nn.LayerNorm: onepass.nn.LayerNorm, nn.BatchNorm1d: onepass.nn.BatchNorm1d}


def test_entries_are_added_and_none_is_changed(monkeypatch):
    tool = types.ModuleType("opacus.validators.module_validator")
    tool.ModuleValidator = types.SimpleNamespace(
        VALIDATORS={nn.LayerNorm: "theirs", nn.BatchNorm1d: "theirs", onepass.nn.BatchNorm1d: "ours"}, FIXERS=None
    )
    monkeypatch.setitem(sys.modules, tool.__name__, tool)
    expected = {
        nn.LayerNorm: "theirs",
        nn.BatchNorm1d: "theirs",
        onepass.nn.LayerNorm: "theirs",
        onepass.nn.DropoutAddLayerNorm: "theirs",
        onepass.nn.BatchNorm1d: "ours",
        onepass.nn.BatchNormAct1d: "theirs",
    }
    for _ in range(2):
        _registries.enter_into_registries(SWAPS)
        assert expected == tool.ModuleValidator.VALIDATORS


# --- torch's eager quantization ---------------------------------------------------------------------------------------

quantization = pytest.importorskip("torch.ao.quantization")
QUANTIZED = pytest.mark.filterwarnings("ignore")  # torch's own deprecation warnings
NEEDS_AN_ENGINE = pytest.mark.skipif(
    "x86" not in torch.backends.quantized.supported_engines, reason="torch has no quantized kernels here"
)
CHAINS = {
    "conv, bn": lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)),
    "conv, bn, relu": lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU()),
    "bn, relu": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, C, 1), nn.BatchNorm2d(C)),
}


@QUANTIZED
@pytest.mark.parametrize("training", [False, True], ids=["static", "quantization-aware"])
@pytest.mark.parametrize("chain", CHAINS)
def test_fuse_modules(chain, training):
    if training and chain in ("transposed", "bn, relu"):
        pytest.skip("torch fuses it for evaluation only")
    model, x = CHAINS[chain](), torch.randn(4, 3, 5, 5)
    model(x)
    model.train(training)
    fuse = quantization.fuse_modules_qat if training else quantization.fuse_modules
    names = [name for name, _ in model.named_children()]
    expected = fuse(copy.deepcopy(model), [names])
    came = onepass.restore(fuse(onepass.convert(model), [names]))  # the container itself was converted
    assert [type(m) for m in came.modules()] == [type(m) for m in expected.modules()]
    assert_close(came.eval()(x), expected.eval()(x), 1e-5, chain)


def static(convert) -> torch.Tensor:
    torch.manual_seed(2)
    layers = nn.Linear(4, C), nn.LayerNorm(C), nn.Dropout(0.5), nn.Linear(C, C)
    model = convert(nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub()).eval())
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    x = torch.randn(8, 4)
    prepared(x)
    return quantization.convert(prepared)(x)


@QUANTIZED
@NEEDS_AN_ENGINE
def test_static_quantization():
    expected = static(lambda model: model)
    for convert in (onepass.convert, lambda model: onepass.restore(onepass.convert(model))):
        assert torch.equal(static(convert), expected)


@QUANTIZED
@NEEDS_AN_ENGINE
@pytest.mark.parametrize("layer", [onepass.nn.LayerNorm(4), onepass.nn.RMSNorm(4), onepass.nn.BatchNorm1d(4)])
def test_errors_on_quantized_tensors_suggest_restore(layer):
    x = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 10, torch.quint8)
    with pytest.raises(NotImplementedError, match=r"onepass\.restore\(model\)"):
        layer(x)


# --- Opacus -----------------------------------------------------------------------------------------------------------

OPACUS = pytest.mark.filterwarnings("ignore")


def opacus():
    return pytest.importorskip("opacus")


@OPACUS
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_opacus_refuses_and_replaces_batch_norm(kind, tracks):
    opacus()
    from opacus.validators import ModuleValidator

    model = nn.Sequential(nn.Linear(4, 8), kind(8, track_running_stats=tracks))
    converted = onepass.convert(copy.deepcopy(model))
    expected = [str(e) for e in ModuleValidator.validate(model)]
    assert len(expected) == 1
    assert [str(e) for e in ModuleValidator.validate(converted)] == expected
    assert type(ModuleValidator.fix(converted)[1]) is type(ModuleValidator.fix(model)[1])


@OPACUS
@pytest.mark.parametrize("kind", ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d", "SyncBatchNormAct"])
def test_opacus_refuses_layers_that_do_more(kind):
    opacus()
    from opacus.validators import ModuleValidator

    onepass.convert(nn.Identity())  # onepass may have been imported before Opacus
    assert len(ModuleValidator.validate(getattr(onepass.nn, kind)(4))) == 1


@OPACUS
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_opacus_makes_the_same_private_steps(mode, caplog):
    """Per-sample gradients use Opacus's formula for torch's LayerNorm, not its slow path for unknown layers."""
    opacus()
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    def train(convert) -> nn.Module:
        torch.manual_seed(1)
        model = convert(nn.Sequential(nn.Linear(4, C), nn.LayerNorm(C), nn.Dropout(0.0), nn.Linear(C, 1)))
        data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)
        optimizer, criterion = torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss()
        made = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=data,
            criterion=criterion,
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        private, optimizer, *rest = made
        loader, criterion = rest[-1], rest[0] if mode == "ghost" else criterion
        for x, y in loader:
            optimizer.zero_grad()
            criterion(private(x), y).backward()
            optimizer.step()
        return model

    with caplog.at_level(logging.INFO):
        expected, came = train(lambda model: model), train(onepass.convert)
    assert isinstance(came[1], onepass.nn.LayerNorm)
    for (name, p), q in zip(came.named_parameters(), expected.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-5, name)
