"""Layers on jagged nested tensors: the rows of all examples are contiguous in memory and form one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

NamedTensors = dict[str, Any]  # name -> tensor or None


def call_on_values(
    function: str, call: Callable[..., Any], inputs: NamedTensors, affine: NamedTensors, normalized: int
) -> Any:
    """Run `call` on the values of nested tensors. The arguments are those of _sharding.call_on_local.

    Raises: RuntimeError unless inputs are [batch, ragged, ...] without holes, normalised over later dimensions only.
    """
    x: Any = next(iter(inputs.values()))
    for name, tensor in affine.items():
        if tensor is not None and tensor.is_nested:
            refuse_nested(function, name)
    for name, tensor in inputs.items():
        if tensor is None or not tensor.is_nested or not _is_packed(tensor, normalized):
            refuse_nested(function, name if tensor is not None and tensor.is_nested else next(iter(inputs)))
        if tensor.shape != x.shape:
            raise RuntimeError(
                f"{function}(): {name} has the shape {tuple(tensor.shape)}, {next(iter(inputs))} {tuple(x.shape)}; nested "
                f"tensors need the same offsets."
            )
    values = [nested.values() for nested in inputs.values()]
    results = call(*values, *affine.values())
    if isinstance(results, tuple):
        return tuple(torch.nested.nested_tensor_from_jagged(result, x.offsets()) for result in results)
    return torch.nested.nested_tensor_from_jagged(results, x.offsets())


def _is_packed(tensor: Any, normalized: int) -> bool:
    return (
        tensor.layout is torch.jagged
        and isinstance(tensor.shape[1], torch.SymInt)
        and tensor.dim() - normalized >= 2
        and tensor.lengths() is None
    )


def refuse_nested(function: str, name: str) -> NoReturn:
    """Raise for a nested tensor that a layer cannot take, or for a dense one among nested ones."""
    raise RuntimeError(
        f"{function}(): {name} is a nested tensor that onepass cannot take, or nested and dense tensors are mixed. The norms "
        f"over rows and dropout take [batch, ragged, ...] of layout torch.jagged without holes; otherwise call them on "
        f".values() or on padded tensors, or use torch.nn's layer."
    )
