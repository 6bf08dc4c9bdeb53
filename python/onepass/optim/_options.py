"""Options of the optimizers: their checks, and which an optimizer has."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor

# Options of every optimizer here. The groups have them like all options, but they apply to the whole optimizer.
SHARED = ("max_norm", "normalize_grads", "fused_unscale")


def check(ok: bool, text: str, value: object) -> None:
    """Raise torch.optim's ValueError for a hyper-parameter out of range; NaN is out of every range."""
    if not ok:
        raise ValueError(f"{text}: {value}")


def check_not_negative(group: dict[str, Any], *options: str) -> None:
    """Raise torch.optim's ValueError for the first of these options that is negative or NaN."""
    texts = {"lr": "Invalid learning rate", "eps": "Invalid epsilon value"}
    for name in options:
        check_scalar(name, group[name])
        check(group[name] >= 0, texts.get(name, f"Invalid {name} value"), group[name])


def check_betas(group: dict[str, Any]) -> None:
    """Raise torch.optim's ValueError unless each of the betas is one number in [0, 1)."""
    for index, beta in enumerate(check_pair("betas", group["betas"])):
        check(0 <= beta < 1, f"Invalid beta parameter at index {index}", beta)


def check_scalar(name: str, value: float | Tensor) -> None:
    """Raise for a hyper-parameter that is no number; torch.optim's ValueError for a tensor of several elements."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    elif not hasattr(value, "__float__"):  # which numbers of NumPy and of torch.compile have, too
        raise TypeError(
            f"{name} is {value!r:.60} ({type(value).__name__}); a number or a tensor of one element is expected"
        )


def check_pair(name: str, value: Any) -> Any:
    """Return an option that has to be two numbers; raise if it is not."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r:.60} ({type(value).__name__}); two numbers are expected") from None
    check_scalar(f"{name}[0]", first)
    check_scalar(f"{name}[1]", second)
    return value


def check_new_options(group: dict[str, Any]) -> None:
    """What a step does not check again, for options of every optimizer."""
    check_scalar("lr", group["lr"])
    if "params" in group and group["max_norm"] is not None and group["max_norm"] == 0:
        warnings.warn(
            "max_norm=0 makes every gradient 0, so nothing is trained; None switches clipping off", stacklevel=2
        )


def check_shared_options(group: dict[str, Any], optimizer: str) -> None:
    """Raise for options of every optimizer that are out of range or exclude each other.

    Every step calls this again, because users change the groups.
    """
    if group.get("differentiable"):
        raise RuntimeError(
            f"`fused` does not support `differentiable`: {optimizer} writes parameters in place in one kernel. Use "
            f"torch.optim.{optimizer}(differentiable=True) to differentiate through the step."
        )
    if group.get("foreach") and group.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    max_norm = group["max_norm"]
    if max_norm is not None:
        check_scalar("max_norm", max_norm)
        check(max_norm >= 0, "Invalid max_norm value", max_norm)
        if group["normalize_grads"]:
            raise ValueError("max_norm and normalize_grads exclude each other: clip to a norm or divide by it")


def check_agreement(group: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise unless two groups have the same shared options."""
    for option in SHARED:
        if group[option] != other[option]:
            raise ValueError(
                f"{option} counts for the whole optimizer, but its groups disagree: {group[option]} and {other[option]}"
            )


def as_python_number(value: Any) -> Any:
    """NumPy numbers, alone or in a tuple, as Python numbers, the only ones that torch.load(weights_only=True) takes."""
    if isinstance(value, tuple):
        return tuple(map(as_python_number, value))
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1 else value


def options_of(cls: type) -> dict[str, Any]:
    """Options of an optimizer of this package or of torch, with their defaults; without those that a user's subclass adds."""
    packages = (f"{__package__}.", "torch.optim.")
    base_class = next(base for base in cls.__mro__ if base.__module__.startswith(packages))
    parameters = inspect.signature(base_class).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
