"""Lookahead: arithmetic in csrc/rules/lookahead.hpp."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _compat, _native
from ._options import check, check_scalar
from ._staging import Staging
from ._wrapper import Wrapper, gather, kept_copy, restore
from ._wrapper_states import State, params_of


class Lookahead(Wrapper):
    r"""Slow weights around any optimizer: every k steps they move towards its weights, which then restart from them.

    After each k-th step of the wrapped optimizer, with w its weights:

        slow <- slow + alpha * (w - slow)
        w <- slow

    slow starts as a copy of w, taken in the first step. The wrapped optimizer's state is not changed.
    Source: Zhang, Lucas, Hinton & Ba 2019, algorithm 1.

    Args:
        optimizer: the optimizer to wrap, of this package, of torch.optim or of any subclass of torch.optim.Optimizer.
        k: steps between two synchronisations, from 1.
        alpha: how far the slow weights move, from 0 to 1; or "quadratic": to the minimum of the parabola through the losses
            at both ends and the slope at w. step() then needs a closure, and evaluates it twice more per synchronisation;
            see docs/rules/lookahead.md.

    State: slow_param, in the parameter's dtype (float32 for bfloat16 and float16), beside the wrapped optimizer's in
    state_dict(). The groups get lookahead_k, lookahead_alpha and lookahead_step, the number of steps so far.

    Raises:
        TypeError: optimizer is not an optimizer.
        ValueError: k or alpha out of range; an optimizer that Lookahead already wraps.
    """

    kept = "slow_param"
    prefix = "lookahead_"
    usage = "Lookahead wraps an optimizer: Lookahead(onepass.optim.AdamW(params), k=5)"

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5, alpha: float | str = 0.5) -> None:
        options = {"lookahead_k": k, "lookahead_alpha": alpha, "lookahead_step": 0}
        self._check_options(options)
        options["lookahead_k"] = operator.index(k)
        if any(name in group for group in getattr(optimizer, "param_groups", []) for name in options):
            raise ValueError(f"this {type(optimizer).__name__} is wrapped in Lookahead already; wrap it once")
        super().__init__(optimizer, options)

    def _check_options(self, group: dict[str, Any]) -> None:
        k, alpha = group["lookahead_k"], group["lookahead_alpha"]
        try:
            check(operator.index(k) >= 1, "Invalid k value", k)
        except TypeError:
            check(False, "Invalid k value (an integer from 1)", k)
        if not isinstance(alpha, str):
            check_scalar("alpha", alpha)
        check(
            alpha == "quadratic" if isinstance(alpha, str) else 0 <= alpha <= 1,
            "Invalid alpha value (a number from 0 to 1 or 'quadratic')",
            alpha,
        )

    def _agreed(self, name: str) -> Any:
        """An option that must be the same in all groups."""
        values = [self._option(group, name) for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} counts for the whole optimizer, but its groups disagree: {values}")
        return values[0] if values else self.defaults[name]

    def _count(self) -> int:
        """The number of steps so far: the largest, because an interrupted step or a group added directly leaves smaller ones."""
        return max((self._option(group, "lookahead_step") for group in self.param_groups), default=0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer. The next step copies its slow weights."""
        super().add_param_group(param_group)
        self.param_groups[-1]["lookahead_step"] = self._count()

    @_compat.disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer and, every k steps, the synchronisation.

        Args:
            closure: evaluates the model and returns the loss; passed to the wrapped optimizer. alpha="quadratic" needs it.

        Returns:
            The result of the wrapped optimizer's step.

        Raises:
            TypeError: no closure although alpha is "quadratic".
            RuntimeError: naming the parameter, before anything is written, where one cannot be averaged.
        """
        k, alpha = self._agreed("lookahead_k"), self._agreed("lookahead_alpha")
        if alpha == "quadratic" and closure is None:  # torch.optim.LBFGS's sentence
            raise TypeError(
                "Lookahead.step() missing 1 required positional argument: 'closure'; alpha='quadratic' evaluates the loss"
            )
        if _compat.is_capturing() and any(param.is_cuda for param in params_of(self.param_groups)):
            raise RuntimeError(
                "Attempting CUDA graph capture of step() for an instance of Lookahead, whose count of steps is on the host: "
                "a replay would never synchronise, or always. Capture the wrapped optimizer's step instead."
            )
        count = self._count() + 1
        made = self._begin_new()
        try:
            loss = self.base_optimizer.step(closure)
        except BaseException:
            for param in made:
                self._own.pop(param)
            raise
        for group in self.param_groups:
            group["lookahead_step"] = count
        if count % k == 0:
            self._synchronise(self._quadratic_alpha(closure) if alpha == "quadratic" else alpha)
        return loss

    def _begin_new(self) -> State:
        """Check all parameters that have no slow weights yet, then copy theirs. Gives the new ones.

        Drops the slow weights of parameters that left the groups.
        """
        params = (param for group in self.param_groups for param in group["params"])
        without = self._own.keep_only(params)
        new = [param for param in without if param.requires_grad and not torch.nn.parameter.is_lazy(param)]
        if not new:
            return {}
        self._gather({param: {} for param in new}, _native.new_plan(), 0.0)
        made = {param: {self.kept: kept_copy(param)} for param in new}
        for param, state in made.items():
            self._own[param] = state
        return made

    def _slow(self) -> State:
        """The slow weights of the parameters in the groups that require gradients: frozen ones are not written to."""
        known = self._own.get
        return {p: state for p in params_of(self.param_groups) if (state := known(p)) and p.requires_grad}

    def _gather(self, states: State, plan: Any, alpha: float | Tensor) -> Staging:
        hyper = {"alpha": alpha}
        params = list(states)
        staging, _ = gather("lookahead", self.kept, self.param_groups, params, states, hyper, plan, reads_grad=False)
        return staging

    def _synchronise(self, alpha: float | Tensor) -> None:
        plan = _native.new_plan()
        staging = self._gather(self._slow(), plan, alpha)
        _native.update(plan, [staging], _native.GradientFactor())

    # --- alpha="quadratic" --------------------------------------------------------------------------------------------

    def _quadratic_alpha(self, closure: Callable[[], Any] | None) -> Tensor:
        """Where between slow weights (0) and weights (1) the parabola through both losses and the slope at 1 is smallest."""
        assert closure is not None
        slow = self._slow()
        self.zero_grad()
        last = _evaluate(closure)
        slope = self._slope(slow)
        fast: State = {param: {"old_param": kept_copy(param)} for param in slow}
        try:
            restore(self.param_groups, {param: {"old_param": state[self.kept]} for param, state in slow.items()})
            self.zero_grad()
            first = _evaluate(closure)
            restore(self.param_groups, fast)
        except BaseException:
            restore(self.param_groups, fast)
            raise
        finally:
            self.zero_grad()
        return parabola_minimum(_as_scalar(first, slope), _as_scalar(last, slope), slope)

    def _slope(self, slow: State) -> Tensor:
        """Gradient times (weights - slow weights), summed in float64."""
        device = next((param.device for param in slow), None)
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.no_grad():
            for param, state in slow.items():
                if param.grad is None:
                    continue
                grad = param.grad.to_dense() if param.grad.is_sparse else param.grad
                difference = param.to(state[self.kept].dtype) - state[self.kept]
                if param.is_complex():
                    difference, grad = torch.view_as_real(difference), torch.view_as_real(grad)
                part = (difference * grad).sum(dtype=torch.float64)
                total += _compat.whole(part).to(total.device)
        return total


def _evaluate(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        loss = closure()
    if loss is None:
        raise TypeError("the closure returned None; alpha='quadratic' needs the loss")
    return loss


def _as_scalar(loss: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(loss, dtype=like.dtype, device=like.device).detach().reshape(())


def parabola_minimum(first: Tensor, last: Tensor, slope: Tensor) -> Tensor:
    """Where in [0, 1] the parabola q with q(0) = first, q(1) = last, q'(1) = slope is smallest; 0-d float64 tensors.

    A parabola without a minimum: 1 if last <= first, else 0.5. Also 0.5 where a number is not finite.
    """
    rise = last - first
    a, b = slope - rise, 2 * rise - slope
    ends = torch.where(rise <= 0, 1.0, 0.5)
    alpha = torch.where(a > 0, (-b / (2 * a)).clamp(0, 1), ends.to(a.dtype))
    return torch.where(torch.isfinite(a) & torch.isfinite(b), alpha, 0.5)
