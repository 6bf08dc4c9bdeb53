"""SparseAdam: arithmetic in csrc/rules/adam.hpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._checks import name_of
from ._options import check, check_betas, check_scalar


class SparseAdam(FusedOptimizer):
    r"""Adam for sparse gradients (nn.Embedding(sparse=True)); torch.optim.SparseAdam in one pass over the rows touched.

    With g a row of the coalesced gradient after clipping and sign, t the parameter's step count from 1, for these rows only:

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        w <- w - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    Sources: Kingma & Ba 2015, the end of section 2, which adds eps before the correction; torch.optim.SparseAdam.

    Args:
        params, lr, betas, eps, maximize: as torch.optim.SparseAdam. lr may be a tensor of one element; on CUDA it may live on
            the device and change without a synchronisation.
        max_norm, normalize_grads, fused_unscale: see FusedOptimizer. The norm is that of the coalesced gradients.

    State: step, exp_avg, exp_avg_sq, the last two of the parameter's shape and dtype (float32 for bfloat16 and float16).

    Raises:
        ValueError: an option out of range, a sparse or a complex parameter, with torch.optim's text.
        RuntimeError: in step(), with torch.optim's text, for a dense gradient.
    """

    rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        max_norm: float | None = None,
        normalize_grads: bool = False,
        fused_unscale: bool = False,
    ) -> None:
        super().__init__(params, locals())
        self._check_params(lambda p: p.is_sparse, "Sparse", "SparseAdam requires dense parameter tensors")
        self._check_params(lambda p: p.is_complex(), "Complex", "SparseAdam does not support complex parameters")

    def _check_params(self, wrong: Callable[[Tensor], bool], kind: str, text: str) -> None:
        found = [[g, i] for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"]) if wrong(p)]
        if found:
            raise ValueError(f"{kind} params at indices {found}: {text}")

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check(group["lr"] > 0, "Invalid learning rate", group["lr"])
        check_scalar("eps", group["eps"])
        check(group["eps"] > 0, "Invalid epsilon value", group["eps"])
        check_betas(group)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _all_state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _hyper(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        beta1, beta2 = group["betas"]
        own = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        unused = {"weight_decay": 0.0, "decoupled_weight_decay": False, "eps_inside_sqrt": False}
        return {**own, **unused, "bias_correction": True, "eps_before_correction": True}

    def _gather(self, fresh: set[Tensor] | None) -> Any:
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is not None and not param.grad.is_sparse:
                    raise RuntimeError(
                        f"SparseAdam does not support dense gradients, please consider Adam instead "
                        f"({name_of(group, number, index)})"
                    )
        return super()._gather(fresh)

    def _saved_state(self, states: dict[str, Any]) -> dict[str, Any]:
        """torch's SparseAdam counts the steps in a Python int."""
        return {**states, "step": int(states["step"])} if "step" in states else states

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with int counts."""
        saved = super().state_dict()
        for index, states in saved["state"].items():
            saved["state"][index] = self._saved_state(states)
        return saved
