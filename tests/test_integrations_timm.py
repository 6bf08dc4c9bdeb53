"""timm's create_optimizer_v2 makes our optimizers, with timm's defaults, and timm's own entries stay."""

import importlib
import re
import sys
import types
from collections.abc import Iterator

import onepass
import pytest
import torch

MODULE = "onepass.integrations.timm"


def import_torchvision() -> None:
    """timm imports torchvision, whose compiled operators may not fit this torch: the names are enough for timm."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            STUBS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


STUBS = torch.library.Library("torchvision", "FRAGMENT")


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """timm, with its registry as it was before the test."""
    import_torchvision()
    timm = pytest.importorskip("timm")
    registry = importlib.import_module("timm.optim._optim_factory").default_registry
    monkeypatch.setattr(registry, "_optimizers", dict(registry._optimizers))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield timm
    sys.modules.pop(MODULE, None)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))


def trained(timm: types.ModuleType, name: str, **options: float) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    network = model()
    optimizer = timm.optim.create_optimizer_v2(network, opt=name, lr=0.01, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        network(torch.randn(16, 4, generator=generator)).square().mean().backward()
        optimizer.step()
    return optimizer, [p.detach() for p in network.parameters()]


def test_every_entry_trains_as_timms(timm: types.ModuleType) -> None:
    before = set(timm.optim.list_optimizers())
    importlib.import_module(MODULE)
    ours = set(timm.optim.list_optimizers()) - before
    names = "sgd momentum adam adamw nadam radam radamw adamax adagrad adadelta rmsprop lion"
    assert ours >= {f"onepass-{name}" for name in names.split()}
    for name in sorted(ours):
        optimizer, params = trained(timm, name)
        their_optimizer, their_params = trained(timm, name.removeprefix("onepass-"))
        assert type(optimizer) is getattr(onepass.optim, type(their_optimizer).__name__)
        assert type(their_optimizer).__module__.startswith("timm." if name == "onepass-lion" else "torch.optim.")
        torch.testing.assert_close(params, their_params)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]  # timm's groups


def test_our_own_options_and_timms_lookahead(timm: types.ModuleType) -> None:
    importlib.import_module(MODULE)
    optimizer, _ = trained(timm, "onepass-adamw", max_norm=1e-3)
    assert optimizer.grad_norm > 1e-3
    around, _ = trained(timm, "lookahead_onepass-adamw")
    assert type(around) is timm.optim.Lookahead
    assert type(around._base_optimizer) is onepass.optim.AdamW


def test_nothing_else_is_touched(timm: types.ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    registry = importlib.import_module("timm.optim._optim_factory").default_registry
    before = dict(registry._optimizers)
    importlib.import_module(MODULE)
    assert {name: registry._optimizers[name] for name in before} == before
    after = dict(registry._optimizers)
    importlib.reload(sys.modules[MODULE])
    assert registry._optimizers == after
    assert not caplog.records  # timm warns of a name that is registered twice
    assert all(name in before or name.startswith("onepass-") for name in after)


# ------------------------------------------------------------------------------------------------- other timms, or none


def fake_timm(monkeypatch: pytest.MonkeyPatch, **factory: object) -> None:
    """A timm 0.0.1 whose module with the registry, if any, has these names."""
    names = ("timm", "timm.optim", "timm.optim._optim_factory") if factory else ("timm", "timm.optim")
    for name in [loaded for loaded in sys.modules if loaded.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["timm"].__version__ = "0.0.1"
    for key, value in factory.items():
        setattr(sys.modules["timm.optim._optim_factory"], key, value)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


@pytest.mark.parametrize("factory", [{}, {"create_optimizer_v2": None}, {"default_registry": object()}])
def test_a_timm_without_a_registry(monkeypatch: pytest.MonkeyPatch, factory: dict[str, object]) -> None:
    fake_timm(monkeypatch, **factory)
    with pytest.raises(
        ImportError, match=re.escape("no registry of optimizers in timm 0.0.1: it knows that of timm 1.0.12")
    ):
        importlib.import_module(MODULE)


def test_no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_timm(monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [NoTimm(), *sys.meta_path])
    for name in ("timm", "timm.optim"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="needs timm, which is not installed: pip install timm"):
        importlib.import_module(MODULE)


class NoTimm:
    """An importer of nothing that hides an installed timm."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")


def test_an_error_inside_timm_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm itself lacks is not reported as a missing timm."""

    class Broken(NoTimm):
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "timm":
                raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    fake_timm(monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "timm")
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        importlib.import_module(MODULE)


def test_a_registry_gets_the_classes_of_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of other packages, by name or class, get no twin."""
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Info:
        name: str
        opt_class: object
        description: str = ""
        defaults: object = None

    class Registry:
        entries: dict[str, Info]

        def list_optimizers(self) -> list[str]:
            return list(self.entries)

        def get_optimizer_info(self, name: str) -> Info:
            return self.entries[name]

        def register(self, info: Info) -> None:
            assert info.name not in self.entries
            self.entries[info.name] = info

    registry = Registry()
    registry.entries = {
        "sgd": Info("sgd", torch.optim.SGD, defaults={"nesterov": True}),
        "alias": Info("sgd", torch.optim.SGD),
        "far": Info("far", "apex.optimizers.FusedSGD"),
        "other": Info("other", torch.optim.Adafactor),
    }
    fake_timm(monkeypatch, default_registry=registry)
    importlib.import_module(MODULE)
    added = {name: info for name, info in registry.entries.items() if name.startswith("onepass-")}
    assert {name: info.opt_class for name, info in added.items()} == {
        "onepass-sgd": onepass.optim.SGD,
        "onepass-alias": onepass.optim.SGD,
    }
    assert added["onepass-sgd"].defaults == {"nesterov": True}
    assert len(registry.entries) == 6
