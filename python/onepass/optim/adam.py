"""Adam and AdamW: arithmetic in csrc/rules/adam.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _compat
from ._base import FusedOptimizer
from ._options import check_betas, check_not_negative


class Adam(FusedOptimizer):
    r"""Adam; torch.optim.Adam in one pass over memory.

    With g the gradient after clipping, sign and coupled weight decay, t the parameter's step count from 1:

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        w <- w - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    With amsgrad the largest v so far replaces v. Sources: Kingma & Ba 2015, algorithm 1; Reddi et al. 2018.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as torch.optim.Adam. lr and betas may
            be tensors of one element; on CUDA they may live on the device and change without a synchronisation.
        foreach, fused: hints to torch.optim, accepted and ignored: the only implementation is fused.
        capturable: keep the step count on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        differentiable: must be False.
        bias_correction: False omits the divisions by 1 - beta^t.
        eps_inside_sqrt: sqrt(v + eps) instead of sqrt(v) + eps.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step (0-d float32), exp_avg, exp_avg_sq and with amsgrad max_exp_avg_sq, in the parameter's dtype (float32 for
    bfloat16 and float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "adam"
    sparse_text = "Adam does not support sparse gradients, please consider SparseAdam instead"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        eps_inside_sqrt: bool = False,
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
        if isinstance(group["betas"][0], Tensor) != isinstance(group["betas"][1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        check_not_negative(group, "weight_decay")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        own = ("lr", "eps", "weight_decay", "decoupled_weight_decay", "bias_correction", "eps_inside_sqrt")
        betas = {"beta1": group["betas"][0], "beta2": group["betas"][1]}
        return {**betas, **{name: group[name] for name in own}, "eps_before_correction": False}


class AdamW(Adam):
    r"""Adam with decoupled weight decay; torch.optim.AdamW in one pass over memory.

    Like Adam, but weight decay is w <- w * (1 - lr * weight_decay) before the update, and no part of the gradient.
    Source: Loshchilov & Hutter 2019. Arguments, state and errors are Adam's; weight_decay is 1e-2 by default.
    """

    sparse_text = Adam.sparse_text if _compat.ADAMW_IS_AN_ADAM else "AdamW does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        eps_inside_sqrt: bool = False,
        max_norm: float | None = None,
        normalize_grads: bool = False,
        fused_unscale: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_bits: int | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        FusedOptimizer.__init__(self, params, {**locals(), "decoupled_weight_decay": True})

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        group["decoupled_weight_decay"] = True  # older torch does not save it
