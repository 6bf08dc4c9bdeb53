"""From a live optimizer of torch.optim to ours and back, in the middle of training."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ._base import FusedOptimizer
from ._checkpoints import with_full_states
from ._checks import check_params, state_dtype
from ._formats import STORAGE_OPTIONS
from ._options import options_of
from ._wrapper_states import params_of

# What to do about an option that torch.optim lacks. Those not listed select a form of a rule.
_ADVICE = {
    "max_norm": "Clip by torch.nn.utils.clip_grad_norm_ before each step and set it to None in the groups.",
    "normalize_grads": "Divide the gradients by their norm before each step and set it to False in the groups.",
    **dict.fromkeys(
        STORAGE_OPTIONS, "Load its full_state_dict() into an optimizer without that option, and convert that one."
    ),
    "fused_unscale": "Set it to False in the groups; a GradScaler then unscales before the step.",
}


def fused_optimizers() -> dict[str, type[FusedOptimizer]]:
    """The optimizers that onepass.optim exports, by name; not the wrappers around an optimizer."""
    from .. import optim  # which imports this module

    return {n: cls for n, cls in vars(optim).items() if isinstance(cls, type) and issubclass(cls, FusedOptimizer)}


def torch_counterparts() -> dict[type[torch.optim.Optimizer], type[FusedOptimizer]]:
    """Our optimizers by their namesakes in torch.optim; Lion has none."""
    named = ((getattr(torch.optim, name, None), ours) for name, ours in fused_optimizers().items())
    return {theirs: ours for theirs, ours in named if theirs is not None}


def from_torch(optimizer: torch.optim.Optimizer) -> FusedOptimizer:
    """Make the optimizer of this package that continues where one of torch.optim stopped.

    State, groups, options, parameter names and hooks are taken over, not copied, so do not step the old optimizer again. The
    groups are the same dicts in the same list: a scheduler made for the old optimizer still works, until load_state_dict()
    gives the new one its own groups. After `scheduler.optimizer = optimizer` it works for good.

    Args:
        optimizer: one of torch.optim whose name exists in onepass.optim, between two steps. foreach, fused and capturable
            may have any value.

    Raises:
        TypeError: any other optimizer, and a subclass of these, because its step may differ.
        RuntimeError, ValueError: an option or a state that this package does not take, differentiable=True among them.
        After an error the old optimizer is unchanged.
    """
    cls = _counterpart(optimizer, torch_counterparts(), "from_torch() takes", "torch.optim")
    _check_representable(optimizer, options_of(type(optimizer)), options_of(cls).keys(), "onepass.optim")
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    state: defaultdict[Any, Any] = defaultdict(dict)
    content: dict[Any, Any] = optimizer.state
    for param, states in content.items():
        if not isinstance(param, Tensor):  # a user may keep anything there
            state[param] = states
            continue
        known = {name: _widened(param, value) for name, value in states.items() if value is not None}
        if known:
            state[param] = known
    ours: FusedOptimizer = cls.__new__(cls)
    ours.__setstate__({"defaults": dict(optimizer.defaults), "state": state, "param_groups": groups})
    for number, group in enumerate(groups):
        check_params(group, number)
    _hand_over(optimizer, ours, set())
    return ours


def to_torch(optimizer: FusedOptimizer) -> torch.optim.Optimizer:
    """Make the optimizer of torch.optim that continues where one of this package stopped: the inverse of from_torch().

    State, groups, options, parameter names and hooks are taken over in the same way. States of 16-bit parameters are float32
    here and are rounded to the parameter's dtype, which torch keeps.

    Raises:
        TypeError: a subclass, a wrapper, or an optimizer of another package.
        ValueError: an option that torch.optim lacks, or, with torch's own text, a value that it refuses. After an error the
            old optimizer is unchanged.
    """
    pairs = {ours: theirs for theirs, ours in torch_counterparts().items()}
    cls = _counterpart(optimizer, pairs, "to_torch() takes", "onepass.optim")
    has, taken = options_of(type(optimizer)), options_of(cls).keys()
    _check_representable(optimizer, has, taken, "torch.optim")
    for group in optimizer.param_groups:
        if group.get("capturable") and any(param.device.type == "cpu" for param in group["params"]):
            raise ValueError(
                f"torch.optim.{cls.__name__} does not take capturable=True for parameters on the CPU, where it has no effect "
                f"here. Set it to False in the groups."
            )
    dropped = has.keys() - taken
    theirs: torch.optim.Optimizer
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate parameters")
        groups = [_nameless(group, dropped) for group in optimizer.param_groups]
        theirs = cls(groups, **{name: value for name, value in optimizer.defaults.items() if name in taken})
    dropped |= {"decoupled_weight_decay"} - theirs.defaults.keys()  # which older torch lacks in its AdamW
    if theirs.state:  # torch's Adagrad makes all states in its constructor
        for group in optimizer.param_groups:
            for param in params_of([group]):
                new = optimizer._new_states(group, param)
                optimizer.state[param].update(new)
    theirs.load_state_dict(_packed(optimizer, dropped))
    # Loading casts NAdam's and ASGD's to the parameter's dtype, which would change their steps.
    for name in optimizer.scalar_states.keys() - {"step"}:
        for param in params_of(optimizer.param_groups):
            if name in theirs.state.get(param, {}):
                theirs.state[param][name] = optimizer.state[param][name]
    _hand_over(optimizer, theirs, dropped)
    return theirs


def full_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state_dict() as it would be without state_dtype, master_bits and stochastic_rounding: float32 states.

    torch.optim's namesake loads it (see docs/optimizers.md for options that torch lacks), and so does an optimizer of this
    package with any of these options. The remainders of master_bits are left out: parameters become their own masters.

    Raises:
        TypeError: not an optimizer of this package, or a wrapper around one; take what is in it.
    """
    if not isinstance(optimizer, FusedOptimizer):
        inside = ". Take full_state_dict(optimizer.base_optimizer)" if hasattr(optimizer, "base_optimizer") else ""
        raise TypeError(
            f"full_state_dict() takes an optimizer of onepass.optim that is no wrapper; {type(optimizer).__name__} came{inside}"
        )
    return with_full_states(optimizer, optimizer.state_dict())


def _counterpart(optimizer: Any, pairs: Mapping[Any, Any], subject: str, module: str) -> Any:
    found = pairs.get(type(optimizer))
    if found is not None:
        return found
    names = ", ".join(sorted(cls.__name__ for cls in pairs))
    name = type(optimizer).__name__
    if hasattr(optimizer, "base_optimizer"):
        advice = f". Convert what is in the {name}: optimizer.base_optimizer = ...(optimizer.base_optimizer)"
    elif isinstance(optimizer, tuple(pairs)):
        advice = ", a subclass of them, whose step may be another one. Give its state_dict() to the optimizer you want"
    elif isinstance(optimizer, FusedOptimizer) and not hasattr(torch.optim, name):
        advice = ", which torch.optim lacks"
    else:
        advice = ""
    raise TypeError(f"{subject} {names} of {module}; {name} came{advice}")


def _widened(param: Tensor, value: Any) -> Any:
    """A state in the dtype of this package: float32 beside 16-bit parameters."""
    is_state = isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape
    return value.to(state_dtype(param)) if is_state and param.is_floating_point() and param.dim() else value


def _check_representable(
    optimizer: torch.optim.Optimizer, has: dict[str, Any], taken: Collection[str], to: str
) -> None:
    """Raise for an option that the other package lacks, unless it has its default."""
    for group in optimizer.param_groups:
        for option, default in has.items():
            value = group.get(option, default)
            if option not in taken and value != default:
                advice = _ADVICE.get(option, "There is no such form of the rule there.")
                raise ValueError(f"{to}.{type(optimizer).__name__} has no {option}, which is {value!r} here. {advice}")


def _nameless(group: dict[str, Any], dropped: set[str]) -> dict[str, Any]:
    """A group as the constructors of all torch versions take it; loading adds the parameters' names."""
    options = {name: value for name, value in group.items() if name not in dropped and name != "param_names"}
    return {**options, "params": list(group["params"])}


def _packed(optimizer: FusedOptimizer, dropped: set[str]) -> dict[str, Any]:
    """The state_dict() without hooks and without some options."""
    params = params_of(optimizer.param_groups)
    index = {id(param): i for i, param in enumerate(params)}
    groups = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name not in dropped}
        groups.append({**options, "params": [index[id(param)] for param in group["params"]]})
    states = {i: optimizer._saved_state(optimizer.state[p]) for i, p in enumerate(params) if optimizer.state.get(p)}
    content: dict[Any, Any] = optimizer.state
    others = {key: value for key, value in content.items() if not isinstance(key, Tensor)}
    return {"state": {**states, **others}, "param_groups": groups}


def _hand_over(old: torch.optim.Optimizer, new: torch.optim.Optimizer, dropped: set[str]) -> None:
    """Pass groups, defaults and hooks to the new optimizer. Everything was checked before."""
    for group, complete in zip(old.param_groups, new.param_groups, strict=True):
        for option in dropped:
            group.pop(option, None)
        group.update({option: value for option, value in complete.items() if option not in group.keys() | dropped})
    new.param_groups = old.param_groups
    for option, value in old.defaults.items():  # among them those of a wrapper around the old optimizer
        if option not in dropped:
            new.defaults.setdefault(option, value)
    _compat.share_hooks(old, new)
