"""Importing this module registers our optimizers with timm, under timm's names with `onepass-` before them.

    import onepass.integrations.timm
    optimizer = timm.optim.create_optimizer_v2(model, opt="onepass-adamw", lr=1e-3, weight_decay=0.05, max_norm=1.0)

An entry has the defaults of timm's own, so `onepass-sgd` is timm's `sgd` (Nesterov's momentum) and `onepass-momentum` is its
`momentum`. timm's Lookahead goes around ours as around its own: `lookahead_onepass-adamw`. Nothing of timm's is changed.

The separator is no underscore because timm takes what follows the last one as the name: `onepass_adamw` is timm's `adamw`.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from ..optim import Lion
from ..optim._interchange import torch_counterparts

PREFIX = "onepass-"
# What stands in for classes of timm's own, by its names for them.
_TIMMS_OWN = {"lion": Lion}


def _registry() -> Any:
    """The registry from which timm's `create_optimizer_v2` makes optimizers; timm exports functions around it only."""
    try:
        timm: Any = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ImportError("onepass.integrations.timm needs timm, which is not installed: pip install timm") from None
    try:
        registry = getattr(importlib.import_module("timm.optim._optim_factory"), "default_registry", None)
    except ModuleNotFoundError:
        registry = None
    if not all(hasattr(registry, method) for method in ("list_optimizers", "get_optimizer_info", "register")):
        raise ImportError(
            f"onepass.integrations.timm finds no registry of optimizers in timm {getattr(timm, '__version__', '?')}: it "
            f"knows that of timm 1.0.12 and later"
        )
    return registry


def _register() -> None:
    registry = _registry()
    ours = torch_counterparts()
    known = set(registry.list_optimizers())
    for name in sorted(known):
        info = registry.get_optimizer_info(name)
        # Entries for other packages name their class as a string; most that are not of torch.optim have no twin here.
        cls = None if isinstance(info.opt_class, str) else ours.get(info.opt_class, _TIMMS_OWN.get(name))
        if cls is not None and PREFIX + name not in known:
            description = f"onepass.optim.{cls.__name__} in place of timm's {name}"
            registry.register(dataclasses.replace(info, name=PREFIX + name, opt_class=cls, description=description))


_register()
