"""Adagrad (Duchi, Hazan & Singer 2011)."""

from typing import ClassVar

import numpy as np

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class Adagrad(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
        "capturable": False,
        "eps_inside_sqrt": False,
    }

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        if not state:
            state.update(step=np.zeros(()), sum=np.full_like(w, o["initial_accumulator_value"]))

        t = state["step"] = state["step"] + 1
        total = state["sum"] = state["sum"] + g**2
        lr = o["lr"] / (1 + (t - 1) * o["lr_decay"])
        w[...] = w - lr * g / (np.sqrt(total + o["eps"]) if o["eps_inside_sqrt"] else np.sqrt(total) + o["eps"])


# A large eps, so that its place in the formula shows.
OPTIONS = {
    "lr": (0.1,),
    "lr_decay": (0.0, 0.3),
    "initial_accumulator_value": (0.0, 0.7),
    "eps": (1e-2, 0.5),
    "capturable": (False, True),
    "eps_inside_sqrt": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

RULES = [
    Rule(Adagrad, OPTIONS, usual={"lr": 0.1, "eps": 1e-4, "weight_decay": 0.1}, only_ours={"eps_inside_sqrt": False})
]
