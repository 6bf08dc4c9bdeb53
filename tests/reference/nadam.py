"""NAdam (Dozat 2016): Nesterov momentum in Adam, with a momentum that rises from step to step."""

from typing import ClassVar

import numpy as np

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class NAdam(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum_decay": 4e-3,
        "capturable": False,
        "decoupled_weight_decay": False,
    }

    def decoupled(self, o: Case) -> bool:
        return bool(o["decoupled_weight_decay"])

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        (b1, b2), psi = o["betas"], o["momentum_decay"]
        if not state:
            state.update(step=np.zeros(()), exp_avg=np.zeros_like(w), exp_avg_sq=np.zeros_like(w))
            state["mu_product"] = np.ones((), np.float32)

        t = state["step"] = state["step"] + 1
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (i * psi)) for i in (t, t + 1))
        # The product is a float32 whatever the parameter, in torch and here: its rounding is part of the definition.
        state["mu_product"] = np.float32(state["mu_product"] * np.float32(mu))
        product = float(state["mu_product"])
        m = state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
        v = state["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * g**2

        ahead = (1 - mu) * g / (1 - product) + mu_next * m / (1 - product * mu_next)
        w[...] = w - o["lr"] * ahead / (np.sqrt(v / (1 - b2**t)) + o["eps"])


# A large eps and betas far from 1, as in adam.py; a momentum_decay that shows within a few steps.
OPTIONS = {
    "lr": (0.1,),
    "betas": ((0.9, 0.999), (0.5, 0.8)),
    "eps": (1e-4, 0.1),
    "momentum_decay": (4e-3, 0.5),
    "capturable": (False, True),
    "decoupled_weight_decay": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

RULES = [Rule(NAdam, OPTIONS, usual={"lr": 0.1, "eps": 1e-4, "weight_decay": 0.1})]
