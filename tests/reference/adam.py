"""Adam (Kingma & Ba 2015, alg. 1), AMSGrad, and AdamW (decoupled decay, Loshchilov & Hutter 2019)."""

import inspect
from typing import ClassVar

import numpy as np
import torch

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class Adam(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "capturable": False,
        "decoupled_weight_decay": False,
        "bias_correction": True,
        "eps_inside_sqrt": False,
    }

    def decoupled(self, o: Case) -> bool:
        return bool(o["decoupled_weight_decay"])

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        (b1, b2), eps = o["betas"], o["eps"]
        if not state:
            state.update(step=np.zeros(()), exp_avg=np.zeros_like(w), exp_avg_sq=np.zeros_like(w))
            if o["amsgrad"]:
                state["max_exp_avg_sq"] = np.zeros_like(w)

        t = state["step"] = state["step"] + 1
        m = state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
        v = state["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * g**2
        if o["amsgrad"]:
            v = state["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], v)

        m_hat, v_hat = (m / (1 - b1**t), v / (1 - b2**t)) if o["bias_correction"] else (m, v)
        denominator = np.sqrt(v_hat + eps) if o["eps_inside_sqrt"] else np.sqrt(v_hat) + eps
        w[...] = w - o["lr"] * m_hat / denominator


class AdamW(Adam):
    DEFAULTS: ClassVar[Case] = {**Adam.DEFAULTS, "weight_decay": 1e-2, "decoupled_weight_decay": True}


# A large eps, so that its place in the formula shows; betas far from 1, so that the corrections do. With the default of
# 1e-8 the first steps are sign(g)·lr, and where g = u + λw cancels no tolerance describes the rounding.
OPTIONS = {
    "lr": (0.1,),
    "betas": ((0.9, 0.999), (0.5, 0.8)),
    "eps": (1e-4, 0.1),
    "amsgrad": (False, True),
    "capturable": (False, True),
    "decoupled_weight_decay": (False, True),
    "bias_correction": (True, False),
    "eps_inside_sqrt": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

_USUAL: Case = {"lr": 0.1, "eps": 1e-4, "amsgrad": True, "weight_decay": 0.1}
_ONLY_OURS: Case = {"bias_correction": True, "eps_inside_sqrt": False}
# Older versions of torch decouple in AdamW alone.
_DECOUPLED: Case = {"decoupled_weight_decay": False}
_torch_has_decoupled = _DECOUPLED.keys() <= inspect.signature(torch.optim.Adam).parameters.keys()

RULES = [
    Rule(Adam, OPTIONS, usual=_USUAL, only_ours=_ONLY_OURS if _torch_has_decoupled else {**_ONLY_OURS, **_DECOUPLED}),
    # Every combination has been tested as Adam's with decoupled_weight_decay=True.
    Rule(
        AdamW,
        {name: values for name, values in OPTIONS.items() if name not in _DECOUPLED},
        usual=_USUAL,
        only_ours=_ONLY_OURS,
        pairs_only=True,
    ),
]
