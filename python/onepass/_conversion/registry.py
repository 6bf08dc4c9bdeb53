"""Which forwards a module may get: a table by class for the norms of known packages and users, and guesses by likeness.

A class is known by its path, so that no package is imported for it. Whatever is found here for a class that is not torch's
is used only after the probe found no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import blocks
from .norms import BatchNormAct, FrozenBatchNorm, RowNorm, row_norms
from .probe import Inputs
from .swap import Forward, original_class

Make = Callable[[Any], Forward | None]
Example = Callable[[Any], Any]


class Candidate(NamedTuple):
    """A forward that may replace a module's.

    Attributes:
        inputs: for the comparison of both; None where the class is torch's and known.
        is_norm: whether it is a norm's, which is compared for inputs of other dtypes, too.
    """

    forward: Forward
    inputs: list[Inputs] | None
    is_norm: bool = True


_LAYER_NORM_2D = RowNorm(rms=False, eps="eps", result="input", channels_first=True)
# By the path of the class whose forward a module runs.
_KNOWN: dict[str, Any] = {
    "timm.layers.norm.LayerNorm2d": _LAYER_NORM_2D,
    "torchvision.models.convnext.LayerNorm2d": _LAYER_NORM_2D,
    "torchvision.ops.misc.FrozenBatchNorm2d": FrozenBatchNorm(),
    "timm.layers.norm_act.FrozenBatchNorm2d": FrozenBatchNorm(),
    "timm.layers.norm_act.BatchNormAct2d": BatchNormAct(),
}
_REGISTERED: dict[type[nn.Module], tuple[Make, Example | None]] = {}


def register_conversion(cls: type[nn.Module], make: Make, *, example: Example | None = None) -> None:
    """Let `convert` give modules of a class a forward that runs on our kernels.

    Args:
        cls: the class; subclasses with a forward of their own are not affected.
        make: called with a module of the class; returns forward(module, *inputs), which computes the same, or None to leave
            the module. It must be a function at the top level of a file if converted models are to be pickled.
        example: called with a module; returns the inputs (a tensor or a tuple) to compare both forwards with, in training
            and evaluation, before the module gets the new one. Without it: one of shape [2, 5, *weight.shape].

    Raises:
        TypeError: cls is not a subclass of torch.nn.Module, or make or example cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_conversion(): cls must be a subclass of torch.nn.Module, but got {cls!r}")
    for name, function in (("make", make), ("example", example)):
        if not callable(function) and not (name == "example" and function is None):
            raise TypeError(f"register_conversion(): {name} must be callable, but got {type(function).__name__}")
    _REGISTERED[cls] = make, example


def is_registered(module: nn.Module) -> bool:
    """Whether register_conversion() was called for the class whose forward a module runs."""
    return _owner(module) in _REGISTERED


def layer_candidates(module: nn.Module) -> Iterator[Candidate]:
    """Forwards of one layer, in the order in which to try them."""
    kind = _owner(module)
    if is_registered(module):
        make, example = _REGISTERED[kind]
        forward = make(module)
        if forward is not None:
            yield Candidate(forward, _example(module, example), is_norm=False)
        return
    known = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    if known is not None:
        yield Candidate(known, known.inputs(module))
        return
    for forward in row_norms(module):
        yield Candidate(forward, forward.inputs(module))


def block_candidates(module: nn.Module) -> Iterator[Candidate]:
    """Forwards of a block that run its neighbouring modules in one pass."""
    kind = _owner(module)
    if kind in blocks.OF_TORCH:
        if original_class(module) is kind or (kind is nn.Sequential and _keeps_order(module)):
            for forward in blocks.OF_TORCH[kind].candidates(module):
                yield Candidate(forward, None, is_norm=False)
        return
    if kind.__module__.startswith("torch.nn."):
        return
    for block in blocks.OF_OTHERS:
        for forward in block.candidates(module):
            yield Candidate(forward, forward.inputs(module), is_norm=False)


def _keeps_order(module: nn.Module) -> bool:
    """Whether a subclass of Sequential iterates as Sequential does."""
    return getattr(type(module), "__iter__", None) is nn.Sequential.__iter__


def _owner(module: nn.Module) -> type[nn.Module]:
    """The class that defines the forward a module runs."""
    return next(kind for kind in original_class(module).__mro__ if "forward" in vars(kind))


def _example(module: Any, example: Example | None) -> list[Inputs]:
    if example is not None:
        inputs = example(module)
        return [Inputs(inputs if isinstance(inputs, tuple) else (inputs,))]
    weight = next((t for t in (getattr(module, "weight", None), *module.parameters()) if isinstance(t, Tensor)), None)
    return [Inputs((torch.empty(2, 5, *(() if weight is None else weight.shape)),))]
