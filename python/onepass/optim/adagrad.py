"""Adagrad: arithmetic in csrc/rules/adagrad.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_not_negative


class Adagrad(FusedOptimizer):
    r"""Adagrad; torch.optim.Adagrad in one pass over memory.

    With g the gradient after clipping, sign and weight decay (g + weight_decay * w), t the parameter's step count from 1:

        G <- G + g^2
        w <- w - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(G) + eps)

    A sparse gradient updates only its rows.

    Source: Duchi, Hazan & Singer 2011.

    Args:
        params, lr, lr_decay, weight_decay, eps, maximize: as torch.optim.Adagrad. lr may be a tensor of one element; on CUDA
            it may live on the device and change without a synchronisation.
        initial_accumulator_value: G before a parameter's first step.
        foreach, fused: hints to torch.optim, accepted and ignored: the only implementation is fused.
        differentiable: must be False.
        capturable: keep the step count on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        eps_inside_sqrt: sqrt(G + eps) instead of sqrt(G) + eps.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step (0-d float32), sum (G), in the parameter's dtype (float32 for bfloat16 and float16). A parameter's first step
    makes it, or share_memory().

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        eps_inside_sqrt: bool = False,
        max_norm: float | None = None,
        normalize_grads: bool = False,
        fused_unscale: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_bits: int | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def share_memory(self) -> None:
        """Move the states `sum` to shared memory, for processes that train together (Hogwild). Makes missing states."""
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        made = [(param, self._new_states(group, param)) for group, param in params]
        for param, states in made:
            self.state[param].update(states)
            self.state[param]["sum"].share_memory_()

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check_not_negative(group, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def _sparse_refusal(self, group: dict[str, Any]) -> str | None:
        return None if group["weight_decay"] == 0 else "weight_decay option is not compatible with sparse gradients"

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def _initial_value(self, group: dict[str, Any], name: str) -> float:
        return float(group["initial_accumulator_value"]) if name == "sum" else super()._initial_value(group, name)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        return {name: group[name] for name in ("lr", "lr_decay", "weight_decay", "eps", "eps_inside_sqrt")}
