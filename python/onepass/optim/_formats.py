"""How an optimizer keeps its states in memory: in the dtype of arithmetic, as bfloat16, or as 8-bit codes with scales.

The formats and their formulas are in csrc/core/storage.hpp. A state `name` in 8 bits is two entries of a parameter's state:
`name`, codes (int8 or uint8) like the parameter, and `name_scale`, a float32 scale per group of elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._checks import state_dtype
from ._parameter_states import full_state

STATE_DTYPES = (None, torch.bfloat16, "8bit")
_CODES = {"signed8": torch.int8, "unsigned8": torch.uint8}
_LEVELS = {"signed8": 127, "unsigned8": 255}
_FORMAT_OF_DTYPE = {torch.int8: "signed8", torch.uint8: "unsigned8", torch.bfloat16: "bfloat16"}


def formats_of(optimizer: str, rule: str, states: tuple[str, ...], option: Any) -> tuple[str, ...]:
    """The format of each state under the option `state_dtype`.

    Raises:
        ValueError: the option has no such value, or a state of this rule has to be exact.
    """
    if option is None:
        return ("full",) * len(states)
    if option not in STATE_DTYPES:
        raise ValueError(f"Invalid state_dtype: {option!r}; expected is None, torch.bfloat16 or '8bit'")
    if option is torch.bfloat16:
        return ("bfloat16",) * len(states)
    kinds = _native.find_variant(rule, states)[1].kinds
    for name, kind in zip(states, kinds, strict=True):
        if kind == "exact":
            raise ValueError(
                f"Invalid state_dtype: '8bit'; {optimizer} decides by the exact values of its state '{name}'. Use None or "
                f"torch.bfloat16."
            )
    return tuple("signed8" if kind == "signed" else "unsigned8" for kind in kinds)


def scale_name(name: str) -> str:
    return f"{name}_scale"


def scale_count(param: Tensor) -> int:
    """The number of scales beside a state in 8 bits."""
    return -(-param.numel() // _native.SCALE_GROUP)


def dtype_in(format_: str, param: Tensor) -> torch.dtype:
    """The dtype of a state's tensor of the parameter's shape."""
    if format_ == "bfloat16" and not param.is_complex():  # which is refused in a step, with a reason
        return torch.bfloat16
    return _CODES.get(format_, state_dtype(param))


def new_state(param: Tensor, name: str, value: float, format_: str) -> dict[str, Tensor]:
    """The entries of a state whose elements all have one value, which its format represents."""
    if format_ not in _CODES:
        return {name: full_state(param, value, dtype_in(format_, param))}
    codes = torch.full_like(
        param,
        0 if value == 0 else _LEVELS[format_],
        dtype=_CODES[format_],
        memory_format=torch.preserve_format,
        requires_grad=False,
    )
    root = value ** (0.5 if format_ == "signed8" else 0.25)
    scales = torch.full((scale_count(param),), root, dtype=torch.float32, device=param.device)
    return {name: codes, scale_name(name): scales}


def missing_entries(
    param: Tensor, name: str, value: float, format_: str, known: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The entries of a new state; none if a parameter's known states have it."""
    if known.get(name) is None:
        return new_state(param, name, value, format_)
    if format_ in _CODES and known.get(scale_name(name)) is None:
        raise RuntimeError(
            f"the state '{name}' of a parameter of shape {tuple(param.shape)} has no '{scale_name(name)}' beside it, which "
            f"state_dtype='8bit' needs. Load the optimizer's state_dict() again: loading converts states."
        )
    return {}


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of a state in 8 bits, a dense tensor with the strides of the codes."""
    values = torch.empty_like(codes, dtype=torch.float32)
    _native.convert_state(_FORMAT_OF_DTYPE[codes.dtype], False, values, codes, scales)
    return values


def encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """The reverse: writes codes and scales. All dense; codes have the strides of the values."""
    _native.convert_state(_FORMAT_OF_DTYPE[codes.dtype], True, values, codes, scales)


def format_of(label: str, param: Tensor, name: str, states: Mapping[str, Any]) -> str:
    """The format that a loaded state is in, by its dtype.

    Raises:
        ValueError: scales are missing, or not as many as there are groups.
    """
    value = states[name]
    if value.dtype not in _FORMAT_OF_DTYPE or value.dtype == state_dtype(param):
        return "full"
    format_ = _FORMAT_OF_DTYPE[value.dtype]
    if format_ in _CODES:
        scales, expected = states.get(scale_name(name)), scale_count(param)
        if not isinstance(scales, Tensor) or scales.dim() != 1 or scales.numel() != expected:
            came = f"shape {tuple(scales.shape)}" if isinstance(scales, Tensor) else type(scales).__name__
            raise ValueError(
                f"{label}: the loaded state '{name}' has 8-bit codes and needs '{scale_name(name)}' of shape ({expected},), one "
                f"scale per {_native.SCALE_GROUP} elements; {came} came. Was it saved by another version?"
            )
        if value.is_cuda or scales.is_cuda:
            raise ValueError(
                f"{label}: 8-bit states are on the CPU only; the loaded state '{name}' is on {value.device}."
            )
    return format_


def full_value(label: str, param: Tensor, name: str, states: Mapping[str, Any]) -> Tensor:
    """A state in the dtype of arithmetic, whatever format it is in."""
    value: Tensor = states[name]
    format_ = format_of(label, param, name, states)
    if format_ == "full":
        return value
    if format_ == "bfloat16":
        return value.to(state_dtype(param))
    return decode(value, states[scale_name(name)].to(torch.float32).contiguous())


def convert(label: str, param: Tensor, name: str, states: dict[str, Any], format_: str) -> None:
    """Bring a loaded state into another format, in place in the dict `states`. One that is missing is left missing."""
    if states.get(name) is None or format_of(label, param, name, states) == format_:
        return
    if format_ != "full":
        check_storable(label, param, format_)
    value = full_value(label, param, name, states)
    states.pop(scale_name(name), None)
    if format_ == "full":
        states[name] = value
    elif format_ == "bfloat16":
        states[name] = value.to(torch.bfloat16)
    else:
        new = new_state(param, name, 0.0, format_)
        values = torch.empty_like(new[name], dtype=torch.float32).copy_(value)
        encode(values, new[name], new[scale_name(name)])
        states.update(new)


def check_storable(label: str, param: Tensor, format_: str) -> None:
    """Raise RuntimeError for a parameter whose states have to be in the dtype of arithmetic."""
    option = "state_dtype='8bit'" if format_ in _CODES else "state_dtype=torch.bfloat16"
    why = None
    if _native.is_on_cuda(param):
        why = f"is on {param.device}, where states in other formats are not supported yet"
    elif param.is_complex() or param.dtype == torch.float64:
        why = f"has dtype {param.dtype}; float32, bfloat16 and float16 are supported with it"
    if why is not None:
        raise RuntimeError(f"{label} {why} ({option}). Use state_dtype=None for its group.")
