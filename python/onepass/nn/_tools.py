"""What tools that take a model apart find in our layers: fx meets leaves, TorchScript meets torch's source."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.compiler import is_compiling

Forward = TypeVar("Forward", bound=Callable[..., Any])


def as_leaf(module: nn.Module, *inputs: object) -> Tensor | None:
    """The node that stands for a call of `module` while torch.fx traces, or None: there is no trace, or it goes inside.

    Tracers keep a module whole if its class comes from torch.nn; of ours they ask what it is made of. So the layer asks
    the tracer what it would do with torch's own, and records what the tracer would.
    """
    if is_compiling():
        return None
    from torch.fx import Proxy

    tracer = next((value.tracer for value in inputs if isinstance(value, Proxy)), None)
    find_path = getattr(tracer, "path_of_module", None)  # a proxy without a module around it has none
    if tracer is None or find_path is None or not _runs_our_forward(module):
        return None
    path = find_path(module)
    if not tracer.is_leaf_module(_as_torchs(module), path):  # type: ignore[attr-defined]
        return None
    arguments = tuple(value for value in inputs if value is not None)
    node: Any = tracer.create_proxy("call_module", path, arguments, {})
    return cast(Tensor, node)


def _runs_our_forward(module: nn.Module) -> bool:
    """Whether calling the module is calling our forward: a subclass may do more than that."""
    if "forward" in vars(module):
        return False
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return owner.__module__.startswith("onepass.")


def _as_torchs(module: nn.Module) -> nn.Module:
    """The module as an instance of the class of torch.nn that ours derives from. It shares everything with the module."""
    base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn"))
    twin: nn.Module = object.__new__(base)
    twin.__dict__ = module.__dict__
    return twin


def scripted(forward: Forward) -> Forward:
    """torch's forward as a method `_scripted`: TorchScript compiles methods under the name their function has."""
    copy = types.FunctionType(
        forward.__code__, forward.__globals__, "_scripted", forward.__defaults__, forward.__closure__
    )
    copy.__annotations__ = forward.__annotations__
    return cast(Forward, copy)


# Functions that make another module of a BatchNorm's numbers, as if they were all of it.
_REBUILDERS = {"convert_sync_batchnorm", "convert_syncbn_model", "fuse_conv_bn_eval", "fuse_linear_bn_eval"}


class GuardedEps:
    """The attribute eps, which every such function reads, of a module that it would take an activation from.

    No property: TorchScript would compile it.
    """

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None:
            return self
        if not is_compiling() and sys._getframe(1).f_code.co_name in _REBUILDERS:
            _refuse_to_be_rebuilt(module, sys._getframe(1))
        return module.__dict__["eps"]

    def __set__(self, module: nn.Module, value: float) -> None:
        module.__dict__["eps"] = value


def _refuse_to_be_rebuilt(module: nn.Module, caller: types.FrameType) -> None:
    if caller.f_globals.get("__name__", "").startswith("onepass."):
        return
    raise RuntimeError(
        f"{caller.f_code.co_name} would drop the activation and the residual of {type(module).__name__}. To synchronise it between "
        f"processes use onepass.nn.SyncBatchNorm.convert_sync_batchnorm; to fold it into a convolution use "
        f"torch.nn.utils.fusion.fuse_conv_bn_weights and leave the activation behind the convolution."
    )
