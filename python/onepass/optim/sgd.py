"""SGD: arithmetic in csrc/rules/sgd.hpp."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_not_negative, check_scalar


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum and Nesterov momentum; torch.optim.SGD in one pass over memory.

    With g the gradient after clipping, sign and weight decay (g + weight_decay * w):

        v <- momentum * v + (1 - dampening) * g     (v = g in a parameter's first step)
        w <- w - lr * v                             (Nesterov: w - lr * (g + momentum * v))

    Sources: Polyak 1964; Nesterov as in Sutskever, Martens, Dahl & Hinton 2013.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD. lr may be a tensor.
        foreach, fused: hints to torch.optim, accepted and ignored: the only implementation is fused.
        differentiable: must be False.
        lr_in_velocity: the textbook form, v <- momentum * v + lr * g; w <- w - v. It gives other numbers once lr changes
            between steps. With nesterov the parameters hold the look-ahead point w - momentum * v. Excludes dampening.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer. fused_unscale excludes dampening.

    Without momentum a sparse gradient updates only its rows. With momentum it is made dense first, because the velocity moves
    the other rows too, as in torch.

    State: momentum_buffer, in the parameter's dtype (float32 for bfloat16 and float16); nothing without momentum.

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "sgd"
    scalar_states: ClassVar[dict[str, float]] = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        lr_in_velocity: bool = False,
        max_norm: float | None = None,
        normalize_grads: bool = False,
        fused_unscale: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_bits: int | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check_not_negative(group, "lr", "momentum", "weight_decay")
        check_scalar("dampening", group["dampening"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if group["dampening"] != 0 and group["lr_in_velocity"]:
            raise ValueError("lr_in_velocity has no dampening: its velocity already scales the gradient, by lr")
        if group["dampening"] != 0 and group["fused_unscale"]:
            raise ValueError(
                "fused_unscale does not go with dampening: a first step skipped for an overflow would leave a momentum "
                "buffer that dampening treats as a second one"
            )

    def _sparse_refusal(self, group: dict[str, Any]) -> str | None:
        if group["weight_decay"] == 0:
            return None
        return (
            "add(sparse, dense) is not supported. Use add(dense, sparse) instead. weight_decay needs a dense gradient"
        )

    def _needs_fresh(self, group: dict[str, Any]) -> bool:
        # torch starts momentum buffers with the gradient, for a parameter listed twice both times in its first step.
        listed_twice = len(set(map(id, group["params"]))) < len(group["params"])
        return bool(group["dampening"] != 0 or listed_twice)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _may_lack(self, name: str) -> bool:
        return name == "momentum_buffer"  # torch makes it with the first gradient, and may save None before

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        return {
            name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "lr_in_velocity")
        }

    def _check_loaded(self, group: dict[str, Any], number: int, state: dict[Tensor, Any]) -> None:
        for states in (state.get(p, {}) for p in group["params"]):
            buffer = states.get("momentum_buffer")
            if isinstance(buffer, Tensor) and buffer.is_sparse:  # as torch keeps it under sparse gradients
                states["momentum_buffer"] = buffer.to_dense()
        super()._check_loaded(group, number, state)
        loading = self.__dict__.get("_loading")
        if loading is None:
            return
        ours = self.param_groups[number]["lr_in_velocity"]
        theirs = loading["param_groups"][number].get("lr_in_velocity", False)  # torch's form is the default
        if ours != theirs and any(state.get(p, {}).get("momentum_buffer") is not None for p in group["params"]):
            raise ValueError(
                f"the loaded state has lr_in_velocity={theirs}, this optimizer was made with lr_in_velocity={ours}: their "
                f"momentum buffers differ by a factor of lr"
            )
