"""RAdam: arithmetic in csrc/rules/radam.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_betas, check_not_negative


class RAdam(FusedOptimizer):
    r"""Adam with a warm-up of its own; torch.optim.RAdam in one pass over memory.

    With g the gradient after clipping, sign and coupled weight decay, t the parameter's step count from 1:

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        N <- 2 / (1 - beta2) - 1,  n <- N - 2 * t * beta2^t / (1 - beta2^t)
        w <- w - lr * m / (1 - beta1^t)                                                 (n <= 5)
        w <- w - lr * r * m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v) + eps)       (n > 5)
        r = sqrt((n - 4) * (n - 2) * N / ((N - 4) * (N - 2) * n))

    n, the number of gradients that v averages, exceeds 5 from the sixth step on with the default betas. Source: Liu et al.
    2020, On the Variance of the Adaptive Learning Rate and Beyond.

    Args:
        params, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize: as torch.optim.RAdam. lr may be a tensor of one
            element; on CUDA it may live on the device and change without a synchronisation.
        foreach: a hint to torch.optim, accepted and ignored: the only implementation is fused.
        capturable: keep the step count on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        differentiable: must be False.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step (0-d float32), exp_avg, exp_avg_sq, in the parameter's dtype (float32 for bfloat16 and float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "radam"
    sparse_text = "RAdam does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
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
        check_not_negative(group, "lr", "eps")
        check_betas(group)
        check_not_negative(group, "weight_decay")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        beta1, beta2 = group["betas"]
        own = ("lr", "eps", "weight_decay", "decoupled_weight_decay")
        return {"beta1": beta1, "beta2": beta2, **{name: group[name] for name in own}}
