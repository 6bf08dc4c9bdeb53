"""What a BatchNorm can apply to its own result."""

from __future__ import annotations

from torch import nn

from .._compat import has_hooks


def slope_of(activation: nn.Module) -> float | None:
    """The slope of the leaky ReLU that a module is (0: ReLU); None where it is something else or its call is observed."""
    if has_hooks(activation) or "forward" in activation.__dict__:
        return None
    if type(activation) is nn.ReLU:
        return 0.0
    if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0:
        return activation.negative_slope
    return None
