"""Lion (Chen et al. 2023, algorithm 2). torch has none: LionInTorch is its formula in torch's operations."""

from typing import ClassVar

import numpy as np
import torch

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class Lion(Reference):
    DEFAULTS: ClassVar[Case] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}

    def decoupled(self, o: Case) -> bool:
        return True

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        b1, b2 = o["betas"]
        m = state.get("exp_avg", np.zeros_like(w))
        w[...] = w - o["lr"] * np.sign(b1 * m + (1 - b1) * g)
        state["exp_avg"] = b2 * m + (1 - b2) * g


class LionInTorch(torch.optim.Optimizer):
    """A Lion as torch.optim would have it: its signature, checks and state."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0, *, foreach=None, maximize=False):
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr < 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if weight_decay < 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "foreach": foreach, "maximize": maximize}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p, group):
        if p.grad.is_sparse:
            raise RuntimeError("Lion does not support sparse gradients")
        (b1, b2), lr, state = group["betas"], float(group["lr"]), self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        tensors = p, p.grad, state["exp_avg"]
        w, g, m = map(torch.view_as_real, tensors) if p.is_complex() else tensors
        g = -g if group["maximize"] else g
        direction = m.lerp(g, 1 - b1)
        w.mul_(1 - lr * group["weight_decay"])
        w.sub_(lr * torch.where(direction.isnan(), direction, direction.sign()))
        m.lerp_(g, 1 - b2)


LionInTorch.__name__ = "Lion"  # which profiles show

# Betas like the default: with round ones, 16-bit gradients cancel the moment up to its rounding, and what is left has no
# sign that a tolerance could describe.
OPTIONS = {
    "lr": (0.1,),
    "betas": ((0.9013, 0.9871), (0.5171, 0.8131)),
    **DECAY,
    **SHARED_OPTIONS,
}

# A decay so strong that it bounds the weights: by 1 / weight_decay.
_USUAL: Case = {"lr": 0.1, "betas": (0.9013, 0.9871), "weight_decay": 1.0}

RULES = [Rule(Lion, OPTIONS, usual=_USUAL, stand_in=LionInTorch)]
