"""RAdam (Liu et al. 2020, algorithm 2): Adam once enough gradients were averaged, momentum before."""

from typing import ClassVar

import numpy as np

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class RAdam(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "capturable": False,
        "decoupled_weight_decay": False,
    }

    def decoupled(self, o: Case) -> bool:
        return bool(o["decoupled_weight_decay"])

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        b1, b2 = o["betas"]
        if not state:
            state.update(step=np.zeros(()), exp_avg=np.zeros_like(w), exp_avg_sq=np.zeros_like(w))

        t = state["step"] = state["step"] + 1
        m = state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
        v = state["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * g**2

        m_hat = m / (1 - b1**t)
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        if rho > 5:
            r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            w[...] = w - o["lr"] * r * m_hat * np.sqrt(1 - b2**t) / (np.sqrt(v) + o["eps"])
        else:
            w[...] = w - o["lr"] * m_hat


# With these betas the sixth and the eighth step are the first with a second moment.
OPTIONS = {
    "lr": (0.1,),
    "betas": ((0.9, 0.999), (0.5, 0.8)),
    "eps": (1e-4, 0.1),
    "capturable": (False, True),
    "decoupled_weight_decay": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

RULES = [Rule(RAdam, OPTIONS, usual={"lr": 0.1, "eps": 1e-4, "weight_decay": 0.1})]
