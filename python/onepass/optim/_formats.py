"""How an optimizer keeps its states and 16-bit parameters in memory: the options, the entries they make, and conversions.

The formats and their formulas are in csrc/core/storage.hpp. A state in 8 bits is two entries of a parameter's state, `name_codes`
(uint8, like the parameter) and `name_scale` (a float32 per 64 elements in the order of memory). They do not have the state's own
name, so that torch.optim cannot take codes for numbers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _compat, _native
from ._checks import state_dtype
from ._codes import GROUP, decode, encode
from ._parameter_states import full_state
from ._strides import is_dense

STORAGE_OPTIONS = {"state_dtype": None, "master_bits": None, "stochastic_rounding": False}
REMAINDER = "param_remainder"
_REMAINDERS = {"remainder16": torch.int16, "remainder8": torch.int8}


class Entry(NamedTuple):
    """One tensor that a parameter's state keeps.

    Attributes:
        name: its key.
        state: the state or the option that it belongs to, for messages.
        kind: "values", "codes", "scale" or "remainder".
        dtype: None: that of arithmetic.
    """

    name: str
    state: str
    kind: str
    dtype: torch.dtype | None


class Formats(NamedTuple):
    """How a group keeps its states and parameters: names of csrc/core/storage.hpp.

    Attributes:
        states: the rule's states.
        state_formats: the format of each.
        param_format: the format of the parameters.
        entries: the tensors of a parameter's state, in the order in which the kernels take them.
        names: theirs; interned, because every step looks them up.
        usual: whether everything is in the dtype of arithmetic.
    """

    states: tuple[str, ...]
    state_formats: tuple[str, ...]
    param_format: str
    entries: tuple[Entry, ...]
    names: tuple[str, ...]
    usual: bool


def codes_name(state: str) -> str:
    return f"{state}_codes"


def scale_name(state: str) -> str:
    return f"{state}_scale"


def stored_names(states: tuple[str, ...]) -> set[str]:
    """Every entry that some format makes of these states."""
    return {REMAINDER, "step", *states, *map(codes_name, states), *map(scale_name, states)}


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    dtensor: Any = _compat.dtensor_type()
    return _compat.local_of(tensor) if dtensor is not None and isinstance(tensor, dtensor) else tensor


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return local(param) is not param


# ---- options


def formats_of(optimizer: str, rule: str, states: tuple[str, ...], group: dict[str, Any]) -> Formats:
    """The formats under a group's options.

    Raises:
        ValueError: an option has no such value, or a state of this rule needs more bits.
    """
    options = group.get("state_dtype"), group.get("master_bits"), group.get("stochastic_rounding", False)
    try:
        return _formats_of(optimizer, rule, states, *options)
    except TypeError:  # an option that cannot be hashed: check its value without the cache
        return _formats_of.__wrapped__(optimizer, rule, states, *options)


@functools.lru_cache(maxsize=None, typed=True)  # typed: True is not 1, nor 32 a 32.0
def _formats_of(
    optimizer: str, rule: str, states: tuple[str, ...], state_option: Any, bits: Any, stochastic: Any
) -> Formats:
    known = state_option is None or state_option is torch.bfloat16
    if not known and not (isinstance(state_option, str) and state_option == "8bit"):
        raise ValueError(f"Invalid state_dtype: {state_option!r}; expected is None, torch.bfloat16 or '8bit'")
    if not (bits is None or (type(bits) is int and bits in (24, 32))):
        raise ValueError(f"Invalid master_bits: {bits!r}; expected is None, 24 or 32")
    if type(stochastic) is not bool:
        raise ValueError(f"Invalid stochastic_rounding: {stochastic!r}; expected is False or True")
    if bits is not None and stochastic:
        raise ValueError(
            "master_bits and stochastic_rounding exclude each other: a parameter with a float32 master needs no rounding"
        )
    formats, entries = [], []
    for state, kind in zip(states, _native.find_variant(rule, states)[1].kinds, strict=True):
        too_few = {"exact": ("8bit",), "float32": ("8bit", torch.bfloat16)}.get(kind, ())
        if state_option in too_few:
            others = "None or torch.bfloat16" if kind == "exact" else "None"
            raise ValueError(
                f"Invalid state_dtype: {state_option!r}; {optimizer} needs more digits of its state '{state}' under these "
                f"options. Use {others}."
            )
        if state_option is None:
            formats.append("full")
        elif state_option == "8bit":
            formats.append("signed8" if kind == "signed" else "unsigned8")
        else:
            formats.append("bfloat16")
        if formats[-1].endswith("8"):
            entries.append(Entry(codes_name(state), state, "codes", torch.uint8))
            entries.append(Entry(scale_name(state), state, "scale", torch.float32))
        else:
            entries.append(Entry(state, state, "values", torch.bfloat16 if formats[-1] == "bfloat16" else None))
    param = {None: "stochastic" if stochastic else "plain", 32: "remainder16", 24: "remainder8"}[bits]
    if bits is not None:
        entries.append(Entry(REMAINDER, f"master_bits={bits}", "remainder", _REMAINDERS[param]))
    usual = param == "plain" and all(format_ == "full" for format_ in formats)
    names = tuple(sys.intern(entry.name) for entry in entries)
    return Formats(states, tuple(formats), param, tuple(entries), names, usual)


def check_storable(label: str, param: Tensor, formats: Formats) -> None:
    """Raise ValueError for a parameter that cannot be kept in these formats, or whose states cannot."""
    if formats.usual:
        return
    option = (
        "master_bits"
        if formats.param_format in _REMAINDERS
        else "stochastic_rounding"
        if formats.param_format == "stochastic"
        else "state_dtype"
    )
    if formats.param_format != "plain" and param.dtype != torch.bfloat16:
        why = f"has dtype {param.dtype}; {option} is for bfloat16 parameters"
    elif param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        why = f"has dtype {param.dtype}; {option} is for float32, bfloat16 and float16 parameters"
    else:
        return
    raise ValueError(f"{label} {why}. Put it into a group with {option}={STORAGE_OPTIONS[option]}.")


def bytes_of_entries(formats: Formats, elements: int) -> int:
    """What a float32, bfloat16 or float16 parameter of so many elements keeps in its state, without 0-d states."""
    return sum(
        4 * -(-elements // GROUP) if entry.kind == "scale" else elements * (entry.dtype or torch.float32).itemsize
        for entry in formats.entries
    )


# ---- the entries of one state


def scale_count(param: Tensor) -> int:
    """The number of scales beside a state in 8 bits; of this process's part of a DTensor."""
    return -(-local(param).numel() // GROUP)


def new_entries(param: Tensor, formats: Formats, state: str, value: float) -> dict[str, Tensor]:
    """The entries of a state whose elements all have one value."""
    format_ = formats.state_formats[formats.states.index(state)]
    if not format_.endswith("8"):
        return {state: full_state(param, value, torch.bfloat16 if format_ == "bfloat16" else state_dtype(param))}
    scale = torch.zeros(scale_count(param), dtype=torch.float32, device=param.device)
    codes = full_state(param, 0, torch.uint8)
    if value != 0:
        encode(format_, torch.full_like(local(codes), value, dtype=torch.float32), local(codes), scale)
    return {codes_name(state): codes, scale_name(state): scale}


def missing_entries(
    param: Tensor, formats: Formats, initial_value: Callable[[str], float], known: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The entries that a parameter's known states lack. A new remainder is 0: the parameter is its own master."""
    new: dict[str, Tensor] = {}
    for state in formats.states:
        entries = {entry.name for entry in formats.entries if entry.state == state}
        stored = {state, codes_name(state), scale_name(state)}
        found = {name for name in stored if known.get(name) is not None}
        if not found:
            new.update(new_entries(param, formats, state, initial_value(state)))
        elif found != entries:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has the states {sorted(found)}, its group's state_dtype needs "
                f"{sorted(entries)}. Call optimizer.load_state_dict(optimizer.state_dict()), which converts them, after a change of "
                f"state_dtype."
            )
    remainder = _REMAINDERS.get(formats.param_format)
    if remainder is not None and known.get(REMAINDER) is None:
        new[REMAINDER] = full_state(param, 0, remainder)
    return new


def _check_codes(label: str, param: Tensor, state: str, states: Mapping[str, Any]) -> None:
    """Raise ValueError for codes or scales that do not fit the parameter."""
    codes = states[codes_name(state)]
    if states.get(state) is not None:
        raise ValueError(f"{label}: the loaded state has '{state}' and '{codes_name(state)}'; only one is expected.")
    scale, expected = states.get(scale_name(state)), scale_count(param)
    usable = isinstance(codes, Tensor) and codes.dtype == torch.uint8 and codes.shape == param.shape
    if not usable or not is_dense(local(codes)):
        raise ValueError(
            f"{label}: the loaded state '{codes_name(state)}' should be a dense uint8 tensor of shape {tuple(param.shape)}; "
            f"{_described(codes)} came."
        )
    if not isinstance(scale, Tensor) or scale.shape != (expected,) or not scale.is_floating_point():
        raise ValueError(
            f"{label}: the loaded state '{codes_name(state)}' needs '{scale_name(state)}' of shape ({expected},), one scale per "
            f"{GROUP} elements; {_described(scale)} came. Was it saved by another version?"
        )


def full_value(label: str, param: Tensor, format_: str, state: str, states: Mapping[str, Any]) -> Tensor | None:
    """A state in the dtype of arithmetic, whatever format it is in; None if it is missing.

    Args:
        format_: signed8 or unsigned8: how codes of this state are to be read.

    Raises:
        ValueError: codes or scales that do not fit the parameter.
    """
    codes = states.get(codes_name(state))
    if codes is None:
        value: Tensor | None = states.get(state)
        return value if value is None else value.to(state_dtype(param))
    _check_codes(label, param, state, states)
    values = full_state(param, 0.0, state_dtype(param))
    local(values).copy_(decode(format_, local(codes), states[scale_name(state)]))
    return values


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def code_format(rule: str, state: str) -> str:
    """How codes of a rule's state are read. A variant that keeps its states in float32 says nothing about them."""
    signed = any(
        kind == "signed"
        for variant in _native.variants(rule)
        for name, kind in zip(variant.states, variant.kinds, strict=True)
        if name == state
    )
    return "signed8" if signed else "unsigned8"


def convert(label: str, param: Tensor, rule: str, formats: Formats, states: dict[str, Any]) -> None:
    """Bring the loaded states of a parameter into these formats, in place in the dict. What is missing is left missing."""
    for state, format_ in zip(formats.states, formats.state_formats, strict=True):
        if format_.endswith("8") and states.get(codes_name(state)) is not None:
            _check_codes(label, param, state, states)
            states[scale_name(state)] = states[scale_name(state)].to(param.device, torch.float32).contiguous()
            states.pop(state, None)
            continue
        value = full_value(label, param, code_format(rule, state), state, states)
        if value is None:
            continue
        if format_.endswith("8"):
            check_storable(label, param, formats)
            new = new_entries(param, formats, state, 0.0)
            codes = local(new[codes_name(state)])
            values = torch.empty_like(codes, dtype=torch.float32).copy_(local(value))
            encode(format_, values, codes, new[scale_name(state)])
            states.pop(state)
            states.update(new)
        else:
            for name in (codes_name(state), scale_name(state)):
                states.pop(name, None)
            dtype = torch.bfloat16 if format_ == "bfloat16" else state_dtype(param)
            states[state] = value.to(dtype)
    _convert_remainder(label, param, formats, states)


def _convert_remainder(label: str, param: Tensor, formats: Formats, states: dict[str, Any]) -> None:
    remainder = states.pop(REMAINDER, None)
    wanted = _REMAINDERS.get(formats.param_format)
    if remainder is None or wanted is None:
        return
    if (
        not isinstance(remainder, Tensor)
        or remainder.dtype not in _REMAINDERS.values()
        or remainder.shape != param.shape
    ):
        raise ValueError(
            f"{label}: the loaded state '{REMAINDER}' should be an int16 or int8 tensor of shape {tuple(param.shape)}; "
            f"{_described(remainder)} came."
        )
    if remainder.dtype != wanted:
        wide = remainder.to(torch.int32)
        wide = wide << 8 if wanted is torch.int16 else ((wide + 128) >> 8).clamp(max=127)
        remainder = wide.to(wanted)
    states[REMAINDER] = remainder
