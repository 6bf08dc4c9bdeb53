"""Updates inside backward: a parameter is stepped, and its gradient freed, as soon as the gradient is complete."""

from __future__ import annotations

import contextlib
from collections import ChainMap, Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ._base import FusedOptimizer
from ._options import check, check_scalar


class StepInBackward:
    """What `step_in_backward` returns.

    Attributes:
        optimizer: the optimizer that steps; schedulers and checkpoints use it as ever.
    """

    def __init__(self, optimizer: FusedOptimizer, max_norm_each: float | None) -> None:
        self.optimizer, self.max_norm_each = optimizer, max_norm_each
        self._holding = False
        _check_usable(optimizer)
        self._handles = []
        self._count = _count(optimizer)
        for number, group in enumerate(optimizer.param_groups):
            times = Counter(map(id, group["params"]))
            for index, param in enumerate(group["params"]):
                if id(param) not in times:
                    continue  # listed a second time: its hook steps it as often
                frozen = not param.requires_grad
                if frozen:  # it may be unfrozen later; torch registers no hook on it as it is
                    param.requires_grad_(True)
                hook = self._hook(number, index, times.pop(id(param)))
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
                if frozen:
                    param.requires_grad_(False)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backward passes only add to the gradients: for all micro-batches but the last."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def remove(self) -> None:
        """Backward passes leave the gradients again, for optimizer.step()."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, number: int, index: int, times: int) -> Any:
        @_compat.disable_dynamo
        def hook(param: Tensor) -> None:
            if self._holding or param.grad is None:
                return
            _check_usable(self.optimizer)
            if _count(self.optimizer) > self._count:
                raise RuntimeError(
                    "parameters were added to the optimizer after step_in_backward(), which would not step them. Call remove() on "
                    "its result, then step_in_backward() again."
                )
            place = _find(self.optimizer, param, number, index)
            if place is None:  # removed from its group: no longer ours to write
                return
            one = _one_parameter(self.optimizer, *place, times)
            factor = one._gradient_factor()
            factor.max_norm = self.max_norm_each
            with torch.no_grad():
                one._update(factor)
            param.grad = None

        return hook


def step_in_backward(optimizer: FusedOptimizer, *, max_norm_each: float | None = None) -> StepInBackward:
    """Let backward() step the optimizer, parameter by parameter, and free each gradient at once.

    Gradients then need the memory of the largest parameter instead of that of all, and optimizer.step() is no longer called.
    Parameters and states have the same bits as after backward() and step().

    Args:
        optimizer: one of this package, not a wrapper. Options may change at any time, and parameters that are removed from
            their group keep their gradients. Step hooks of the optimizer do not run.
        max_norm_each: clip the gradient of each parameter to this 2-norm by itself.

    Returns:
        A handle: `with handle.accumulate():` around the backward passes of all micro-batches but the last, and
        `handle.remove()`.

    Raises:
        TypeError: a wrapper, or an optimizer of another package.
        ValueError: max_norm or normalize_grads, which need the gradients of all parameters at the same time; fused_unscale, whose
            scale and overflow check come after backward().
        RuntimeError: in backward(), where parameters were added meanwhile; several processes. DDP averages gradients after they are complete here, and FSDP sets them elsewhere.

    A torch.amp.GradScaler cannot be used with it, for the same reason as fused_unscale: gradients are still scaled. bfloat16
    needs none. Reentrant checkpointing completes a gradient several times; use use_reentrant=False.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"step_in_backward() takes an optimizer of onepass.optim that is no wrapper; {type(optimizer).__name__} came"
        )
    if max_norm_each is not None:
        check_scalar("max_norm_each", max_norm_each)
        check(max_norm_each >= 0, "Invalid max_norm_each value", max_norm_each)
    return StepInBackward(optimizer, max_norm_each)


def _check_usable(optimizer: FusedOptimizer) -> None:
    for group in optimizer.param_groups:
        for option, off in (("max_norm", None), ("normalize_grads", False)):
            if group[option] != off:
                raise ValueError(
                    f"{option} needs the norm of all gradients, which never exist at the same time in step_in_backward(). Use its "
                    f"max_norm_each, or call optimizer.step() after backward()."
                )
        if group["fused_unscale"]:
            raise ValueError(
                "fused_unscale unscales after backward(), where step_in_backward() has used the gradients already. Call "
                "optimizer.step() after backward()."
            )
    if _compat.process_count() > 1:
        raise RuntimeError(
            "step_in_backward() steps before gradients of several processes are averaged. Call optimizer.step() after "
            "backward()."
        )


def _count(optimizer: FusedOptimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _find(optimizer: FusedOptimizer, param: Tensor, number: int, index: int) -> tuple[int, int] | None:
    """Where a parameter is now, (group, index); the groups may have changed since it was at the given place."""
    groups = optimizer.param_groups
    if number < len(groups) and index < len(groups[number]["params"]) and groups[number]["params"][index] is param:
        return number, index
    places = ((n, i) for n, group in enumerate(groups) for i, other in enumerate(group["params"]) if other is param)
    return next(places, None)


def _one_parameter(optimizer: FusedOptimizer, number: int, index: int, times: int) -> FusedOptimizer:
    """An optimizer with the same state and live options, whose only parameter is this one, listed so many times."""
    group = optimizer.param_groups[number]
    param = group["params"][index]
    names = group.get("param_names") or {index: f"{index} of group {number}"}  # for error messages
    one: FusedOptimizer = object.__new__(type(optimizer))
    one.__dict__.update(optimizer.__dict__)
    options: Any = ChainMap({"params": [param] * times, "param_names": [names[index]] * times}, group)
    one.param_groups = [options]
    return one
