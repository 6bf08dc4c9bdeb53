"""Lion: arithmetic in csrc/rules/lion.hpp."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_betas, check_not_negative


class Lion(FusedOptimizer):
    r"""Lion, which moves every element by lr, up or down, in one pass over memory. torch.optim has no Lion.

    With g the gradient after clipping and sign:

        w <- w * (1 - lr * weight_decay)
        w <- w - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    One state, where Adam has two. Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, algorithm 2.

    Args:
        params: parameters, named parameters or group dicts, as for torch.optim.
        lr: the size of every step. The paper advises a third to a tenth of AdamW's, with weight_decay that many times larger.
            It may be a tensor of one element; on CUDA it may live on the device and change without a synchronisation.
        betas: the weights of m in the step and in the new m.
        weight_decay: decoupled from the gradient, as in AdamW.
        maximize: step up the gradient, not down.
        foreach: a hint to other implementations, accepted and ignored: the only implementation is fused.
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: exp_avg (m), in the parameter's dtype (float32 for bfloat16 and float16). There is no step count, so that step() can
    always be captured in a CUDA graph.

    Raises:
        ValueError: an option out of range.
    """

    rule = "lion"
    scalar_states: ClassVar[dict[str, float]] = {}
    sparse_text = "Lion does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
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
        check_betas(group)
        check_not_negative(group, "weight_decay")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, **{name: group[name] for name in ("lr", "weight_decay")}}
