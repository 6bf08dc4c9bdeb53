"""The base class of the optimizers: groups, states, checkpoints, and the step, which checks everything before it writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _compat, _native
from ._checkpoints import take_loaded_states, with_full_states
from ._checks import check_params, name_of
from ._distributed import reduce_sharded
from ._formats import REMAINDER, STORAGE_OPTIONS, Formats, formats_of, is_sharded, missing_entries
from ._options import SHARED, as_python_number, check_agreement, check_new_options, check_shared_options, options_of
from ._parameter_states import restore_precision, scalar_tensor
from ._staging import Staging

_NOT_OPTIONS = ("self", "params", "__class__")  # the rest of locals() in a constructor


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers. A subclass defines its rule, options, states and hyper-parameters.

    Args:
        params: parameters, named parameters or group dicts, as for torch.optim.
        arguments: locals() at the start of the subclass's constructor. Each argument is an option; the groups keep it under
            its name, as in torch.optim.

    Every subclass has these keyword-only options:
        max_norm: clip the gradients of all groups together to this 2-norm, inside the step; None: no clipping.
        normalize_grads: divide the gradients by their global 2-norm (0 where it is 0). Excludes max_norm.
        fused_unscale: let torch.amp.GradScaler pass its scale to step(), which then unscales, checks and skips by itself.

    Every subclass but SparseAdam has these as well, per group, for dense gradients; see docs/state-formats.md:
        state_dtype: how the states are kept in memory. None: in the dtype of arithmetic. torch.bfloat16: 2 bytes per element.
            "8bit": 1 byte, and a float32 per 64 elements.
        master_bits: of bfloat16 parameters. 32: an int16 beside each makes it exactly a float32 one. 24: an int8, its upper part.
        stochastic_rounding: round bfloat16 parameters at random, up or down, so that small updates are not lost.

    `.grad` is read, never written: clipping, unscaling and the sign of maximize happen on the way into the rule.
    """

    rule: ClassVar[str]  # a word in ONEPASS_RULES in CMakeLists.txt
    scalar_states: ClassVar[dict[str, float]] = {"step": 0.0}  # 0-d states and their usual initial values
    sparse_text: ClassVar[str | None] = None  # torch's sentence for refusing sparse gradients

    def __init__(self, params: ParamsT, arguments: dict[str, Any]) -> None:
        defaults = {name: as_python_number(value) for name, value in arguments.items() if name not in _NOT_OPTIONS}
        self._check_options(defaults)
        self._grad_norm: Tensor | float | None = None
        super().__init__(params, defaults)

    # --- what a subclass defines --------------------------------------------------------------------------------------

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the per-element states under these options, in the rule's order."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        """The value of each hyper-parameter of the rule."""
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise for options that are out of range or exclude each other. Subclasses add their own."""
        check_shared_options(group, type(self).__name__)
        check_new_options(group)
        self._formats(group)

    def _formats(self, group: dict[str, Any]) -> Formats:
        """How the group keeps its states and parameters."""
        return formats_of(type(self).__name__, self.rule, self._state_names(group), group)

    def _scalar_states(self, group: dict[str, Any]) -> dict[str, float]:
        """The 0-d states and their initial values. Other formats round by the step count, so they always have one."""
        return self.scalar_states if self._formats(group).usual else {"step": 0.0, **self.scalar_states}

    def _all_state_names(self) -> tuple[str, ...]:
        """The per-element states under any options."""
        return _native.state_names(self.rule)

    def _initial_value(self, group: dict[str, Any], name: str) -> float:
        """The value of a state, or of its elements, before the first step."""
        return self.scalar_states.get(name, 0.0)

    def _sparse_refusal(self, group: dict[str, Any]) -> str | None:
        """torch's sentence for refusing sparse gradients under these options; None: they are taken."""
        return self.sparse_text

    def _may_lack(self, name: str) -> bool:
        """Whether a checkpoint may leave a state out."""
        return False

    def _needs_fresh(self, group: dict[str, Any]) -> bool:
        """Whether the rule's first step with a state differs from later ones."""
        return False

    # --- torch.optim.Optimizer ----------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """Global 2-norm of the (unscaled) gradients of the last step that clipped or normalised: a 0-d tensor, or None.

        It stays on the parameters' device; only reading it as a number synchronises.
        """
        if self._grad_norm is None:
            return None
        any_double = any(p.dtype == torch.float64 for group in self.param_groups for p in group["params"])
        dtype = torch.float64 if any_double else torch.float32
        if isinstance(self._grad_norm, Tensor):
            return self._grad_norm.to(dtype)
        return torch.tensor(self._grad_norm, dtype=dtype, device="cpu")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(self.defaults["fused_unscale"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does; its options are checked like the constructor's."""
        if isinstance(param_group, dict):
            for option in param_group.keys() & self.defaults.keys():
                param_group[option] = as_python_number(param_group[option])
            self._check_options({**self.defaults, **param_group})
            for other in self.param_groups[:1]:
                check_agreement(other, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_params(self.param_groups[-1], len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a copy. load_state_dict() calls it too, without the defaults."""
        loading: dict[str, Any] | None = self.__dict__.get("_loading")
        defaults = state.get("defaults") or self.defaults
        for option, value in options_of(type(self)).items():  # an older pickle may lack some
            defaults.setdefault(option, value)
        old_groups = [{}] * len(state["param_groups"]) if loading is None else self.param_groups
        for group, old in zip(state["param_groups"], old_groups, strict=True):
            for option, value in {**defaults, **old}.items():
                group.setdefault(option, value)
            if loading is not None:  # a checkpoint does not decide how this process scales its losses
                group["fused_unscale"] = old["fused_unscale"]
                group.update(
                    {name: old[name] for name in STORAGE_OPTIONS if name in old}
                )  # nor how it keeps its states
            self._check_options(group)
            check_agreement(state["param_groups"][0], group)
        if loading is not None:
            restore_precision(state, loading, {"step", *self.scalar_states})
        for number, group in enumerate(state["param_groups"]):
            self._check_loaded(group, number, state["state"])
        self.__dict__.setdefault("_grad_norm", None)
        super().__setstate__(state)
        if loading is not None:  # for groups that are added later
            for group in self.param_groups[:1]:
                self.defaults.update({option: group[option] for option in SHARED})

    @_compat.disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of its torch.optim namesake.

        Options that the state lacks (ours, in a checkpoint of torch.optim) keep their values. States keep their precision:
        float32 beside 16-bit parameters. Raises ValueError, with nothing changed, where groups, shapes or forms differ.
        """
        # The base class casts states to the parameter's dtype, then calls __setstate__, which restores them from `loading`.
        loading: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(
            lambda _, loaded: loading.update(loaded)
        )  # runs after the user's hooks
        self._loading = loading
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            del self._loading

    @_compat.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's. The 8-bit states of sharded parameters (DTensor) are saved as float32, for any number of processes."""
        saved: dict[str, Any] = super().state_dict()
        if any(is_sharded(param) for group in self.param_groups for param in group["params"]):
            saved = with_full_states(self, saved, only_sharded=True)
        return saved

    def _saved_state(self, states: dict[str, Any]) -> dict[str, Any]:
        """A parameter's states in the form that torch's namesake saves."""
        return states

    def _check_loaded(self, group: dict[str, Any], number: int, state: dict[Tensor, Any]) -> None:
        """Check the loaded states of a group's parameters and move the 0-d ones to their device."""
        take_loaded_states(self, group, number, state)

    def _scalar_tensor(self, group: dict[str, Any], param: Tensor, value: float | Tensor) -> Tensor:
        return scalar_tensor(param, value, self._counts_on_device(group))

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        """Whether 0-d states live beside parameters on CUDA."""
        return bool(self._scalar_states(group) and (group.get("capturable") or group["fused_unscale"]))

    # --- the step -------------------------------------------------------------------------------------------------------

    @_compat.disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, in one pass over memory.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's result, or None.

        Raises:
            RuntimeError: naming the parameter, before anything is written, where one cannot be updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.param_groups:
            return loss
        factor = self._gradient_factor()
        if not self._found_overflow(factor.found_inf):
            self._update(factor)
        return loss

    def _found_overflow(self, found_inf: Tensor | None) -> bool:
        """Whether the host skips the step for an overflow. If found_inf is on the kernels' device, they decide."""
        if found_inf is None:
            return False
        stepped = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        kernels_decide = _native.is_on_cuda(found_inf) and any(_native.is_on_cuda(p) for p in stepped)
        return not kernels_decide and bool(found_inf)

    def _gradient_factor(self) -> _native.GradientFactor:
        options = self.param_groups[0]
        for group in self.param_groups:
            check_shared_options(group, type(self).__name__)
            check_agreement(options, group)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not options["fused_unscale"] and (grad_scale is not None or found_inf is not None):
            raise RuntimeError(
                "grad_scale and found_inf are set on this optimizer, but it was made without fused_unscale=True and would "
                "ignore them"
            )
        max_norm = None if options["max_norm"] is None else float(options["max_norm"])
        return _native.GradientFactor(max_norm, bool(options["normalize_grads"]), grad_scale, found_inf)

    def _update(self, factor: _native.GradientFactor) -> None:
        plan, stagings, missing = self._gather(None)
        if factor.needs_norm and plan.has_subclasses():
            factor.reduce = reduce_sharded(self.param_groups)
        self._check_capture(plan)
        made: list[tuple[Tensor, dict[str, Tensor]]] = []
        try:
            if missing:  # parameters that step for the first time; all were checked before states are made
                made = [(group["params"][i], self._new_states(group, group["params"][i])) for group, i in missing]
                for param, states in made:
                    self.state[param].update(states)
                plan, stagings, missing = self._gather(self._fresh_params(missing) or None)
                if missing:
                    raise RuntimeError("the optimizer's state changed while it was being made")
            norm = _native.update(plan, stagings, factor)
        except BaseException:
            if not plan.has_run():
                self._discard(made)
            raise
        if norm is not None:
            self._grad_norm = norm

    def _fresh_params(self, missing: list[tuple[dict[str, Any], int]]) -> set[Tensor]:
        """The parameters for which the rule needs to know that their states are new."""
        needs_fresh = {id(group): self._needs_fresh(group) for group in self.param_groups}
        return {group["params"][index] for group, index in missing if needs_fresh[id(group)]}

    def _discard(self, made: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Remove states that were made for a step that failed."""
        for param, states in made:
            of_param = self.state.get(param, {})
            for name in states:
                of_param.pop(name, None)
            if not of_param:
                self.state.pop(param, None)

    def _check_capture(self, plan: Any) -> None:
        """Raise if a CUDA graph would capture a step that the host counts: each replay would repeat the same step."""
        counting = [group for group in self.param_groups if self._scalar_states(group)]
        counts_on_host = not all(map(self._counts_on_device, counting))
        if counts_on_host and _native.has_cuda and plan.cuda_devices() and _compat.is_capturing():
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {type(self).__name__} but param_groups' capturable "
                f"is False."
            )

    def _gather(self, fresh: set[Tensor] | None) -> tuple[Any, list[Staging], list[tuple[dict[str, Any], int]]]:
        """Check and collect every group. Gives the plan, the stagings, and [(group, index)] of parameters without states."""
        plan = _native.new_plan()
        stagings: list[Staging] = []
        missing: list[tuple[dict[str, Any], int]] = []
        for number, group in enumerate(self.param_groups):
            states, formats = self._state_names(group), self._formats(group)
            device_scalars = self._counts_on_device(group)
            staging = Staging(
                partial(name_of, group, number),
                states,
                self._sparse_refusal(group),
                partial(self._replace_state, group),
                _native.find_variant(self.rule, states)[1].takes_rows,
                device_scalars,
                formats,
            )
            stagings.append(staging)
            native = _native.Group(
                self.rule,
                states,
                group["params"],
                self.state,
                self._hyper(group),
                staging,
                counts_steps="step" in self._scalar_states(group),
                device_scalars=device_scalars,
                maximize=group["maximize"],
                fresh=fresh,
                formats=formats,
            )
            missing += [(group, index) for index in native.gather(plan)]
        return plan, stagings, missing

    def _replace_state(self, group: dict[str, Any], index: int, name: str, tensor: Tensor) -> None:
        self.state[group["params"][index]][name] = tensor

    def _new_states(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """The states that a parameter lacks, as tensors like it: same strides, and a DTensor for a DTensor."""
        known, initial = self.state.get(param, {}), partial(self._initial_value, group)
        scalars = [name for name in self._scalar_states(group) if known.get(name) is None]
        new = missing_entries(param, self._formats(group), initial, known)
        return {**{name: self._scalar_tensor(group, param, initial(name)) for name in scalars}, **new}

    def sync_master(self) -> None:
        """Make parameters their own masters again (master_bits), after load_state_dict() of the model alone or another write.

        A remainder says what a bfloat16 parameter lacks of its float32 master, and then belongs to the old value.
        """
        for states in self.state.values():
            if REMAINDER in states:
                states[REMAINDER].zero_()
