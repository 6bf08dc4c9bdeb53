"""Adadelta (Zeiler 2012, algorithm 1), with torch's learning rate."""

from typing import ClassVar

import numpy as np

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class Adadelta(Reference):
    DEFAULTS: ClassVar[Case] = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "capturable": False}

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        rho, eps = o["rho"], o["eps"]
        if not state:
            state.update(step=np.zeros(()), square_avg=np.zeros_like(w), acc_delta=np.zeros_like(w))

        state["step"] = state["step"] + 1
        state["square_avg"] = rho * state["square_avg"] + (1 - rho) * g**2
        delta = np.sqrt(state["acc_delta"] + eps) / np.sqrt(state["square_avg"] + eps) * g
        state["acc_delta"] = rho * state["acc_delta"] + (1 - rho) * delta**2
        w[...] = w - o["lr"] * delta


# A large eps: with the default the first steps are so small that an error in them would not show.
OPTIONS = {
    "lr": (0.1,),
    "rho": (0.9, 0.5),
    "eps": (1e-2, 0.5),
    "capturable": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

RULES = [Rule(Adadelta, OPTIONS, usual={"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1})]
