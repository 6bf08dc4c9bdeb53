"""Our layers in tools that take a model apart: torch.fx records them as leaves, TorchScript compiles torch's code."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.compiler import is_compiling

Forward = TypeVar("Forward", bound=Callable[..., Any])


def record_as_leaf(module: nn.Module, *inputs: object) -> Tensor | None:
    """While torch.fx traces: record a call of `module` as one node and return it. None without a trace, or if the
    tracer would trace into torch's layer, too.

    Tracers keep modules of torch.nn whole and trace into all others, ours included. So the layer asks the tracer what
    it would do with torch's layer and records that.
    """
    if is_compiling():
        return None
    from torch.fx import Proxy

    tracer = next((value.tracer for value in inputs if isinstance(value, Proxy)), None)
    find_path = getattr(tracer, "path_of_module", None)  # missing if the trace has no root module
    if tracer is None or find_path is None or not _runs_our_forward(module):
        return None
    path = find_path(module)
    if not tracer.is_leaf_module(_as_torch_layer(module), path):  # type: ignore[attr-defined]
        return None
    arguments = tuple(value for value in inputs if value is not None)
    node: Any = tracer.create_proxy("call_module", path, arguments, {})
    return cast(Tensor, node)


def _runs_our_forward(module: nn.Module) -> bool:
    """Whether calling the module runs our forward: a subclass or an instance may override it."""
    if "forward" in vars(module):
        return False
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner.__module__.startswith("onepass.")


def _as_torch_layer(module: nn.Module) -> nn.Module:
    """The module as an instance of the torch.nn class that ours derives from, sharing all attributes with it."""
    base = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn"))
    twin: nn.Module = object.__new__(base)
    twin.__dict__ = module.__dict__
    return twin


def scripted(forward: Forward) -> Forward:
    """torch's forward as a method named `_scripted`: TorchScript compiles a method under its function's name."""
    copy = types.FunctionType(
        forward.__code__, forward.__globals__, "_scripted", forward.__defaults__, forward.__closure__
    )
    copy.__annotations__ = forward.__annotations__
    return cast(Forward, copy)


# Functions that build another module from a BatchNorm's parameters and statistics, and would lose an activation.
_REBUILDERS = {"convert_sync_batchnorm", "convert_syncbn_model", "fuse_conv_bn_eval", "fuse_linear_bn_eval"}


class GuardedEps:
    """The attribute eps of a BatchNormAct. Every function of _REBUILDERS reads it; there it raises RuntimeError.

    Not a property, because TorchScript would compile it.
    """

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if not is_compiling() and sys._getframe(1).f_code.co_name in _REBUILDERS:
            _refuse_rebuild(module, sys._getframe(1))
        return module.__dict__["eps"]

    def __set__(self, module: nn.Module, value: float) -> None:
        module.__dict__["eps"] = value


def _refuse_rebuild(module: nn.Module, caller: types.FrameType) -> None:
    if caller.f_globals.get("__name__", "").startswith("onepass."):
        return
    raise RuntimeError(
        f"{caller.f_code.co_name} would drop the activation and the residual of {type(module).__name__}. To synchronise it "
        f"between processes use onepass.nn.SyncBatchNorm.convert_sync_batchnorm; to fold it into a convolution use "
        f"torch.nn.utils.fusion.fuse_conv_bn_weights and apply the activation after the convolution."
    )
