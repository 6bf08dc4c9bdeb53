"""States of a whole optimizer on their way into a checkpoint and out of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _native
from ._checks import RequiredStates, check_loaded_states, name_of
from ._formats import (
    STORAGE_OPTIONS,
    code_format,
    codes_name,
    convert,
    full_value,
    is_sharded,
    stored_names,
)

if TYPE_CHECKING:
    from ._base import FusedOptimizer


def take_loaded_states(optimizer: FusedOptimizer, group: dict[str, Any], number: int, state: dict[Tensor, Any]) -> None:
    """Check the loaded states of a group's parameters, bring them into its formats, move the 0-d ones to their device."""
    formats, scalars = optimizer._formats(group), optimizer._scalar_states(group)
    required = RequiredStates(
        type(optimizer).__name__,
        optimizer._state_names(group),
        tuple(optimizer.scalar_states),
        frozenset(stored_names(optimizer._all_state_names()) | optimizer.scalar_states.keys()),
        _native.foreign_states(optimizer.rule),
        optimizer._may_lack,
    )
    for index, param in enumerate(group["params"]):
        states = state.get(param)
        if not states:
            continue
        label = name_of(group, number, index)
        by_state = {name: states.get(codes_name(name), states.get(name)) for name in required.names}
        check_loaded_states(label, param, {**states, **by_state}, required)
        convert(label, param, optimizer.rule, formats, states)
        for name, value in scalars.items():
            states[name] = optimizer._scalar_tensor(group, param, states.get(name, value))
        if "step" not in scalars:
            states.pop("step", None)


def with_full_states(optimizer: FusedOptimizer, saved: dict[str, Any], only_sharded: bool = False) -> dict[str, Any]:
    """A state_dict() of the optimizer with states in the dtype of arithmetic.

    only_sharded: leave everything else as it is. The scales of a shard belong to its place in the tensor, so states in 8 bits
    could not be loaded by another number of processes.
    """
    params = [(n, i) for n, group in enumerate(optimizer.param_groups) for i in range(len(group["params"]))]
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    all_states = dict(saved["state"])
    for saved_id, (number, index) in zip(ids, params, strict=True):
        group = optimizer.param_groups[number]
        param, states = group["params"][index], all_states.get(saved_id)
        if states and not (only_sharded and not is_sharded(param)):
            all_states[saved_id] = _full(optimizer, name_of(group, number, index), param, states, only_sharded)
    groups = saved["param_groups"]
    if not only_sharded:
        groups = [{**group, **{k: v for k, v in STORAGE_OPTIONS.items() if k in group}} for group in groups]
    return {**saved, "state": all_states, "param_groups": groups}


def _full(
    optimizer: FusedOptimizer, label: str, param: Tensor, states: dict[str, Any], only_codes: bool
) -> dict[str, Any]:
    names: Collection[str] = optimizer._all_state_names()
    if only_codes:
        names = [name for name in names if codes_name(name) in states]
        dropped = stored_names(tuple(names)) - stored_names(())
    else:
        dropped = stored_names(tuple(names)) - optimizer.scalar_states.keys()
    full = {name: full_value(label, param, code_format(optimizer.rule, name), name, states) for name in names}
    kept = {name: value for name, value in states.items() if name not in dropped}
    return {**kept, **{name: value for name, value in full.items() if value is not None}}
