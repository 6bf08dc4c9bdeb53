"""SAM: arithmetic in csrc/rules/sam.hpp."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _compat, _native
from ._checks import state_dtype
from ._distributed import reduce_sharded
from ._options import check, check_scalar
from ._staging import Staging
from ._wrapper import Wrapper, gather, restore
from ._wrapper_states import State, params_of


class SAM(Wrapper):
    r"""Sharpness-aware minimisation around any optimizer: it steps with the gradient at nearby weights of higher loss.

    With g the gradients at the weights w, and the norm over all of them together:

        e = rho * g / (norm(g) + 1e-12)                 with adaptive: rho * w^2 * g / (norm(|w| * g) + 1e-12)
        the base optimizer steps from w, with the gradients at w + e

    Sources: Foret, Kleiner, Mobahi & Neyshabur 2021; adaptive: Kwon, Kim, Park & Choi 2021 (ASAM, eta = 0).

    Args:
        params: parameters, named parameters or group dicts, as for the base optimizer. Group dicts may contain `rho`.
        base_optimizer: class of the optimizer that steps, or a function that makes one, such as a functools.partial.
        rho: radius of the neighbourhood, not negative.
        adaptive: scale the neighbourhood by the weights; complex ones as pairs of reals.
        base_kwargs: arguments of the base optimizer.

    Either step(closure), or by hand: backward(), first_step(zero_grad=True), backward() again, second_step(). Both compute
    the loss twice; docs/rules/sam.md explains what that means for BatchNorm, GradScaler, DistributedDataParallel, clipping.

    State: old_param, the weights w while the parameters are w + e, float32 for bfloat16 and float16. state_dict() has it only
    between first_step() and second_step(). The groups get sam_rho and sam_adaptive.

    Raises:
        TypeError: base_optimizer does not make an optimizer, or makes one that SAM cannot step.
        ValueError: rho out of range.
    """

    kept = "old_param"
    prefix = "sam_"
    usage = "base_optimizer has to be a class of optimizers, or a function that returns an optimizer"
    # GradScaler then calls step() even after an overflow, which it must, to restore the weights.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        options = {"sam_rho": rho, "sam_adaptive": bool(adaptive)}
        self._check_options(options)
        if not callable(base_optimizer):
            raise TypeError(
                f"base_optimizer is of type {type(base_optimizer).__name__}; a class is expected, which SAM calls with params "
                f"and the further arguments"
            )
        self._check_base(base_optimizer)
        base = base_optimizer(self._prepared(params, options), **base_kwargs)
        self._check_base(type(base))
        super().__init__(base, options)
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(base).__name__} needs a closure at every step; SAM has gradients for it, no closure"
            )

    @staticmethod
    def _check_base(made_by: Any) -> None:
        if isinstance(made_by, type) and issubclass(made_by, Wrapper):
            raise TypeError(f"SAM does not wrap {made_by.__name__}. Lookahead(SAM(...)) is possible.")

    def _prepared(self, params: Any, options: dict[str, Any]) -> Any:
        """The params for the base optimizer: in group dicts our options are renamed and checked."""
        if isinstance(params, Tensor):
            return params  # the base optimizer raises its own error
        params = list(params)
        if not params or not isinstance(params[0], dict):
            return params
        groups = [self._own_options(group) for group in params]
        for group in groups:
            self._check_options({**options, **group})
        return groups

    @staticmethod
    def _own_options(group: dict[str, Any]) -> dict[str, Any]:
        """A user's group dict says rho; the groups call it sam_rho, because Adadelta has a rho of its own."""
        return {("sam_rho" if name == "rho" else name): value for name, value in group.items()}

    def _check_options(self, group: dict[str, Any]) -> None:
        check_scalar("rho", group["sam_rho"])
        check(group["sam_rho"] >= 0, "Invalid rho value", group["sam_rho"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; it may contain `rho`."""
        super().add_param_group(self._own_options(param_group) if isinstance(param_group, dict) else param_group)

    # --- the old weights: state between the two halves, otherwise memory that is kept for the next step -----------------

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are w + e: from first_step() to second_step()."""
        # The plan records by itself that it has run, so an interrupt cannot separate the two.
        return self._perturbed is not None and (self._perturbing is None or self._perturbing.has_run())

    def _state_of(self, param: Tensor, make: bool = False) -> dict[str, Tensor]:
        state = self._perturbed.get(param) if self._perturbed is not None and self.is_perturbed else None
        if state is None and make:
            raise KeyError("old_param: the parameter is not perturbed, there are no weights to go back to")
        return state or {}

    def _drop_state(self, param: Tensor) -> None:
        self._state_of(param).pop(self.kept, None)  # the entry stays, so that restoring reports the loss

    def _set_kept_state(self, state: State) -> None:
        super()._set_kept_state(state)
        self._perturbed: State | None = state or None
        self._perturbing: Any = None  # the plan of a first half that is running

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_perturbed": self.is_perturbed or None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state.get("_perturbed") is not None:
            self._perturbed = state["_own_state"]  # it may be empty

    # --- the step -----------------------------------------------------------------------------------------------------

    @_compat.disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With a closure both halves; without one the second half, after first_step().

        Args:
            closure: evaluates the model, calls backward() and returns the loss. It is called twice, at w and at w + e; the
                gradients are cleared in between.

        Returns:
            The loss at w, or None without a closure.

        Raises:
            RuntimeError: without a closure if first_step() was not called, with one if it was.
        """
        if closure is None:
            if not self.is_perturbed:
                raise RuntimeError("SAM's step() without a closure is its second half: call first_step() before it")
            self._restore()
            self._step_base()
            return None
        self._require_unperturbed("step(closure)")
        with torch.enable_grad():
            loss = closure()
        try:
            self._perturb()
            self.zero_grad()
            with torch.enable_grad():
                closure()
            self._restore()
        except BaseException:
            if self.is_perturbed:
                self._restore()
            raise
        self._step_base()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Keep the weights and move to w + e, with the present gradients.

        Args:
            zero_grad: clear the gradients afterwards. Otherwise the next backward() adds to them.

        Raises:
            RuntimeError: called twice without second_step() in between; or naming a parameter that cannot be updated.
        """
        self._require_unperturbed("first_step()")
        self._perturb()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, bit for bit, and step the base optimizer with the present gradients.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: first_step() was not called.
        """
        if not self.is_perturbed:
            raise RuntimeError("second_step() without first_step() before it: there are no weights to go back to")
        self.step()  # hooks and schedulers see one step
        if zero_grad:
            self.zero_grad()

    def _require_unperturbed(self, what: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"{what} after first_step(): second_step(), or step() without a closure, has to come first"
            )

    def _gather(self, states: State) -> tuple[Any, list[Staging], list[Tensor]]:
        plan = _native.new_plan()
        stagings: list[Staging] = []
        missing: list[Tensor] = []
        for group in self.param_groups:
            staging, lacking = gather(
                "sam",
                self.kept,
                self.param_groups,
                params_of([group]),
                states,
                {"rho": self._option(group, "sam_rho"), "adaptive": self._option(group, "sam_adaptive")},
                plan,
                maximize=bool(group.get("maximize", False)),  # the loss is then -loss, and so is its slope
                sparse_text="SAM does not support sparse gradients",
            )
            stagings.append(staging)
            missing += lacking
        return plan, stagings, missing

    def _perturb(self) -> None:
        adaptive = {bool(self._option(group, "sam_adaptive")) for group in self.param_groups}
        if len(adaptive) > 1:
            raise ValueError("sam_adaptive counts for the whole optimizer, but its groups disagree")
        params = params_of(self.param_groups)
        self._own.keep_only(params)
        states = {param: self._own.get_or_make(param) for param in params if param.grad is not None}
        plan, stagings, missing = self._gather(states)
        if missing:  # all parameters were checked before the first copy is made
            for param in missing:
                states[param][self.kept] = torch.zeros_like(param, dtype=state_dtype(param))
            plan, stagings, _ = self._gather(states)
        factor = _native.GradientFactor(normalize=True, epsilon=1e-12, weighted=True in adaptive)
        if plan.has_subclasses():
            factor.reduce = reduce_sharded(self.param_groups, "SAM needs")
        self._perturbing, self._perturbed = plan, states
        try:
            _native.update(plan, stagings, factor)
        finally:
            if not plan.has_run():
                self._perturbed = None
            self._perturbing = None

    def _restore(self) -> None:
        # Only parameters in the groups, and in reverse order: if two share memory, the one perturbed first kept the weights.
        perturbed = self._perturbed or {}
        params = [param for param in params_of(self.param_groups) if param in perturbed]
        restore(self.param_groups, {param: perturbed[param] for param in reversed(params)})
        self._perturbed = self._perturbing = None

    def _step_base(self) -> None:
        base = self.base_optimizer
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is None:
            base.step()
        elif getattr(base, "_step_supports_amp_scaling", False):
            base.grad_scale, base.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
            try:
                base.step()
            finally:
                del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
        elif not bool(found_inf):  # reads it on the host, as GradScaler does for optimizers that do not scale
            if grad_scale is not None:
                grads = [p.grad for p in params_of(self.param_groups) if p.grad is not None]
                torch._foreach_mul_(grads, 1 / float(grad_scale))
            base.step()
