"""Modules whose call is nothing but their forward, and the activations among them that a BatchNorm can apply itself."""

from __future__ import annotations

from torch import nn

from .._compat import has_hooks


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module does nothing but its class's forward."""
    return not has_hooks(module) and "forward" not in module.__dict__


def slope_of(activation: nn.Module) -> float | None:
    """The slope of the leaky ReLU that a module is (0: ReLU); None where it is something else or its call is observed."""
    if not is_bare(activation):
        return None
    if type(activation) is nn.ReLU:
        return 0.0
    if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0:
        return activation.negative_slope
    return None
