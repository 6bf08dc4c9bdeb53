"""RMSprop: arithmetic in csrc/rules/rmsprop.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._options import check_not_negative


class RMSprop(FusedOptimizer):
    r"""RMSprop, centered or not, with or without momentum; torch.optim.RMSprop in one pass over memory.

    With g the gradient after clipping, sign and weight decay (g + weight_decay * w):

        G <- alpha * G + (1 - alpha) * g^2
        D <- sqrt(G) + eps                                                       (not centered)
        a <- alpha * a + (1 - alpha) * g,  D <- sqrt(max(0, G - a^2)) + eps      (centered)
        w <- w - lr * g / D                                                      (without momentum)
        b <- momentum * b + g / D,  w <- w - lr * b                              (with momentum)

    G - a^2 rounds below 0 when the gradient hardly changes; torch.optim then gives NaN. Sources: Tieleman & Hinton 2012,
    lecture 6.5; centered: Graves 2013, Generating Sequences With Recurrent Neural Networks.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, maximize: as torch.optim.RMSprop. lr may be a tensor of one
            element; on CUDA it may live on the device and change without a synchronisation.
        capturable: keep the step count on the device, so that step() can be captured in a CUDA graph. On the CPU it changes
            nothing.
        foreach: a hint to torch.optim, accepted and ignored: the only implementation is fused.
        differentiable: must be False.
        eps_inside_sqrt: D = sqrt(G + eps), or sqrt(max(0, G - a^2) + eps).
        max_norm, normalize_grads, fused_unscale, state_dtype, master_bits, stochastic_rounding: see
            FusedOptimizer.

    State: step (0-d float32), square_avg (G), if centered grad_avg (a), with momentum momentum_buffer (b), in the parameter's
    dtype (float32 for bfloat16 and float16).

    Raises:
        ValueError: an option out of range, with torch.optim's text.
    """

    rule = "rmsprop"
    sparse_text = "RMSprop does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
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
        check_not_negative(group, "lr", "eps", "momentum", "weight_decay", "alpha")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        centered = ("grad_avg",) if group["centered"] else ()
        momentum = ("momentum_buffer",) if group["momentum"] != 0 else ()
        return ("square_avg", *centered, *momentum)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        return {name: group[name] for name in ("lr", "alpha", "eps", "weight_decay", "momentum", "eps_inside_sqrt")}
