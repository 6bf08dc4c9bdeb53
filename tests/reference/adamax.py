"""Adamax (Kingma & Ba 2015, algorithm 2), with eps where torch has it: beside the magnitude of the gradient."""

from typing import ClassVar

import numpy as np

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class Adamax(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "capturable": False,
    }

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        b1, b2 = o["betas"]
        if not state:
            state.update(step=np.zeros(()), exp_avg=np.zeros_like(w), exp_inf=np.zeros_like(w))

        t = state["step"] = state["step"] + 1
        m = state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
        u = state["exp_inf"] = np.maximum(b2 * state["exp_inf"], np.abs(g) + o["eps"])  # NaN stays
        w[...] = w - o["lr"] / (1 - b1**t) * m / u


# A large eps, so that its place in the formula shows.
OPTIONS = {
    "lr": (0.1,),
    "betas": ((0.9, 0.999), (0.5, 0.8)),
    "eps": (1e-2, 0.5),
    "capturable": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

RULES = [Rule(Adamax, OPTIONS, usual={"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1})]
