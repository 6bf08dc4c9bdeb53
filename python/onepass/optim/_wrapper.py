"""The base class of Lookahead and SAM: an optimizer around another one, with one set of groups and one checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _compat, _native
from ._checks import check_loaded_shape, name_of, state_dtype
from ._options import as_python_number
from ._staging import Staging
from ._wrapper_states import State, States, WeakStates, params_of


class Wrapper(torch.optim.Optimizer):
    """Base of the wrappers. A subclass defines the state that it keeps and its options, which the groups hold.

    Args:
        optimizer: the optimizer to wrap, of any class.
        options: what the wrapper adds to the groups, under names that no optimizer uses for something else.

    `param_groups` and `defaults` are the wrapped optimizer's, so that schedulers work on either. The wrapper keeps state only
    for parameters in the groups. `state` shows the states of both and can be written to.
    """

    kept: ClassVar[str]  # name of the state that the wrapper keeps per parameter
    prefix: ClassVar[str]  # of its options' names in the groups
    usage: ClassVar[str]  # for whoever passes something that is no optimizer
    base_optimizer: torch.optim.Optimizer

    def __init__(self, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):  # the sentence of torch.optim.lr_scheduler
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer; {self.usage}")
        options = {name: as_python_number(value) for name, value in options.items()}
        # The base class's __init__ would make groups of its own; __setstate__ does everything else.
        self.__setstate__({"base_optimizer": optimizer, "_own_state": {}})
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)

    # --- what a subclass defines --------------------------------------------------------------------------------------

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options of the wrapper that are out of range."""
        raise NotImplementedError

    def _state_of(self, param: Tensor, make: bool = False) -> dict[str, Tensor]:
        """The dict with the wrapper's state of a parameter; empty if there is none, or none that is valid now.

        make: create the dict, to write to it.
        """
        return self._own.get_or_make(param) if make else self._own.get(param) or {}

    def _drop_state(self, param: Tensor) -> None:
        """Forget the wrapper's state of a parameter."""
        self._own.pop(param)

    def _kept_state(self) -> State:
        """The states that are valid now; a checkpoint contains these."""
        params = params_of(self.param_groups)
        return {param: state for param in params if self.kept in (state := self._state_of(param))}

    def _set_kept_state(self, state: State) -> None:
        self._own = WeakStates(state)

    # --- shared with the wrapped optimizer ----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    @property  # type: ignore[override]
    def state(self) -> States:
        """The states of both optimizers."""
        return States(self)

    @state.setter
    def state(self, states: Mapping[Tensor, Any]) -> None:
        States(self).replace(states)

    def _option(self, group: dict[str, Any], name: str) -> Any:
        """A group's option. The wrapped optimizer may have loaded groups without the wrapper's."""
        return group.get(name, self.defaults[name])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does."""
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; the wrapper's options default to the constructor's."""
        if isinstance(param_group, dict):
            for name in param_group.keys() & self.defaults.keys():
                param_group[name] = as_python_number(param_group[name])
            self._check_options({**self.defaults, **param_group})
        self.base_optimizer.add_param_group(param_group)  # whose defaults include our options

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer, "_own_state": self._kept_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.base_optimizer = state["base_optimizer"]
        self._set_kept_state(state["_own_state"])
        super().__setstate__({})  # makes the hooks

    @_compat.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state_dict() with the wrapper's states in it."""
        _compat.begin_save(self)
        saved = self.base_optimizer.state_dict()
        states, kept = dict(saved["state"]), self._kept_state()
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(ids, params, strict=True):
            if param in kept:
                states[i] = {**states.get(i, {}), **kept[param]}
        return _compat.end_save(self, {**saved, "state": states})

    @_compat.disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of state_dict(): options, the wrapped optimizer's state and the wrapper's.

        Raises ValueError, with nothing changed, for the state of another optimizer. That includes the state of the wrapped
        one alone, for which there is base_optimizer.load_state_dict().
        """
        state_dict = _compat.begin_load(self, state_dict)
        self._check_loaded(state_dict["param_groups"])
        own, rest = self._split(state_dict)
        before = self.param_groups
        try:
            self.base_optimizer.load_state_dict({**state_dict, "state": rest})
        except BaseException:
            if self.param_groups is not before:  # a hook raised after everything had been loaded
                self._set_kept_state(own)
            raise
        self._set_kept_state(own)
        _compat.end_load(self)

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        required = [name for name in self.defaults if name.startswith(self.prefix)]
        for group in groups:
            missing = [name for name in required if name not in group]
            if missing:
                raise ValueError(
                    f"the loaded state is not one of {type(self).__name__}: its groups lack {missing}. The state of the "
                    f"wrapped {type(self.base_optimizer).__name__} alone loads by base_optimizer.load_state_dict()."
                )
            self._check_options(group)

    def _split(self, state_dict: dict[str, Any]) -> tuple[State, dict[Any, Any]]:
        """The wrapper's states by parameter, in dtype and device for the kernels, and all others unchanged."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        own: State = {}
        rest = dict(state_dict["state"])
        for i, param in zip(ids, params, strict=False):  # the wrapped optimizer compares the lengths
            states = rest.get(i)
            if not isinstance(states, dict) or self.kept not in states:
                continue
            value = states[self.kept]
            check_loaded_shape(names_of(self.param_groups, [param])(0), param, self.kept, value)
            own[param] = {self.kept: value.to(device=param.device, dtype=state_dtype(param))}
            rest[i] = {name: state for name, state in states.items() if name != self.kept}
            if not rest[i]:
                del rest[i]
        return own, rest


def names_of(groups: list[dict[str, Any]], params: list[Tensor]) -> Callable[[int], str]:
    """A function from an index in `params` to the parameter's name in error messages."""

    @functools.cache
    def names() -> dict[int, str]:
        return {id(p): name_of(g, n, i) for n, g in enumerate(groups) for i, p in enumerate(g["params"])}

    return lambda index: names().get(id(params[index]), "a parameter of no group")


def kept_copy(param: Tensor) -> Tensor:
    """A copy of a parameter as a state: the same strides, float32 for 16-bit dtypes, a DTensor for a DTensor."""
    with torch.no_grad():
        like = torch.zeros_like(
            param, dtype=state_dtype(param), memory_format=torch.preserve_format, requires_grad=False
        )
        return like.copy_(param)


def gather(
    rule: str,
    name: str,
    groups: list[dict[str, Any]],
    params: list[Tensor],
    state: State,
    hyper: dict[str, float | Tensor],
    plan: Any,
    *,
    sparse_text: str | None = None,
    **options: Any,
) -> tuple[Staging, list[Tensor]]:
    """Check and collect the tensors of a pass with one state. Gives the staging, and the parameters that lack the state."""

    def replace(index: int, name: str, tensor: Tensor) -> None:
        state[params[index]][name] = tensor

    staging = Staging(names_of(groups, params), (name,), sparse_text, replace)
    missing = _native.Group(rule, (name,), params, state, hyper, staging, **options).gather(plan)
    return staging, [params[index] for index in missing]


def restore(groups: list[dict[str, Any]], states: State) -> None:
    """Write the kept weights states[param]["old_param"] back, in one pass. Doing it twice changes nothing."""
    plan = _native.new_plan()
    hyper: dict[str, float | Tensor] = {"rho": 0.0, "adaptive": 0.0}
    staging, missing = gather("sam", "old_param", groups, list(states), states, hyper, plan, reads_grad=False)
    if missing:
        raise RuntimeError(
            "the weights from before are gone: the optimizer's state was changed from outside. Load model and optimizer from a "
            "checkpoint"
        )
    _native.update(plan, [staging], _native.GradientFactor())
