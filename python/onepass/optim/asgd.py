"""ASGD: arithmetic in csrc/rules/asgd.hpp."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_not_negative, check_scalar


class ASGD(FusedOptimizer):
    r"""SGD that also averages the weights it visits; torch.optim.ASGD in one pass over memory.

    With g the gradient after clipping, sign and weight decay (g + weight_decay * w), t the parameter's step count from 1:

        w <- w * (1 - lambd * eta) - eta * g
        a <- a + mu * (w - a)                        (a = w while mu = 1)
        eta <- lr / (1 + lambd * lr * t)^alpha       (lr in a parameter's first step)
        mu <- 1 / max(1, t - t0)                     (1 in a parameter's first step)

    eta and mu count from the next step on, as in torch.optim: a step size follows a new lr one step later. The average is a
    state of each parameter; nothing copies it into the weights. Source: Polyak & Juditsky 1992, Acceleration of Stochastic
    Approximation by Averaging.

    Args:
        params, lr, lambd, alpha, t0, weight_decay, maximize: as torch.optim.ASGD. lr may be a tensor of one element; with
            capturable or fused_unscale it may live on the device and change without a synchronisation.
        foreach: a hint to torch.optim, accepted and ignored: the only implementation is fused.
        differentiable: must be False.
        capturable: keep step, eta and mu on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step, eta and mu (all 0-d float32), ax (a), in the parameter's dtype (float32 for bfloat16 and float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "asgd"
    scalar_states: ClassVar[dict[str, float]] = {"step": 0.0, "eta": 0.0, "mu": 1.0}
    sparse_text = "ASGD does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
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
        check_not_negative(group, "lr", "weight_decay")
        for name in ("lambd", "alpha", "t0"):
            check_scalar(name, group[name])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("ax",)

    def _initial_value(self, group: dict[str, Any], name: str) -> float:
        return float(group["lr"]) if name == "eta" else super()._initial_value(group, name)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        hyper = {name: group[name] for name in ("lr", "lambd", "alpha", "t0", "weight_decay")}
        if self._counts_on_device(group):
            return hyper
        return {name: float(value) for name, value in hyper.items()}  # the host computes eta and mu from them
