"""Enters our layers into the tables of other packages, which look layers up by their exact class.

Only packages that are already imported are considered, when onepass is imported and at every convert().
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

# Opacus refuses layers that mix the examples of a batch: if torch's layer, then also our extensions of it.
_VALIDATORS = "ModuleValidator.VALIDATORS"
_CLIPPING = "opacus.grad_sample.grad_sample_module_fast_gradient_clipping"
# Module, and the path to a table whose keys are classes of layers.
_TABLES = (
    ("opacus.validators.module_validator", _VALIDATORS),
    ("opacus.validators.module_validator", "ModuleValidator.FIXERS"),
    ("opacus.grad_sample.grad_sample_module", "GradSampleModule.GRAD_SAMPLERS"),
    (_CLIPPING, "GradSampleModuleFastGradientClipping.GRAD_SAMPLERS"),
    (_CLIPPING, "GradSampleModuleFastGradientClipping.NORM_SAMPLERS"),
    ("torch.ao.quantization.quantization_mappings", "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS"),
)
# The table from tuples of classes to a function that fuses such a sequence of modules.
_FUSERS = ("torch.ao.quantization.fuser_method_mappings", "_DEFAULT_OP_LIST_TO_FUSER_METHOD")

Swaps = Mapping[type[nn.Module], type[nn.Module]]


def enter_into_registries(swaps: Swaps) -> None:
    """Enter our classes, the values of `swaps`, wherever torch's, its keys, are entered. Existing entries stay."""
    for module, path in _TABLES:
        for table in _find_tables(module, path):
            for theirs, ours in swaps.items():
                for cls in (ours, *_extensions_of(ours)) if path == _VALIDATORS else (ours,):
                    if theirs in table:
                        table.setdefault(cls, table[theirs])
    torch_classes = {ours: theirs for theirs, ours in swaps.items()}
    for table in _find_tables(*_FUSERS):
        for classes, fuse in list(table.items()):
            if isinstance(classes, tuple) and any(cls in swaps for cls in classes):
                our_classes = tuple(swaps.get(cls, cls) for cls in classes)
                table.setdefault(our_classes, _restore_before(fuse, torch_classes))


def _extensions_of(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Our layers that are this one with another operation, such as BatchNormAct2d for BatchNorm2d."""
    return (extension for extension in cls.__subclasses__() if extension.__module__.startswith("onepass."))


def _find_tables(module: str, path: str) -> Iterator[dict[Any, Any]]:
    """The table at this path if the module has been imported and has one: 0 or 1 results."""
    value: Any = sys.modules.get(module)
    for name in path.split("."):
        value = getattr(value, name, None)
    if isinstance(value, dict):
        yield value


def _restore_before(fuse: Callable[..., Any], torch_classes: Swaps) -> Callable[..., Any]:
    """`fuse` for our layers, which become torch's first because it accepts no others."""

    def fuse_restored(is_qat: bool, *modules: nn.Module) -> Any:
        for module in modules:
            module.__class__ = torch_classes.get(type(module), type(module))
        return fuse(is_qat, *modules)

    return fuse_restored
