"""Rprop: arithmetic in csrc/rules/rprop.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_not_negative, check_pair

_VARIANTS = ("irprop-", "rprop-")


class Rprop(FusedOptimizer):
    r"""Resilient propagation; torch.optim.Rprop in one pass over memory.

    Every element has its own step size d, initially lr. With g the gradient after clipping and sign, h the gradient that the
    previous step kept, (eta_minus, eta_plus) = etas, and sign(NaN) = 0:

        d <- eta_plus * d where g * h > 0,  d <- eta_minus * d and g <- 0 where g * h < 0
        d <- d clamped to step_sizes
        w <- w - sign(g) * d,  h <- g

    Sources: iRprop-, Igel & Huesken 2003; Rprop-, Riedmiller & Braun 1993 without weight backtracking.

    Args:
        params, etas, step_sizes, maximize: as torch.optim.Rprop.
        lr: the first step size, a number or a tensor of one element; read only in a parameter's first step.
        capturable: keep the step count on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        foreach: a hint to torch.optim, accepted and ignored: the only implementation is fused.
        differentiable: must be False.
        variant: "irprop-" as above; "rprop-": g stays where g * h < 0, and except in a parameter's first step
            d <- eta_minus * d where g * h = 0 as well.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step (0-d float32), prev (h), step_size (d), in the parameter's dtype (float32 for bfloat16 and float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "rprop"
    sparse_text = "Rprop does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        variant: str = "irprop-",
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
        eta_minus, eta_plus = check_pair("etas", group["etas"])
        check_pair("step_sizes", group["step_sizes"])
        check_not_negative(group, "lr")
        if not 0 < eta_minus < 1 < eta_plus:
            raise ValueError(f"Invalid eta values: {eta_minus}, {eta_plus}")
        if group["variant"] not in _VARIANTS:
            raise ValueError(f"Invalid variant: {group['variant']!r}; expected is one of {', '.join(_VARIANTS)}")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("prev", "step_size")

    def _initial_value(self, group: dict[str, Any], name: str) -> float:
        return float(group["lr"]) if name == "step_size" else super()._initial_value(group, name)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        (eta_minus, eta_plus), (smallest, largest) = group["etas"], group["step_sizes"]
        return {
            "eta_minus": eta_minus,
            "eta_plus": eta_plus,
            "smallest_step": smallest,
            "largest_step": largest,
            "zero_after_turn": group["variant"] == "irprop-",
        }
