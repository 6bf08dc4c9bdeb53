"""Tables of other packages that know layers by their exact class: ours are entered beside torch's.

Only packages that are already imported are asked; importing onepass and every convert() ask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

# What is no privacy in torch's layer is none in one of ours that does more.
_VALIDATORS = "ModuleValidator.VALIDATORS"
_CLIPPING = "opacus.grad_sample.grad_sample_module_fast_gradient_clipping"
# Module, and the path to a table from class to what the package does with it.
_TABLES = (
    ("opacus.validators.module_validator", _VALIDATORS),
    ("opacus.validators.module_validator", "ModuleValidator.FIXERS"),
    ("opacus.grad_sample.grad_sample_module", "GradSampleModule.GRAD_SAMPLERS"),
    (_CLIPPING, "GradSampleModuleFastGradientClipping.GRAD_SAMPLERS"),
    (_CLIPPING, "GradSampleModuleFastGradientClipping.NORM_SAMPLERS"),
    ("torch.ao.quantization.quantization_mappings", "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS"),
)
# The same from sequences of classes to a function that fuses such modules.
_FUSERS = ("torch.ao.quantization.fuser_method_mappings", "_DEFAULT_OP_LIST_TO_FUSER_METHOD")

Swaps = Mapping[type[nn.Module], type[nn.Module]]


def enter_into_registries(swaps: Swaps) -> None:
    """Enter our classes, which stand in for the keys of `swaps`, where theirs are; entries that are there stay."""
    for module, path in _TABLES:
        for table in _find(module, path):
            for theirs, ours in swaps.items():
                for kind in (ours, *_with_more(ours)) if path == _VALIDATORS else (ours,):
                    if theirs in table:
                        table.setdefault(kind, table[theirs])
    back = {ours: theirs for theirs, ours in swaps.items()}
    for table in _find(*_FUSERS):
        for classes, fuse in list(table.items()):
            if isinstance(classes, tuple) and any(kind in swaps for kind in classes):
                table.setdefault(tuple(swaps.get(kind, kind) for kind in classes), _restoring(fuse, back))


def _with_more(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Layers of ours that are this one with something behind it."""
    return (more for more in kind.__subclasses__() if more.__module__.startswith("onepass."))


def _find(module: str, path: str) -> Iterator[dict[Any, Any]]:
    found: Any = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    if isinstance(found, dict):
        yield found


def _restoring(fuse: Callable[..., Any], back: Swaps) -> Callable[..., Any]:
    """The fuser for layers of ours, which it takes only as torch's: they become them."""

    def fuse_restored(is_qat: bool, *modules: nn.Module) -> Any:
        for module in modules:
            module.__class__ = back.get(type(module), type(module))
        return fuse(is_qat, *modules)

    return fuse_restored
