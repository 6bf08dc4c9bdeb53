"""What parameters, gradients and states must be, and every error about them. `label` is what an error calls the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _compat, _native
from .._dtypes import FLOATS, compute_dtype
from ._strides import overlaps_itself

_COMPLEX_DTYPES = (torch.complex64, torch.complex128)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a state beside a parameter: what kernels compute in; complex ones are pairs of reals."""
    return param.dtype if param.is_complex() else compute_dtype(param.dtype)


def name_of(group: dict[str, Any], number: int, index: int) -> str:
    """What error messages call a parameter: its name if the optimizer has named parameters."""
    names = group.get("param_names")
    return f"parameter '{names[index]}'" if names else f"parameter {index} of group {number}"


# --- when a group is added --------------------------------------------------------------------------------------------


def check_params(group: dict[str, Any], number: int) -> None:
    """Raise for parameters that no step could update."""
    for index, param in enumerate(group["params"]):
        if torch.nn.parameter.is_lazy(param):
            continue  # a lazy module gives it shape and memory of its own in the first forward pass
        if param.is_neg() and param.numel() > 1 and param.is_contiguous():
            label = name_of(group, number, index)
            raise RuntimeError(f"{label} is a lazily negated view of another tensor. Use resolve_neg().")


# --- when a checkpoint is loaded --------------------------------------------------------------------------------------


class RequiredStates(NamedTuple):
    """The states that an optimizer needs for each parameter under some options.

    Attributes:
        optimizer: its name, for messages.
        names: the states of the parameter's shape.
        scalars: the states of one number.
        known: every state that some options make.
        foreign: states of other rules.
        may_lack: whether a checkpoint may leave a state out.
    """

    optimizer: str
    names: tuple[str, ...]
    scalars: tuple[str, ...]
    known: frozenset[str]
    foreign: frozenset[str]
    may_lack: Callable[[str], bool]


def check_loaded_states(label: str, param: Tensor, states: dict[str, Any], required: RequiredStates) -> None:
    """Raise ValueError unless these are the states of this optimizer, all of them, for a parameter of this shape."""
    needed = [*required.names, *required.scalars]
    missing = [name for name in needed if states.get(name) is None and not required.may_lack(name)]
    if missing or required.foreign & states.keys() or not required.known & states.keys():
        raise ValueError(
            f"{label}: the loaded state has {sorted(map(str, states))}, {required.optimizer} needs {needed}. Is it of another "
            f"optimizer?"
        )
    for name in required.names:
        if states.get(name) is not None:
            check_loaded_shape(label, param, name, states[name])
    for name in required.scalars:
        value = states[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{label}: the loaded state '{name}' has shape {tuple(value.shape)}; one number is expected."
            )


def check_loaded_shape(label: str, param: Tensor, name: str, value: Any) -> None:
    """Raise ValueError unless a loaded state is a tensor of the parameter's shape."""
    if not isinstance(value, Tensor) or value.shape != param.shape:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(
            f"{label}: the loaded state '{name}' has {came}, the parameter has shape {tuple(param.shape)}. The state belongs "
            f"to another model."
        )


# --- in a step --------------------------------------------------------------------------------------------------------


def check_dtensors(label: str, param: Tensor, grad: Tensor | None, states: Mapping[str, Any]) -> None:
    """Parameter, gradient and states are all DTensors with compatible placements, or none of them is."""
    dtensor: Any = _compat.dtensor_type()
    if dtensor is None:
        return
    if not isinstance(param, dtensor):
        for what, tensor in [("gradient", grad), *states.items()]:
            if isinstance(tensor, dtensor):
                raise RuntimeError(f"{label}: its {what} is a DTensor, the parameter is not. Make both alike.")
        return
    for name, state in states.items():
        if not isinstance(state, dtensor) or state.placements != param.placements:
            raise RuntimeError(
                f"{label}: it is a DTensor placed {param.placements}, its state '{name}' is not. Let the optimizer make "
                f"the state, or load it as a DTensor of the same mesh and placements."
            )
    if grad is not None and not isinstance(grad, dtensor):
        raise RuntimeError(f"{label}: it is a DTensor, its gradient is not. Use DTensor.from_local on it.")


def check_param(label: str, param: Tensor) -> None:
    _check_memory(label, "data", param)
    if param.device.type == "cuda" and not _native.cuda_kernels:
        raise RuntimeError(_native.no_cuda_kernels(label, param.device))
    if param.dtype not in FLOATS and param.dtype not in _COMPLEX_DTYPES:
        raise RuntimeError(
            f"{label} has dtype {param.dtype}; float32, float64, bfloat16, float16, complex64 and complex128 are supported."
        )
    if overlaps_itself(param):
        raise RuntimeError(
            f"{label} has elements that share memory (shape {tuple(param.shape)}, strides {param.stride()}), as expand() "
            f"makes them; an update in place is not defined. Use a clone()."
        )


def check_grad(label: str, param: Tensor, grad: Tensor, sparse_text: str | None) -> None:
    """sparse_text: torch's sentence for refusing sparse gradients; None: they are taken."""
    if grad.layout is torch.sparse_coo:
        if sparse_text is not None:
            raise RuntimeError(f"{sparse_text} ({label}). SparseAdam, Adagrad and SGD take sparse gradients.")
        for dim, index in enumerate(grad._indices()):
            _check_indices(label, dim, grad.shape[dim], index)
    else:
        _check_memory(label, "gradient", grad)
    for what, came, expected in (
        ("shape", tuple(grad.shape), tuple(param.shape)),
        ("dtype", grad.dtype, param.dtype),
        ("device", grad.device, param.device),
    ):
        if came != expected:
            raise RuntimeError(
                f"{label}: its gradient has {what} {came}, the parameter has {expected}. They have to agree; was the "
                f"parameter changed after backward()?"
            )


def check_state(label: str, name: str, param: Tensor, state: Any, dtype: torch.dtype | None = None) -> None:
    if not isinstance(state, Tensor):
        raise RuntimeError(f"{label}: its state '{name}' is a {type(state).__name__}; a tensor is expected.")
    _check_memory(label, f"state '{name}'", state)
    if overlaps_itself(state):
        raise RuntimeError(f"{label}: its state '{name}' has elements that share memory. Use a clone().")
    for what, came, expected in (
        ("shape", tuple(state.shape), tuple(param.shape)),
        ("dtype", state.dtype, state_dtype(param) if dtype is None else dtype),
        ("device", state.device, param.device),
    ):
        if came != expected:
            raise RuntimeError(
                f"{label}: its state '{name}' has {what} {came}, expected is {expected}. Was the parameter changed after "
                f"the optimizer made its state? Create the optimizer again, or load its state_dict(), which converts states."
            )


def check_scalar_state(label: str, name: str, value: Any) -> None:
    ok = isinstance(value, Tensor) and value.numel() == 1 and value.dtype in (torch.float32, torch.float64)
    if not ok:
        came = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(f"{label}: its state '{name}' is a {came}; a float32 tensor with one element is expected.")


def _check_memory(label: str, what: str, tensor: Tensor) -> None:
    """The tensor's memory is there and holds its value."""
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"{label}: its {what} has the layout {tensor.layout}; dense tensors are expected.")
    if tensor.device.type == "meta":
        raise RuntimeError(
            f"{label}: its {what} is on the meta device and has no memory. Materialise the model first, for example with "
            f"model.to_empty(device=...)."
        )
    if _compat.has_own_dispatch(tensor) or _compat.is_functional_wrapper(tensor):
        raise RuntimeError(
            f"{label}: its {what} is a {type(tensor).__name__} without memory of its own (a fake, functional or wrapper "
            f"tensor). onepass updates real tensors; step() has to run outside of tracing and of torch.func transforms."
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"{label}: its {what} is on {tensor.device}; onepass has kernels for cpu and cuda.")
    if tensor.numel() > 0 and tensor.data_ptr() == 0:
        raise RuntimeError(f"{label}: its {what} has no memory (its storage was freed or never made).")


def _check_indices(label: str, dim: int, size: int, index: Tensor) -> None:
    """Before coalesce(), which trusts them as our kernels do. On CUDA the assertion runs there, so that nothing waits."""
    if index.numel() == 0:
        return
    low, high = torch.aminmax(index)
    if index.is_cuda:
        _compat.assert_async((low >= 0) & (high < size))
    elif low < 0 or high >= size:
        raise RuntimeError(
            f"size is inconsistent with indices: for dim {dim}, size is {size} but found index "
            f"{int(low if low < 0 else high)} (the gradient of {label})"
        )
