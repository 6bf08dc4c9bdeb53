"""Swap a model's torch.nn layers for those of onepass.nn."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import nn as fused

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
# What somebody may have expected to be swapped, too.
_NEIGHBOURS = (*_SWAPS, _BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.dropout._DropoutNd)


def convert(model: Model) -> Model:
    """Turn every torch.nn LayerNorm, RMSNorm, BatchNorm1d/2d/3d, SyncBatchNorm and Dropout in a model into onepass.nn's.

    In place: the modules stay the same objects, with their parameters, buffers, hooks, training flag, dtype and device, so
    that optimizers and shared modules notice nothing; a second call changes nothing. Only exact torch.nn types are
    swapped: a subclass may compute something else. The logger "onepass" gets a line (INFO) for each module that was
    swapped, and for each norm or dropout that was left, with the reason.

    Returns:
        The model; if it is itself one of these layers, it has been swapped.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert(): argument 'model' must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        swap = _SWAPS.get(type(module))
        where = name or "the model itself"
        if swap is not None and "forward" not in module.__dict__:
            module.__class__ = swap
            _logger.info("swapped %s: torch.nn.%s", where, swap.__name__)
        else:
            for reason in _reason_to_leave(module):
                _logger.info("left %s: %s, %s", where, type(module).__qualname__, reason)
    return model


def _reason_to_leave(module: nn.Module) -> Iterator[str]:
    kind = type(module)
    if kind in _SWAPS:
        yield "its forward was replaced on the instance"
    elif not isinstance(module, _NEIGHBOURS) or isinstance(module, tuple(_SWAPS.values())):
        return
    elif isinstance(module, nn.modules.lazy.LazyModuleMixin):
        yield "a lazy module: convert after its first forward"
    elif kind.__module__.startswith("torch.nn.modules"):
        yield "onepass has no kernel for it"
    else:
        yield "a subclass may compute something else"
