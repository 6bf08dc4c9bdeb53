"""Let a model's layers run on onepass's kernels, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, overload

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .. import nn as fused
from .._registries import enter_into_registries
from .probe import Probe
from .registry import Candidate, block_candidates, is_registered, layer_candidates
from .report import Report, Row
from .swap import can_restore, original_class, replace_forward, replaced_forward

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
# Layers that a user may expect to be converted, too.
_RELATED = (*_SWAPS, _BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.dropout._DropoutNd)

enter_into_registries(_SWAPS)


@overload
def convert(model: Model, *, fuse: bool = True, report: Literal[False] = False) -> Model: ...
@overload
def convert(model: Model, *, fuse: bool = True, report: Literal[True]) -> Report: ...


def convert(model: Model, *, fuse: bool = True, report: bool = False) -> Model | Report:
    """Let a model's norms and dropouts, and blocks of neighbouring layers, run on onepass's kernels.

    In place: modules stay the same objects, with their parameters, buffers, hooks, training flag, dtype and device, so that
    optimizers and shared modules notice nothing; a second call changes nothing.

    - torch.nn's LayerNorm, RMSNorm, BatchNorm1d/2d/3d, SyncBatchNorm and Dropout become those of onepass.nn.
    - Norms of other packages (those of timm, torchvision and transformers; every class that looks like a norm over rows;
      classes given to `register_conversion`) get another forward. They stay instances of their class.
    - With `fuse`, so do blocks in which BatchNorm and ReLU, or dropout, residual and norm, are neighbours: torch.nn's
      Sequential, TransformerEncoderLayer and TransformerDecoderLayer, the blocks of ResNets, of BERT, of vision transformers
      and of Llama, and their relatives. Where a module inside has hooks, that module is called as usual.

    A module of a class that is not torch's gets its new forward only after a copy of it computed the same with both on random
    inputs: results, gradients and buffers, in training and in evaluation. The logger "onepass" gets a line (INFO) for each
    module that was converted, and for each layer that was left, with the reason. `restore` is the way back.

    Args:
        fuse: False converts layers one by one.
        report: return a table instead of the model: one row (module, was, now, why_not) per line of the log.

    Returns:
        The model; if it is itself one of these layers, it has been converted.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model("convert", model)
    enter_into_registries(_SWAPS)
    rows, probe = Report(), Probe()
    for name, module in _modules(model):
        rows.extend(_convert_layer(name, module, probe))
    if fuse:
        for name, module in _modules(model):
            rows.extend(_convert_by(name, module, block_candidates, probe))
    for row in rows:
        if row.now is not None:
            _logger.info("swapped %s: %s", row.module, row.now)
        else:
            _logger.info("left %s: %s, %s", row.module, row.was, row.why_not)
    return rows if report else model


def restore(model: Model) -> Model:
    """Undo `convert`: every module that it may have changed is again what torch or its own package made it.

    In place, like `convert`. Layers that torch.nn does not have (DropoutAddLayerNorm, DropoutAddRMSNorm, the BatchNormAct
    classes, a Dropout with inverted=False) and subclasses of ours are left, each with a line (WARNING) in the logger
    "onepass": they work on, as layers of onepass.

    Returns:
        The model; if it is itself one of these layers, it has been restored.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model("restore", model)
    for name, module in _modules(model):
        if can_restore(module):
            module.__class__ = original_class(module)
            _logger.info("restored %s: %s", name, _path(type(module)))
            continue
        if replaced_forward(module) is not None:
            _logger.warning("left %s: its class %s derives from the converted one", name, _path(type(module)))
            continue
        kind = parametrize.type_before_parametrizations(module)
        swap = _RESTORES.get(kind)
        if swap is not None and "forward" not in module.__dict__ and getattr(module, "inverted", True):
            _set_class(module, swap)
            _logger.info("restored %s: torch.nn.%s", name, swap.__name__)
        elif isinstance(module, _OURS):
            reason = "torch.nn has no such layer" if kind.__module__.startswith("onepass.") else "a subclass of ours"
            if "forward" in module.__dict__:
                reason = "its forward was replaced on the instance"
            _logger.warning("left %s: %s, %s", name, type(module).__qualname__, reason)
    return model


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}(): argument 'model' must be a torch.nn.Module, not {type(model).__name__}")


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its name."""
    for name, module in model.named_modules():
        yield name or "the model itself", module


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _convert_layer(name: str, module: nn.Module, probe: Probe) -> Iterator[Row]:
    if replaced_forward(module) is not None:
        return
    kind = parametrize.type_before_parametrizations(module)
    swap = _SWAPS.get(kind)
    if swap is not None and "forward" not in module.__dict__:
        _set_class(module, swap)
        yield Row(name, f"torch.nn.{kind.__name__}", f"onepass.nn.{swap.__name__}", None)
        return
    if is_registered(module):
        yield from _convert_by(name, module, layer_candidates, probe)
        return
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        why = "its dropout is a call inside attention, which onepass.patch() reaches"
        yield Row(name, type(module).__qualname__, None, why)
        return
    is_related = isinstance(module, _RELATED) and not isinstance(module, _OURS)
    reason = _reason_to_leave(module, kind) if is_related else None
    if reason is not None:
        yield Row(name, type(module).__qualname__, None, reason)
        return
    if isinstance(module, _OURS) or (kind.__module__.startswith(("torch.", "onepass.")) and not is_related):
        return
    rows = list(_convert_by(name, module, layer_candidates, probe))
    if not rows and is_related:
        rows.append(Row(name, type(module).__qualname__, None, "a subclass may compute something else"))
    yield from rows


def _reason_to_leave(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a layer that a user may expect to be converted is not; None if it may be."""
    if kind in _SWAPS:
        return "its forward was replaced on the instance"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "a lazy module: convert after its first forward"
    return "onepass has no kernel for it" if kind.__module__.startswith("torch.nn.modules") else None


def _convert_by(
    name: str, module: nn.Module, candidates: Callable[[nn.Module], Iterator[Candidate]], probe: Probe
) -> Iterator[Row]:
    """Give a module the first candidate that computes the same; a row if there was any."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)) or replaced_forward(module) is not None:
        return
    was, reasons = _path(type(module)), []
    try:
        for forward, inputs, is_norm in candidates(module):
            reason = _reason_to_keep_forward(module)
            if reason is None and inputs is not None:
                reason = probe.difference(module, forward, inputs, mixed_dtypes=is_norm)
            if reason is None:
                row = Row(name, was, _describe(forward), None)
                replace_forward(module, forward)
                yield row
                return
            reasons.append(reason)
    except Exception as error:  # of a module's own code, or of what a user registered
        reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    if reasons:
        yield Row(name, was, None, reasons[0])


def _reason_to_keep_forward(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return "its parameters are parametrized" if parametrize.is_parametrized(module) else None


def _describe(forward: Any) -> str:
    if hasattr(forward, "fuses"):
        return f"fused: {forward.fuses}"
    return _path(forward) if hasattr(forward, "__qualname__") else repr(forward)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module one of `kind`, and let it keep its parametrizations.

    These are properties of a class that torch makes for the module. Copies of the module share that class, so it must not
    change.
    """
    if parametrize.is_parametrized(module):
        members = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), members)
    module.__class__ = kind
