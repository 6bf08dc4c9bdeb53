"""NAdam: arithmetic in csrc/rules/nadam.hpp."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_betas, check_not_negative


class NAdam(FusedOptimizer):
    r"""Adam with Nesterov momentum; torch.optim.NAdam in one pass over memory.

    With g the gradient after clipping, sign and coupled weight decay, t the parameter's step count from 1:

        mu_t <- beta1 * (1 - 0.96^(t * momentum_decay) / 2),  P_t <- mu_1 * ... * mu_t
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        w <- w - lr * ((1 - mu_t) * g / (1 - P_t) + mu_(t+1) * m / (1 - P_(t+1))) / (sqrt(v / (1 - beta2^t)) + eps)

    Source: Dozat 2016, Incorporating Nesterov Momentum into Adam.

    Args:
        params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, maximize: as torch.optim.NAdam. lr may
            be a tensor of one element; on CUDA it may live on the device and change without a synchronisation.
        foreach: a hint to torch.optim, accepted and ignored: the only implementation is fused.
        capturable: keep step and mu_product on the device, so that step() can be captured in a CUDA graph. On the CPU it
            changes nothing.
        differentiable: must be False.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step and mu_product (P, both 0-d float32), exp_avg, exp_avg_sq, in the parameter's dtype (float32 for bfloat16 and
    float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "nadam"
    scalar_states: ClassVar[dict[str, float]] = {"step": 0.0, "mu_product": 1.0}
    sparse_text = "NAdam does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
        check_not_negative(group, "weight_decay", "momentum_decay")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        beta1, beta2 = group["betas"]
        own = ("lr", "eps", "weight_decay", "decoupled_weight_decay")
        # The host computes mu_product too, so the hyper-parameters that it depends on have to be numbers.
        product = {"beta1": float(beta1), "momentum_base": 0.96 ** float(group["momentum_decay"])}
        return {**product, "beta2": beta2, **{name: group[name] for name in own}}
