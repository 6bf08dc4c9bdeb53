"""Gives a module another forward by giving it another class, which derives from its own.

So a converted module is still an instance of its class, with the same parameters, buffers, hooks, attributes and name. The
new class is made for one pair of class and forward. It cannot be imported, so a module pickles and copies as that pair.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_logger = logging.getLogger("onepass")

Forward = Callable[..., Any]
"""Called as forward(module, *inputs); hashable, and picklable if converted modules are to be.

`arity`, if it has that attribute, is how many inputs it takes; calls with more, by whatever names, run the module's own
forward. With `takes_options`, the others are passed on by their names in the module's own forward.
"""

# By id of the original class and by forward. A class lives as long as its modules, and so does what its forward refers to.
_classes: weakref.WeakValueDictionary[tuple[int, Forward], type[nn.Module]] = weakref.WeakValueDictionary()


def replace_forward(module: nn.Module, forward: Forward) -> None:
    """Let `module` compute forward(module, *inputs) when it is called."""
    module.__class__ = _class_with(type(module), forward)


def replaced_forward(module: nn.Module) -> Forward | None:
    """The forward that replace_forward gave the module, or None."""
    return getattr(type(module), "_onepass_forward", None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before replace_forward."""
    for kind in type(module).__mro__:  # others, such as FSDP, may have derived from the new class
        if "_onepass_forward" in vars(kind):
            return kind.__bases__[0]
    return type(module)


def can_restore(module: nn.Module) -> bool:
    """Whether the module's class is still the one that replace_forward gave it."""
    return "_onepass_forward" in vars(type(module))


def _class_with(original: type[nn.Module], forward: Forward) -> type[nn.Module]:
    key = id(original), forward
    found = _classes.get(key)
    if found is None:
        found = _classes[key] = _make_class(original, forward)
    return found


def _make_class(original: Any, forward: Forward) -> type[nn.Module]:
    own = original.forward
    arity, takes_options = getattr(forward, "arity", None), getattr(forward, "takes_options", False)
    signature = inspect.signature(own)

    @functools.wraps(own)  # tools read its signature
    def run(self: Any, *inputs: Any, **options: Any) -> Any:
        is_usual = len(inputs) == arity and (takes_options or not options) and isinstance(inputs[0], Tensor)
        if is_usual or arity is None:
            return forward(self, *inputs, **options)
        bound = _bind(signature, forward, self, inputs, options)
        if bound is None:
            return own(self, *inputs, **options)
        values, rest = bound
        return forward(self, *values, **rest)

    def reduce(self: Any, protocol: Any) -> Any:
        function, arguments, *state = super(kind, self).__reduce_ex__(protocol)
        if type(self) is kind:
            arguments = tuple(original if argument is kind else argument for argument in arguments)
            function, arguments = _rebuild, (function, arguments, original, forward)
        return function, arguments, *state

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


def _bind(
    signature: inspect.Signature, forward: Any, module: Any, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]] | None:
    """The arguments of `forward` for a call by the signature of a module's own forward; None where it does not take them."""
    try:
        arguments = signature.bind(module, *inputs, **options).arguments
    except TypeError:
        return None
    _, *names = arguments
    values = [arguments[name] for name in names[: forward.arity]]
    rest: dict[str, Any] = {}
    for name in names[forward.arity :]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return None
        rest.update(arguments[name] if kind is inspect.Parameter.VAR_KEYWORD else {name: arguments[name]})
    is_usual = len(values) == forward.arity and isinstance(values[0], Tensor)
    return (values, rest) if is_usual and (forward.takes_options or not rest) else None


def _undo_for_script(module: nn.Module) -> nn.Module:
    """What torch.jit.script calls: it compiles the source of the module's own forward."""
    module.__class__ = original_class(module)
    _logger.warning("restored a %s: torch.jit.script compiles its own forward", type(module).__qualname__)
    return module


def _rebuild(
    function: Callable[..., Any], arguments: tuple[Any, ...], original: type[nn.Module], forward: Forward
) -> nn.Module:
    module: nn.Module = function(*arguments)
    module.__class__ = _class_with(original, forward)
    return module
