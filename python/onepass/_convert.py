"""Swap a model's torch.nn layers for those of onepass.nn, and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from . import nn as fused
from ._registries import enter_into_registries

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger("onepass")

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(fused, name)
    for name in (
        "LayerNorm",
        "RMSNorm",
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "SyncBatchNorm",
        "Dropout",
    )
}
_RESTORES = {ours: theirs for theirs, ours in _SWAPS.items()}
_OURS = tuple(_RESTORES)
# What somebody may have expected to be swapped, too.
_NEIGHBOURS = (*_SWAPS, _BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.dropout._DropoutNd)

enter_into_registries(_SWAPS)


def convert(model: Model) -> Model:
    """Turn every torch.nn LayerNorm, RMSNorm, BatchNorm1d/2d/3d, SyncBatchNorm and Dropout in a model into onepass.nn's.

    In place: the modules stay the same objects, with their parameters, buffers, hooks, training flag, dtype and device, so
    that optimizers and shared modules notice nothing; a second call changes nothing. Only exact torch.nn types are
    swapped, parametrized ones too: a subclass may compute something else. The logger "onepass" gets a line (INFO) for each
    module that was swapped, and for each norm or dropout that was left, with the reason. `restore` is the way back.

    Returns:
        The model; if it is itself one of these layers, it has been swapped.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model("convert", model)
    enter_into_registries(_SWAPS)
    for where, module in _modules(model):
        swap = _SWAPS.get(parametrize.type_before_parametrizations(module))
        if swap is not None and "forward" not in module.__dict__:
            _set_class(module, swap)
            _logger.info("swapped %s: torch.nn.%s", where, swap.__name__)
        else:
            for reason in _reason_to_leave(module):
                _logger.info("left %s: %s, %s", where, type(module).__qualname__, reason)
    return model


def restore(model: Model) -> Model:
    """Turn every onepass.nn layer in a model that `convert` may have made back into torch.nn's: for tools that know exact types.

    In place, like `convert`. Layers that torch.nn does not have (DropoutAddLayerNorm, DropoutAddRMSNorm, the BatchNormAct
    classes, a Dropout with inverted=False) and subclasses of ours are left, each with a line (WARNING) in the logger
    "onepass": they work on, as layers of onepass.

    Returns:
        The model; if it is itself one of these layers, it has been swapped back.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model("restore", model)
    for where, module in _modules(model):
        kind = parametrize.type_before_parametrizations(module)
        swap = _RESTORES.get(kind)
        if swap is not None and "forward" not in module.__dict__ and getattr(module, "inverted", True):
            _set_class(module, swap)
            _logger.info("restored %s: torch.nn.%s", where, swap.__name__)
        elif isinstance(module, _OURS):
            reason = "torch.nn has no such layer" if kind.__module__.startswith("onepass.") else "a subclass of ours"
            if "forward" in module.__dict__:
                reason = "its forward was replaced on the instance"
            _logger.warning("left %s: %s, %s", where, type(module).__qualname__, reason)
    return model


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}(): argument 'model' must be a torch.nn.Module, not {type(model).__name__}")


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, and what to call it."""
    for name, module in model.named_modules():
        yield name or "the model itself", module


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module one of `kind`, and let it keep its parametrizations.

    These are properties of a class that torch makes for the module. Copies of the module have the same class, so that it
    must stay as it is.
    """
    if parametrize.is_parametrized(module):
        members = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), members)
    module.__class__ = kind


def _reason_to_leave(module: nn.Module) -> Iterator[str]:
    kind = parametrize.type_before_parametrizations(module)
    if kind in _SWAPS:
        yield "its forward was replaced on the instance"
    elif not isinstance(module, _NEIGHBOURS) or isinstance(module, _OURS):
        return
    elif isinstance(module, nn.modules.lazy.LazyModuleMixin):
        yield "a lazy module: convert after its first forward"
    elif kind.__module__.startswith("torch.nn.modules"):
        yield "onepass has no kernel for it"
    else:
        yield "a subclass may compute something else"
