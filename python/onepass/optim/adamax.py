"""Adamax: arithmetic in csrc/rules/adamax.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_betas, check_not_negative


class Adamax(FusedOptimizer):
    r"""Adam with a maximum in place of the second moment; torch.optim.Adamax in one pass over memory.

    With g the gradient after clipping, sign and weight decay (g + weight_decay * w), t the parameter's step count from 1:

        m <- beta1 * m + (1 - beta1) * g
        u <- max(beta2 * u, |g| + eps)
        w <- w - lr * m / (1 - beta1^t) / u

    Source: Kingma & Ba 2015, algorithm 2.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch.optim.Adamax. lr may be a tensor of one element; on CUDA it may
            live on the device and change without a synchronisation.
        foreach: a hint to torch.optim, accepted and ignored: the only implementation is fused.
        differentiable: must be False.
        capturable: keep the step count on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step (0-d float32), exp_avg (m), exp_inf (u), in the parameter's dtype (float32 for bfloat16 and float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "adamax"
    sparse_text = "Adamax does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
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
        check_not_negative(group, "lr", "eps")
        check_betas(group)
        check_not_negative(group, "weight_decay")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_inf")

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, **{name: group[name] for name in ("lr", "eps", "weight_decay")}}
