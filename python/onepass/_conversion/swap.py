"""Gives a module another forward by giving it another class, which derives from its own.

So a converted module is still an instance of its class, with the same parameters, buffers, hooks, attributes and name. The
new class is made for one pair of class and forward. It cannot be imported, so a module pickles and copies as that pair.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

_logger = logging.getLogger("onepass")

Forward = Callable[
    ..., Any
]  # called as forward(module, *inputs); hashable, and picklable if converted modules are to be


def replace_forward(module: nn.Module, forward: Forward) -> None:
    """Let `module` compute forward(module, *inputs) when it is called."""
    kind: Any = type(module)
    module.__class__ = _class_with(kind, forward)


def replaced_forward(module: nn.Module) -> Forward | None:
    """The forward that replace_forward gave the module, or None."""
    found = vars(type(module)).get("_onepass_forward")
    return None if found is None else found.__func__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before replace_forward."""
    return type(module).__bases__[0] if replaced_forward(module) is not None else type(module)


@functools.cache
def _class_with(original: Any, forward: Forward) -> type[nn.Module]:
    def reduce(self: Any, protocol: Any) -> Any:
        function, arguments, *state = super(kind, self).__reduce_ex__(protocol)
        if type(self) is kind:  # no subclass, such as FSDP's
            function, arguments = _rebuild, (original, forward)
        return function, arguments, *state

    @functools.wraps(original.forward)  # tools read its signature
    def run(self: Any, *inputs: Any, **options: Any) -> Any:
        return self._onepass_forward(self, *inputs, **options)

    kind: type[nn.Module] = type(
        original.__name__,
        (original,),
        {
            "forward": run,
            "__reduce_ex__": reduce,
            "__prepare_scriptable__": _undo_for_script,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_onepass_forward": staticmethod(forward),
        },
    )
    return kind


def _undo_for_script(module: nn.Module) -> nn.Module:
    """What torch.jit.script calls: it compiles the source of the module's own forward."""
    module.__class__ = original_class(module)
    _logger.warning("restored a %s: torch.jit.script compiles its own forward", type(module).__qualname__)
    return module


def _rebuild(original: Any, forward: Forward) -> nn.Module:
    kind = _class_with(original, forward)
    return kind.__new__(kind)
