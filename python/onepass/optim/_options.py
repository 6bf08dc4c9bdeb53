"""Options of the optimizers, and what error messages call a parameter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def check(ok: bool, text: str, value: object) -> None:
    """Raise torch.optim's ValueError for a hyper-parameter out of range; NaN is out of every range."""
    if not ok:
        raise ValueError(f"{text}: {value}")


def check_not_negative(group: dict[str, Any], *options: str) -> None:
    """Raise torch.optim's ValueError for the first of these options that is negative or NaN."""
    texts = {"lr": "Invalid learning rate", "eps": "Invalid epsilon value"}
    for name in options:
        check(group[name] >= 0, texts.get(name, f"Invalid {name} value"), group[name])


def check_betas(group: dict[str, Any]) -> None:
    """Raise ValueError, torch.optim's for Adam, unless each of the betas is one number from 0 to below 1."""
    for index, beta in enumerate(group["betas"]):
        check_scalar(f"betas[{index}]", beta)
        check(0 <= beta < 1, f"Invalid beta parameter at index {index}", beta)


def check_scalar(name: str, value: float | Tensor) -> None:
    """A hyper-parameter given as a tensor must have one element."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")


def as_python_number(value: Any) -> Any:
    """A number of NumPy's as Python's own, in a tuple too: torch.load(weights_only=True) takes no other. All else as it is."""
    if isinstance(value, tuple):
        return tuple(map(as_python_number, value))
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1 else value


def check_params(group: dict[str, Any], number: int) -> None:
    """Raise for parameters that no step could update."""
    for index, param in enumerate(group["params"]):
        if torch.nn.parameter.is_lazy(param):
            continue  # a lazy module gives it shape and memory of its own in the first forward pass
        if param.is_neg() and param.numel() > 1 and param.is_contiguous():
            name = name_of(group, number, index)
            raise RuntimeError(f"{name} is a lazily negated view of another tensor. Use resolve_neg().")


def options_of(cls: type) -> dict[str, Any]:
    """Options of an optimizer of this package, or of torch, with their defaults. What a subclass takes besides is its own."""
    packages = (f"{__package__}.", "torch.optim.")
    known = next(base for base in cls.__mro__ if base.__module__.startswith(packages))
    parameters = inspect.signature(known).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def name_of(group: dict[str, Any], number: int, index: int) -> str:
    """What error messages call a parameter: its name where the optimizer was given named parameters."""
    names = group.get("param_names")
    return f"parameter '{names[index]}'" if names else f"parameter {index} of group {number}"
