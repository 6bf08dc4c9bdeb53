"""Adadelta: arithmetic in csrc/rules/adadelta.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check, check_not_negative


class Adadelta(FusedOptimizer):
    r"""Adadelta; torch.optim.Adadelta in one pass over memory.

    With g the gradient after clipping, sign and weight decay (g + weight_decay * w):

        G <- rho * G + (1 - rho) * g^2
        d <- sqrt(D + eps) / sqrt(G + eps) * g
        D <- rho * D + (1 - rho) * d^2
        w <- w - lr * d

    Source: Zeiler 2012, ADADELTA: An Adaptive Learning Rate Method.

    Args:
        params, lr, rho, eps, weight_decay, maximize: as torch.optim.Adadelta. lr may be a tensor of one element; on CUDA it may
            live on the device and change without a synchronisation.
        foreach: a hint to torch.optim, accepted and ignored: the only implementation is fused.
        capturable: keep the step count on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        differentiable: must be False.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step (0-d float32), square_avg (G), acc_delta (D), in the parameter's dtype (float32 for bfloat16 and float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "adadelta"
    sparse_text = "Adadelta does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
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
        check_not_negative(group, "lr")
        check(0 <= group["rho"] <= 1, "Invalid rho value", group["rho"])
        check_not_negative(group, "eps", "weight_decay")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        return {name: group[name] for name in ("lr", "rho", "eps", "weight_decay")}
