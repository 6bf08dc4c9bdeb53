"""The truth of every update rule: float64 NumPy, one file per rule, straight from the formula and slow.

A reference is a class with an explicit `state` and `step(params, grads)`. Beside it, `RULES` says how the optimizer of the
same name is tested: see Rule in common.py. Modules with `RULES` are found by listing this folder.
"""

import importlib
import pkgutil

from .common import Rule

_modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
RULES: dict[str, Rule] = {rule.name: rule for module in _modules for rule in getattr(module, "RULES", [])}
